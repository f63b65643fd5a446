"""A kernel that uses a library's attention, which supports only no mask or the causal triangle, for general masks.

On a ring that is enough: with a causal context in order or in zigzag order, the mask of each ring step has one of five
shapes, all made of full rectangles and the causal triangle. The shape of a mask is found at run time, from the smallest
and largest position and segment of its halves. A mask of any other shape is computed by the fallback kernel.
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

SHORTEST_PIECE = 64  # keys; fewer queries, as in decoding, do not determine the length of pieces
HIDDEN = 1e30  # an lse with which all weights of a query, exp(score - lse), are 0


@runtime_checkable
class Tile(Protocol):
    """Attention without a mask, or with key j visible to queries i >= j. Hashable. Its results may be rounded to the
    compute type."""

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
    """A shape of a mask: a rectangle of queries and keys, in units of halves of the arrays ([start, stop) of 0, 1, 2),
    which is fully or causally visible. Nothing outside of the rectangle is visible."""

    q: tuple[int, int] = (0, 2)
    k: tuple[int, int] = (0, 2)
    is_causal: bool = False  # causal by index; otherwise every query sees every key

    def of_q(self, x: Array, dimension: int = 1) -> Array:
        """Returns the rectangle's part of an array with queries in `dimension`."""
        return _halves(x, dimension, self.q)

    def of_k(self, x: Array) -> Array:
        """Returns the rectangle's part of an array of keys."""
        return _halves(x, 1, self.k)


NOTHING = _Shape((0, 0), (0, 0))
WHOLE = _Shape()
TRIANGLE = _Shape(is_causal=True)
FIRST_KEYS = _Shape(k=(0, 1))  # zigzag, keys of an earlier shard: their second half is later than all queries
LAST_QUERIES = _Shape(q=(1, 2))  # zigzag, keys of a later shard: only the second half of the queries sees them
SHAPES = (NOTHING, WHOLE, TRIANGLE, FIRST_KEYS, LAST_QUERIES)  # the order of lax.switch; the fallback comes last


class RectangleKernel(NamedTuple):
    """A kernel that computes masks of the five shapes with a tile, and others with a fallback kernel.

    All sequences of a batch must have the same shape. Padding among the queries fits any shape, because its results are
    dropped. Padding among the keys fits a shape only where no query would see it. If there are more keys than queries,
    as in all_gather, they are computed in pieces of the length of the queries: the shards from which they were
    gathered.
    """

    tile: Tile
    fallback: Kernel
    heads_first = False

    def residual_dtype(self, dtype: jnp.dtype) -> jnp.dtype:
        return dtype  # the backward of the library's kernels takes the output in this type

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
    """Returns the index in SHAPES of the shape that the mask has in all sequences, or len(SHAPES) if there is none."""
    q_length, k_length = mask.q_position.shape[1], mask.k_position.shape[1]
    # Odd lengths have no halves: then the tests of halves are the same as that of WHOLE, which comes first.
    has_halves = q_length % 2 == k_length % 2 == 0
    q_size, k_size = (q_length // 2, k_length // 2) if has_halves else (q_length, k_length)
    q_bounds, k_bounds = mask.q_bounds(q_size), mask.k_bounds(k_size)

    def of_row(test, q, k) -> Bool[Array, "2 2"]:
        return test(jax.tree.map(lambda x: x[None, :, None], q), jax.tree.map(lambda x: x[None, None], k))

    seen = jax.vmap(partial(of_row, mask.maybe_visible))(q_bounds, k_bounds).any(0)
    whole = jax.vmap(partial(of_row, mask.fully_visible))(_filled(mask).q_bounds(q_size), k_bounds)
    is_missing = q_bounds.low_position > q_bounds.high_position  # a half of only padding queries fits any shape
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
    """Returns the mask with padding queries moved to the latest position, so that they do not affect the shape."""
    there = mask.q_segment >= 0
    latest = jnp.where(there, mask.q_position, -jnp.iinfo(jnp.int32).max).max(1, keepdims=True)
    segment = mask.q_segment.max(1, keepdims=True)
    return replace(
        mask, q_position=jnp.where(there, mask.q_position, latest), q_segment=jnp.where(there, mask.q_segment, segment)
    )


def _is_triangle(mask: Mask) -> Bool[Array, ""]:
    """Returns whether queries and keys are the same tokens, of one segment, in order of position.

    Padding must come last: then no other query sees it, and its own results are dropped.
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
    """Returns whether arrays of these lengths cannot have the shape."""
    return (shape.is_causal and q.shape[1] != k.shape[1]) or (
        shape in (FIRST_KEYS, LAST_QUERIES) and bool(q.shape[1] % 2 or k.shape[1] % 2)
    )


def _there(mask: Mask) -> Bool[Array, "B 1 T"]:
    """Returns which queries are not padding."""
    return mask.q_segment[:, None] >= 0


def _halves(x: Array, dimension: int, part: tuple[int, int]) -> Array:
    start, stop = (x.shape[dimension] * half // 2 for half in part)
    return lax.slice_in_dim(x, start, stop, axis=dimension)


def _in_place(x: Array, dimension: int, part: tuple[int, int], length: int) -> Array:
    """Returns x at its place in an array of `length`, with 0 in the rest: the inverse of _halves()."""
    start, stop = (length * half // 2 for half in part)
    widths = [(start, length - stop) if d == dimension else (0, 0) for d in range(x.ndim)]
    return jnp.pad(x, widths)


def _piece(q: Float[Array, "B T N H"], k: Float[Array, "B S K H"]) -> int:
    """Returns the number of keys in a piece."""
    length, keys = q.shape[1], k.shape[1]
    return length if length >= SHORTEST_PIECE and keys % length == 0 else keys
