"""Mask: which query sees which key, from positions and segments that travel with the tokens."""

import operator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int32

from rlring.errors import UsageError

NOWHERE = -1  # the segment of a token that is not there
MOST = 2**31 - 1  # that int32 holds


class Bounds(NamedTuple):
    """The least and greatest position and segment of each block of tokens: enough to skip a block unread."""

    low_position: Int32[Array, "B blocks"]  # over tokens that are there; low > high where there is none
    high_position: Int32[Array, "B blocks"]
    low_segment: Int32[Array, "B blocks"]  # over tokens that are there
    high_segment: Int32[Array, "B blocks"]
    is_whole: Bool[Array, "B blocks"]  # every token of the block is there


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mask:
    """Which query sees which key: those of its own segment, if asked only those not later, or not too far back.

    Segment -1 is nowhere: such a token sees nothing and is not seen. Positions need not be sorted, contiguous or
    unique: any permutation of the tokens is exact, and tokens that share a position see each other (block-causal).
    Example, causal, window 2, `#` visible:

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
    window: int | None = field(default=None, metadata={"static": True})  # q_position - k_position < window

    def __post_init__(self):
        object.__setattr__(self, "window", _checked_window(self.window))
        if not isinstance(self.is_causal, bool | np.bool_):
            raise UsageError(
                f"is_causal is True or False when the program is compiled; got a {type(self.is_causal).__name__}. "
                "Make it a static argument of jax.jit."
            )

    @classmethod
    def causal(
        cls, position: Int32[Array, "B T"], segment: Int32[Array, "B T"] | None = None, window: int | None = None
    ) -> "Mask":
        """Returns the mask of causal self-attention; without `segment` every token is in segment 0."""
        segment = jnp.zeros_like(position) if segment is None else segment
        return cls(position, position, segment, segment, True, window)

    @classmethod
    def full(
        cls, position: Int32[Array, "B T"], segment: Int32[Array, "B T"] | None = None, window: int | None = None
    ) -> "Mask":
        """Returns the mask of self-attention that also looks ahead; a window still limits how far back."""
        return replace(cls.causal(position, segment, window), is_causal=False)

    def visible(self) -> Bool[Array, "B T S"]:
        """Returns the whole mask: quadratic, so only for blocks and tests."""
        q_position, k_position = self.q_position[:, :, None], self.k_position[:, None, :]
        q_segment, k_segment = self.q_segment[:, :, None], self.k_segment[:, None, :]
        seen = (q_segment == k_segment) & (q_segment >= 0)
        if self.is_causal:
            seen &= k_position <= q_position
        if self.window is not None:
            seen &= is_within(q_position, k_position, self.window)
        return seen

    def block(self, q_start, q_size: int, k_start, k_size: int) -> "Mask":
        """Returns the mask of q_size queries from q_start and k_size keys from k_start; starts may be traced."""
        return replace(
            self,
            q_position=lax.dynamic_slice_in_dim(self.q_position, q_start, q_size, 1),
            k_position=lax.dynamic_slice_in_dim(self.k_position, k_start, k_size, 1),
            q_segment=lax.dynamic_slice_in_dim(self.q_segment, q_start, q_size, 1),
            k_segment=lax.dynamic_slice_in_dim(self.k_segment, k_start, k_size, 1),
        )

    @property
    def rows(self) -> int:
        """B."""
        return self.q_position.shape[0]

    def repeated(self, times: int) -> "Mask":
        """Returns the mask with each row `times` times: one for each key/value head."""
        return self if times == 1 else jax.tree.map(lambda x: jnp.repeat(x, times, axis=0), self)

    def padded(self, q_length: int, k_length: int) -> "Mask":
        """Returns the mask with tokens in no segment appended up to the given lengths."""

        def padded(x: Array, length: int) -> Array:
            # One number for positions and segments: where both are the same array, as the zeros of a single token are,
            # XLA takes two pads of it for one when it splits them over devices, whatever they fill in (jax 0.12).
            return jnp.pad(x, ((0, 0), (0, length - x.shape[1])), constant_values=NOWHERE)

        return replace(
            self,
            q_position=padded(self.q_position, q_length),
            k_position=padded(self.k_position, k_length),
            q_segment=padded(self.q_segment, q_length),
            k_segment=padded(self.k_segment, k_length),
        )

    def q_bounds(self, size: int) -> Bounds:
        """Returns the bounds of each block of `size` queries; `size` divides T."""
        return _bounds(self.q_position, self.q_segment, size)

    def k_bounds(self, size: int) -> Bounds:
        """Returns the bounds of each block of `size` keys; `size` divides S."""
        return _bounds(self.k_position, self.k_segment, size)

    def may_see(self, q: Bounds, k: Bounds) -> Bool[Array, "blocks"]:
        """Returns, by block, False only where in no row any query of q sees any key of k. q and k broadcast."""
        seen = (q.low_segment <= k.high_segment) & (k.low_segment <= q.high_segment)
        seen &= (q.low_position <= q.high_position) & (k.low_position <= k.high_position)
        if self.is_causal:
            seen &= k.low_position <= q.high_position
        if self.window is not None:
            seen &= is_within(q.low_position, k.high_position, self.window)
        return seen.any(0)

    def shows_any(self) -> Bool[Array, ""]:
        """Returns False only where no query sees any key."""
        return self.may_see(self.q_bounds(self.q_position.shape[1]), self.k_bounds(self.k_position.shape[1]))[0]

    def sees_all(self, q: Bounds, k: Bounds) -> Bool[Array, "blocks"]:
        """Returns, by block, True only where every query of q sees every key of k, in all rows of the batch."""
        seen = q.is_whole & k.is_whole & (q.low_segment == q.high_segment)
        seen &= (q.low_segment == k.low_segment) & (k.low_segment == k.high_segment)
        if self.is_causal:
            seen &= k.high_position <= q.low_position
        if self.window is not None:
            seen &= is_within(q.high_position, k.low_position, self.window)
        return seen.all(0)


def checked(mask: Mask, queries: tuple[int, ...], keys: tuple[int, ...]) -> Mask:
    """Returns the mask in int32.

    Raises:
        UsageError: no Mask; or arrays that are not [B, T] of queries and [B, S] of keys, or whose type has numbers that
            int32 does not hold: floats, booleans, and int64 or uint32 (of NumPy only where there are such numbers).
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
    return mask


