"""A kernel that knows only whole rectangles and the causal triangle, under masks of positions and segments.

Such is the hardware's own attention, and such is what a ring really asks for: the hops of a causal context in the order
of time or in the zigzag order are one of five shapes. Which one a mask has is found out when it runs, from the least
and greatest position and segment of its halves. Nothing is assumed: what is none of the five goes to the fallback.
"""

from dataclasses import replace
from functools import partial
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int32

from rlring.attention.kernel import BackwardInputs, Gradients, Kernel, no_gradients
from rlring.attention.kernels.pieces import backward_by_pieces, forward_by_pieces
from rlring.attention.mask import Mask
from rlring.attention.score_mod import ScoreMod
from rlring.attention.softmax import PartialAttention, by_token, nothing
from rlring.attention.window import MOST, is_within

SHORTEST_PIECE = 64  # keys; a few queries, as of a decoder, are no shard
HIDDEN = 1e30  # as the lse of a query: its weights, exp(score - lse), are 0


@runtime_checkable
class Tile(Protocol):
    """Attention without a mask, or with key j seen from query i >= j. Hashable. What it returns may be rounded."""

    def forward(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K H"],
        v: Float[Array, "B S K H"],
        *,
        scale: float,
        is_causal: bool,
    ) -> tuple[Float[Array, "B T N H"], Float32[Array, "B N T"]]:
        """Returns out and lse."""
        ...

    def backward(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K H"],
        v: Float[Array, "B S K H"],
        out: Float[Array, "B T N H"],
        lse: Float32[Array, "B N T"],
        d_out: Float[Array, "B T N H"],
        *,
        scale: float,
        is_causal: bool,
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K H"]]:
        """Returns dq, dk and dv from the out and lse over all keys."""
        ...


class _Shape(NamedTuple):
    """Some of the queries and some of the keys, in halves of what there is: [start, stop) of 0, 1, 2."""

    q: tuple[int, int] = (0, 2)
    k: tuple[int, int] = (0, 2)
    is_causal: bool = False  # by place; else every query sees every key

    def of_q(self, x: Array, dimension: int = 1) -> Array:
        """Returns these queries of an array with T in this dimension."""
        return _halves(x, dimension, self.q)

    def of_k(self, x: Array) -> Array:
        """Returns these keys."""
        return _halves(x, 1, self.k)


NOTHING = _Shape((0, 0), (0, 0))
WHOLE = _Shape()
TRIANGLE = _Shape(is_causal=True)
FIRST_KEYS = _Shape(k=(0, 1))  # zigzag, keys from earlier: their second half is later than all queries
LAST_QUERIES = _Shape(q=(1, 2))  # zigzag, keys from later: seen from the second half of the queries only
SHAPES = (NOTHING, WHOLE, TRIANGLE, FIRST_KEYS, LAST_QUERIES)  # in the order of lax.switch; then the fallback


class RectangleKernel(NamedTuple):
    """The kernel made of a tile. All sequences of the batch share one decision.

    Queries that are nowhere (padding) disturb no shape: what the tile finds for them is dropped. Keys that are nowhere
    go with a shape only where no query sees them anyway. More keys than queries, as all_gather has them, are taken in
    pieces as long as the queries, the shards that they came from.
    """

    tile: Tile
    fallback: Kernel
    heads_first = False

    def residual_dtype(self, dtype: jnp.dtype) -> jnp.dtype:
        return dtype  # the library's kernels take it so

    def forward(self, q, k, v, mask: Mask, mod: ScoreMod, before: PartialAttention | None = None) -> PartialAttention:
        def attend(k, v, mask: Mask) -> PartialAttention:
            branches = [_forward(self.tile, mod.scale, shape) for shape in SHAPES]
            return lax.switch(shape_of(mask), [*branches, self._rest_forward(mod)], q, k, v, mask)

        return forward_by_pieces(attend, q, k, v, mask, before, _piece(q, k))

    def backward(
        self, q, k, v, mask: Mask, mod: ScoreMod, inputs: BackwardInputs, before: Gradients | None = None
    ) -> Gradients:
        def differentiate(k, v, mask: Mask) -> Gradients:
            branches = [_backward(self.tile, mod.scale, shape) for shape in SHAPES]
            arrays = (q, k, v, mask, inputs)
            return lax.switch(shape_of(mask), [*branches, self._rest_backward(mod)], *arrays)

        return backward_by_pieces(differentiate, q, k, v, mask, before, _piece(q, k))

    def _rest_forward(self, mod: ScoreMod):
        return lambda q, k, v, mask: self.fallback.forward(q, k, v, mask, mod)

    def _rest_backward(self, mod: ScoreMod):
        return lambda q, k, v, mask, inputs: self.fallback.backward(q, k, v, mask, mod, inputs)


def shape_of(mask: Mask) -> Int32[Array, ""]:
    """Returns which of SHAPES the mask has in all sequences, or len(SHAPES)."""
    q_length, k_length = mask.q_position.shape[1], mask.k_position.shape[1]
    # Without a middle there is one half: the tests of halves are then those of the whole, which comes before them.
    has_halves = q_length % 2 == k_length % 2 == 0
    q_size, k_size = (q_length // 2, k_length // 2) if has_halves else (q_length, k_length)
    q_bounds, k_bounds = mask.q_bounds(q_size), mask.k_bounds(k_size)

    def of_row(test, q, k) -> Bool[Array, "2 2"]:
        return test(jax.tree.map(lambda x: x[None, :, None], q), jax.tree.map(lambda x: x[None, None], k))

    seen = jax.vmap(partial(of_row, mask.maybe_visible))(q_bounds, k_bounds).any(0)
    whole = jax.vmap(partial(of_row, mask.fully_visible))(_filled(mask).q_bounds(q_size), k_bounds)
    is_missing = q_bounds.low_position > q_bounds.high_position  # a half without a query goes with any shape
    whole = (whole | is_missing[:, :, None]).all(0)
    tests = {
        NOTHING: ~seen.any(),
        WHOLE: whole.all(),
        TRIANGLE: _is_triangle(mask),
        FIRST_KEYS: whole[:, 0].all() & ~seen[:, 1:].any(),
        LAST_QUERIES: whole[-1].all() & ~seen[:-1].any(),
    }
    return jnp.argmax(jnp.stack([*(tests[shape] for shape in SHAPES), jnp.array(True)])).astype(jnp.int32)


def _filled(mask: Mask) -> Mask:
    """Returns the mask with the queries that are nowhere put where the latest one is: they are not to decide."""
    there = mask.q_segment >= 0
    latest = jnp.where(there, mask.q_position, -jnp.iinfo(jnp.int32).max).max(1, keepdims=True)
    segment = mask.q_segment.max(1, keepdims=True)
    return replace(
        mask, q_position=jnp.where(there, mask.q_position, latest), q_segment=jnp.where(there, mask.q_segment, segment)
    )


def _is_triangle(mask: Mask) -> Bool[Array, ""]:
    """Returns whether queries and keys are the same tokens, of one segment, each later than the one before it.

    The tokens that are nowhere are the last ones: no other query sees them, and what they see is dropped.
    """
    position, segment = mask.k_position, mask.k_segment
    if not mask.is_causal or mask.q_position.shape != position.shape:
        return jnp.array(False)
    there = segment >= 0
    same = (mask.q_segment == segment) & ((mask.q_position == position) | ~there)
    follows = there[:, :-1] & (position[:, :-1] < position[:, 1:]) & (segment[:, :-1] == segment[:, 1:])
    is_triangle = same.all() & (follows | ~there[:, 1:]).all()
    reach, _ = mask.reach
    if reach is not None:
        latest, earliest = jnp.where(there, position, -MOST).max(1), jnp.where(there, position, MOST).min(1)
        is_triangle &= is_within(latest, earliest, reach).all()
    return is_triangle


def _forward(tile: Tile, scale: float, shape: _Shape):
    def attend(q, k, v, mask: Mask) -> PartialAttention:
        if shape == NOTHING or _is_missing(shape, q, k):
            return nothing(q, v)
        arrays = shape.of_q(q), shape.of_k(k), shape.of_k(v)
        out, lse = tile.forward(*arrays, scale=scale, is_causal=shape.is_causal)
        there = shape.of_q(_there(mask), 2)
        out = jnp.where(by_token(there), out.astype(jnp.float32), 0.0)
        seen = PartialAttention.of(out, jnp.where(there, lse, -jnp.inf))
        return PartialAttention(*(_in_place(x, d, shape.q, q.shape[1]) for x, d in zip(seen, (1, 2, 2), strict=True)))

    return attend


def _backward(tile: Tile, scale: float, shape: _Shape):
    def differentiate(q, k, v, mask: Mask, inputs: BackwardInputs) -> Gradients:
        if shape == NOTHING or _is_missing(shape, q, k):
            return no_gradients(q, k, v)
        there = _there(mask)
        lse = jnp.where(there, inputs.whole.lse, HIDDEN)
        d_out = jnp.where(by_token(there), inputs.d_out, 0).astype(q.dtype)
        of_q = shape.of_q(inputs.out.astype(q.dtype)), shape.of_q(lse, 2), shape.of_q(d_out)
        arrays = shape.of_q(q), shape.of_k(k), shape.of_k(v), *of_q
        dq, dk, dv = tile.backward(*arrays, scale=scale, is_causal=shape.is_causal)
        dq, dk, dv = (x.astype(jnp.float32) for x in (dq, dk, dv))
        dk, dv = (_in_place(x, 1, shape.k, k.shape[1]) for x in (dk, dv))
        return Gradients(_in_place(dq, 1, shape.q, q.shape[1]), dk, dv)

    return differentiate


def _is_missing(shape: _Shape, q, k) -> bool:
    """Returns whether arrays of these lengths never have the shape."""
    return (shape.is_causal and q.shape[1] != k.shape[1]) or (
        shape in (FIRST_KEYS, LAST_QUERIES) and bool(q.shape[1] % 2 or k.shape[1] % 2)
    )


def _there(mask: Mask) -> Bool[Array, "B 1 T"]:
    """Returns which queries are somewhere."""
    return mask.q_segment[:, None] >= 0


def _halves(x: Array, dimension: int, part: tuple[int, int]) -> Array:
    start, stop = (x.shape[dimension] * half // 2 for half in part)
    return lax.slice_in_dim(x, start, stop, axis=dimension)


def _in_place(x: Array, dimension: int, part: tuple[int, int], length: int) -> Array:
    """Returns the inverse of _halves, with 0 in the rest."""
    start, stop = (length * half // 2 for half in part)
    widths = [(start, length - stop) if d == dimension else (0, 0) for d in range(x.ndim)]
    return jnp.pad(x, widths)


def _piece(q: Float[Array, "B T N H"], k: Float[Array, "B S K H"]) -> int:
    """Returns how many keys are one piece."""
    length, keys = q.shape[1], k.shape[1]
    return length if length >= SHORTEST_PIECE and keys % length == 0 else keys
