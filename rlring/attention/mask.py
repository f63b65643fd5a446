"""Mask: which query sees which key, computed from the positions and segments of the tokens."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Int, Int32

from rlring.attention.block_view import BlockView, Bounds, Seen, pick
from rlring.attention.window import MOST, AnyArray, Window, checked_window, is_within, narrowed
from rlring.errors import UsageError

PADDING = -1  # the segment of padding tokens


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mask:
    """Which query sees which key, from the positions and segments of the tokens.

    A query sees the keys of its own segment. If the mask is causal, it sees only keys at its own position or earlier;
    with a window, only keys that are not too far away. Segment -1 is padding: such a token sees nothing and is not
    seen. Positions need not be sorted, contiguous or unique: the mask is exact for any permutation of the tokens, and
    tokens that share a position see each other (block-causal). Example, causal, window 2, `#` visible:

        segment    0 0 0 1 1 -1          key   0 0 0 1 1 -1
        position   0 1 2 0 1  2                0 1 2 0 1  2
                                    query 0 0  # . . . .  .
                                          0 1  # # . . .  .
                                          0 2  . # # . .  .
                                          1 0  . . . # .  .
                                          1 1  . . . # #  .
                                         -1 2  . . . . .  .
    """

    q_position: Int32[Array, "B T"]
    k_position: Int32[Array, "B S"]
    q_segment: Int32[Array, "B T"]
    k_segment: Int32[Array, "B S"]
    is_causal: bool = field(default=True, metadata={"static": True})  # k_position <= q_position
    # An integer n: q_position - k_position < n, the query itself included. A pair: at most `left` positions back and at
    # most `right` ahead, -left <= k_position - q_position <= right; None on a side is no limit.
    window: Window | None = field(default=None, metadata={"static": True})
    # The index of each token in the whole arrays; attention() fills it in if a bias or dropout needs it.
    q_place: Int32[Array, "B T"] | None = None
    k_place: Int32[Array, "B S"] | None = None

    kind: ClassVar[str | None] = None  # the name of a kind of mask that kernels may not support, for error messages

    def __post_init__(self):
        object.__setattr__(self, "window", checked_window(self.window))
        if not isinstance(self.is_causal, bool | np.bool_):
            raise UsageError(
                f"is_causal is True or False when the program is compiled; got a {type(self.is_causal).__name__}. "
                "Make it a static argument of jax.jit."
            )

    @classmethod
    def causal(
        cls, position: Int32[Array, "B T"], segment: Int32[Array, "B T"] | None = None, window: Window | None = None
    ) -> "Mask":
        """Returns the mask of causal self-attention; without `segment` every token is in segment 0.

        Raises:
            UsageError: no such window.
        """
        segment = jnp.zeros_like(position) if segment is None else segment
        return cls(position, position, segment, segment, True, window)

    @classmethod
    def full(
        cls, position: Int32[Array, "B T"], segment: Int32[Array, "B T"] | None = None, window: Window | None = None
    ) -> "Mask":
        """Returns the mask of bidirectional self-attention; an integer window limits only how far back a query sees.

        Raises:
            UsageError: no such window.
        """
        return replace(cls.causal(position, segment, window), is_causal=False)

    def at(self, position: Int[AnyArray, "B T"], segment: Int[AnyArray, "B T"] | None = None) -> "Mask":
        """Returns the mask of self-attention with the same rule, for other tokens."""
        segment = jnp.zeros_like(position) if segment is None else segment
        tokens = {"q_position": position, "k_position": position, "q_segment": segment, "k_segment": segment}
        return replace(self, **tokens, q_place=None, k_place=None)

    def within(self, back: int) -> "Mask":
        """Returns the mask with a window of at most `back` positions back, the query included."""
        return replace(self, window=narrowed(self.window, back))

    def visible(self) -> Bool[AnyArray, "B T S"]:
        """Returns the mask as an array. Its memory is quadratic in the length, so use it for blocks and tests."""
        q_position, k_position = self.q_position[:, :, None], self.k_position[:, None, :]
        q_segment, k_segment = self.q_segment[:, :, None], self.k_segment[:, None, :]
        seen = (q_segment == k_segment) & (q_segment >= 0)
        if self.is_causal:
            seen &= k_position <= q_position
        return seen & self._in_window(q_position, k_position, q_position, k_position)

    def maybe_needed(self) -> Bool[AnyArray, "B T S"]:
        """Returns False only where neither the query nor any later one sees the key, so that a cache may drop it."""
        return self.visible()

    def _in_window(self, q_back, k_back, q_ahead, k_ahead) -> Bool[AnyArray, "..."] | bool:
        """Returns whether k_back is within the window before q_back, and k_ahead within the window after q_ahead."""
        back, ahead = self.reach
        inside = True
        if back is not None:
            inside &= is_within(q_back, k_back, back)
        if ahead is not None:
            inside &= is_within(k_ahead, q_ahead, ahead)
        return inside

    @property
    def reach(self) -> tuple[int | None, int | None]:
        """How many positions a query sees back and ahead, each including its own; None: no limit."""
        if not isinstance(self.window, tuple):
            return self.window, None
        back, ahead = (None if side is None else side + 1 for side in self.window)
        return back, ahead

    def map_queries(self, change: Callable[[Array], Array]) -> "Mask":
        """Returns the mask with `change` applied to every array of queries."""
        return self._changed(change, ("q_position", "q_segment", "q_place"))

    def map_keys(self, change: Callable[[Array], Array]) -> "Mask":
        """Returns the mask with `change` applied to every array of keys."""
        return self._changed(change, ("k_position", "k_segment", "k_place"))

    def _changed(self, change: Callable[[Array], Array], names: tuple[str, ...]) -> "Mask":
        arrays = {name: getattr(self, name) for name in names}
        return replace(self, **{name: change(x) for name, x in arrays.items() if x is not None})

    def as_kind(self, kind: "type[Mask]", **more) -> "Mask":
        """Returns a mask of the subclass `kind` with the same arrays, and with its further fields `more`."""
        return kind(**{one.name: getattr(self, one.name) for one in fields(Mask)}, **more)

    def block(self, q_start, q_size: int, k_start, k_size: int) -> "Mask":
        """Returns the mask of q_size queries from q_start and k_size keys from k_start; starts may be traced."""
        queries = self.map_queries(lambda x: lax.dynamic_slice_in_dim(x, q_start, q_size, 1))
        return queries.map_keys(lambda x: lax.dynamic_slice_in_dim(x, k_start, k_size, 1))

    def specs(self, tokens: P, *, queries: P | None = None) -> "Mask":
        """Returns the in_specs of jax.shard_map for this mask.

        Arrays with one row per sequence are split as the batch is.

        Args:
            tokens: the spec of [B, S], for keys, and for queries unless `queries` is given.
            queries: the spec of [B, T], for queries.
        """
        by_row = jax.tree.map(lambda _: P(*tokens[:1]), self)
        return by_row.map_queries(lambda _: tokens if queries is None else queries).map_keys(lambda _: tokens)

    @property
    def span_of_keys(self) -> tuple[Int32[Array, ""] | None, int]:
        """The place of the first key in the whole arrays (None if unknown) and the number of keys; for consecutive
        keys."""
        return (None if self.k_place is None else self.k_place[0, 0]), self.k_position.shape[1]

    @property
    def rows(self) -> int:
        """The number of rows B."""
        return self.q_position.shape[0]

    def repeated(self, times: int) -> "Mask":
        """Returns the mask with each row repeated `times` times, for example once for each key/value head."""
        return self if times == 1 else jax.tree.map(lambda x: jnp.repeat(x, times, axis=0), self)

    def padded(self, q_length: int, k_length: int) -> "Mask":
        """Returns the mask with padding tokens appended up to the given lengths."""

        def padded(x: Array, length: int) -> Array:
            # Positions and segments are padded with the same number. If both are the same array, such as the zeros of a
            # single token, XLA merges their pads when it splits them over devices, even if the fills differ (jax 0.12).
            return jnp.pad(x, ((0, 0), (0, length - x.shape[1])), constant_values=PADDING)

        return self.map_queries(lambda x: padded(x, q_length)).map_keys(lambda x: padded(x, k_length))

    def q_bounds(self, size: int) -> Bounds:
        """Returns the bounds of each block of `size` queries; `size` divides T."""
        return Bounds.of(self.q_position, self.q_segment, size)

    def k_bounds(self, size: int) -> Bounds:
        """Returns the bounds of each block of `size` keys; `size` divides S."""
        return Bounds.of(self.k_position, self.k_segment, size)

    def view(self, q_size: int, k_size: int) -> BlockView:
        """Returns which blocks of `q_size` queries see which blocks of `k_size` keys."""
        return BoundsView(self, self.q_bounds(q_size), self.k_bounds(k_size))

    def maybe_visible(self, q: Bounds, k: Bounds) -> Bool[Array, "..."]:
        """Returns, by block, False only if in no row any query of q sees any key of k. q and k broadcast."""
        seen = (q.low_segment <= k.high_segment) & (k.low_segment <= q.high_segment)
        seen &= (q.low_position <= q.high_position) & (k.low_position <= k.high_position)
        if self.is_causal:
            seen &= k.low_position <= q.high_position
        seen &= self._in_window(q.low_position, k.high_position, q.high_position, k.low_position)
        return seen.any(0)

    def shows_any(self) -> Bool[Array, ""]:
        """Returns False only if no query sees any key."""
        return self.maybe_visible(self.q_bounds(self.q_position.shape[1]), self.k_bounds(self.k_position.shape[1]))[0]

    def fully_visible(self, q: Bounds, k: Bounds) -> Bool[Array, "..."]:
        """Returns, by block, True only if in all rows every query of q sees every key of k. q and k broadcast."""
        seen = q.is_whole & k.is_whole & (q.low_segment == q.high_segment)
        seen &= (q.low_segment == k.low_segment) & (k.low_segment == k.high_segment)
        if self.is_causal:
            seen &= k.high_position <= q.low_position
        seen &= self._in_window(q.high_position, k.low_position, q.low_position, k.high_position)
        return seen.all(0)


class BoundsView(NamedTuple):
    """A BlockView computed from the bounds of the blocks; its memory is linear in the number of blocks."""

    mask: Mask
    q: Bounds
    k: Bounds

    def of_queries(self, i) -> Seen:
        return self._seen(pick(self.q, i), self.k)

    def of_keys(self, j) -> Seen:
        return self._seen(self.q, pick(self.k, j))

    def _seen(self, q: Bounds, k: Bounds) -> Seen:
        return self.mask.maybe_visible(q, k), self.mask.fully_visible(q, k)


def checked(mask: Mask, queries: tuple[int, ...], keys: tuple[int, ...]) -> Mask:
    """Returns the mask with int32 arrays; `queries` is (B, T) and `keys` is (B, S).

    Raises:
        UsageError: `mask` is not a Mask; its arrays do not have these shapes; or their type may not fit into int32:
            floats, booleans, int64 and uint32. NumPy integers are accepted if all values fit.
    """
    if not isinstance(mask, Mask):
        raise UsageError(
            f"attention needs an rlring.Mask; got {mask if mask is None else type(mask).__name__}. Where every token "
            "sees every token it is Mask.full(position), where none sees a later one Mask.causal(position)."
        )
    names = ("q_position", "q_segment", "k_position", "k_segment")
    mask = replace(mask, **{name: _as_int32(name, getattr(mask, name)) for name in names})
    shapes = tuple(getattr(mask, name).shape for name in names)
    if shapes != (queries, queries, keys, keys):
        raise UsageError(
            f"the mask needs q_position and q_segment {queries}, k_position and k_segment {keys}; got "
            f"{shapes[0]}, {shapes[1]}, {shapes[2]}, {shapes[3]}. Broadcast positions over the batch."
        )
    rows = {x.shape[0] for x in jax.tree.leaves(mask)}
    if len(rows) > 1:
        raise UsageError(
            f"the {mask.kind} has something of its own for each sequence; got {max(rows - {queries[0]})} of them for "
            f"B={queries[0]}. Make one mask for each batch size."
        )
    return mask


def _as_int32(name: str, x) -> Int32[Array, "..."]:
    dtype = getattr(x, "dtype", None)
    fits = dtype is not None and jnp.issubdtype(dtype, jnp.integer)
    if fits and isinstance(x, np.ndarray):
        fits = x.size == 0 or (x.min() >= -MOST - 1 and x.max() <= MOST)
    elif fits:
        fits = jnp.iinfo(dtype).max <= MOST
    if not fits:
        got = f"a {type(x).__name__}" if dtype is None else dtype
        raise UsageError(
            f"the mask's {name} is an array of whole numbers that int32 holds; got {got}. Cast it with "
            ".astype(jnp.int32); a token that is not there has segment -1."
        )
    return jnp.asarray(x if dtype == jnp.int32 else x.astype(jnp.int32))