def is_within(q_position: Int32[Array, "..."], k_position: Int32[Array, "..."], window: int) -> Bool[Array, "..."]:
    """Returns whether keys are later than queries, or fewer than `window` tokens before them; the two broadcast."""
    # The distance of two int32 may be none, but it is a uint32.
    return (k_position > q_position) | ((q_position - k_position).astype(jnp.uint32) < window)


def _checked_window(window) -> int | None:
    if window is None:
        return None
    is_one = not isinstance(window, bool | np.bool_ | jax.core.Tracer)
    try:
        number = operator.index(window) if is_one else None
    except TypeError:
        number = None
    if number is None:
        got = repr(window) if isinstance(window, bool | float | str | tuple) else f"a {type(window).__name__}"
        raise UsageError(
            "a window is how many tokens a query looks back, itself included: one whole number, known when the program "
            f"is compiled; got {got}. Make it a static argument of jax.jit, and limit what lies ahead by is_causal."
        )
    if not 1 <= number <= MOST:
        raise UsageError(
            f"a window holds at least the token itself, and at most 2**31 - 1; got window={number}. Use None for no "
            "window."
        )
    return number


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


def _bounds(position: Int32[Array, "B T"], segment: Int32[Array, "B T"], size: int) -> Bounds:
    position, segment = (x.reshape(x.shape[0], -1, size) for x in (position, segment))
    there, far = segment >= 0, jnp.iinfo(jnp.int32).max
    return Bounds(
        jnp.where(there, position, far).min(2),
        jnp.where(there, position, -far).max(2),
        jnp.where(there, segment, far).min(2),
        segment.max(2),
        there.all(2),
    )


def zigzag_order(length: int, ring: int) -> np.ndarray:
    """Returns order[length]: which token stands at place i so that ring shard r holds chunks r and 2 * ring - 1 - r.

    Under a causal mask every shard then has the same work. length 8, ring 2: [0 1 6 7 | 2 3 4 5].

    Raises:
        UsageError: 2 * ring does not divide length.
    """
    if length % (2 * ring):
        raise UsageError(
            f"the zigzag order cuts the sequence into 2 * ring = {2 * ring} equal chunks; got length={length}. "
            f"Pad the sequence to {-(-length // (2 * ring)) * 2 * ring} tokens."
        )
    chunks = np.arange(length).reshape(2 * ring, -1)
    return np.concatenate([chunks[[r, 2 * ring - 1 - r]].reshape(-1) for r in range(ring)])


def striped_order(length: int, ring: int) -> np.ndarray:
    """Returns order[length]: which token stands at place i so that ring shard r holds tokens r, r + ring, and so on.

    Striped Attention (2311.09431): under a causal mask every pair of shards then has the same work, a triangle of each
    hop. The zigzag order balances as well, but in whole rectangles. length 8, ring 2: [0 2 4 6 | 1 3 5 7].

    Raises:
        UsageError: ring does not divide length.
    """
    if length % ring:
        raise UsageError(
            f"the striped order gives all ring = {ring} shards the same number of tokens; got length={length}. "
            f"Pad the sequence to {-(-length // ring) * ring} tokens."
        )
    return np.arange(length).reshape(-1, ring).T.reshape(-1)


def inverse_order(order: np.ndarray) -> np.ndarray:
    """Returns the order that undoes `order`: `x[order][inverse_order(order)]` is x."""
    inverse = np.empty_like(order)
    inverse[order] = np.arange(len(order))
    return inverse
