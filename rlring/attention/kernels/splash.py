"""The TPU kernel: JAX's splash attention, whose masks depend on indices, for masks of positions and segments.

If the keys are in order of (segment, position), each query sees an interval of them, for all segments, windows, ties
and token orders. So a mask is two integers per query, and a block of keys outside of all intervals of a block of
queries is neither fetched nor computed.

Keys that are not in this order, such as a gathered context in zigzag order, are sorted first. The keys of one shard are
already in order if the tokens are in order of time, in zigzag or striped order, or packed one sequence after another.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int32, UInt32

from rlring.attention.blocks import Blocks, pad
from rlring.attention.kernel import BackwardInputs, Gradients
from rlring.attention.kernels.pieces import backward_by_pieces, forward_by_pieces
from rlring.attention.mask import Mask
from rlring.attention.score_mod import ScoreMod
from rlring.attention.softmax import PartialAttention, finite

DTYPES = (jnp.float32, jnp.bfloat16)
LANES = 128  # lanes of a TPU's vectors; block sizes are multiples of it
PLACE_BITS = 15  # bits of the start of an interval, so that start and stop fit into one integer
LONGEST = 2**PLACE_BITS  # keys in one call; more keys need several calls
COMPUTED = 512  # keys of a block that are computed at once: their scores have to fit into the vector memory
FIRST, LAST = jnp.iinfo(jnp.int32).min, jnp.iinfo(jnp.int32).max  # the smallest and largest position


class SplashKernel(NamedTuple):
    """The kernel for TPUs: masks of positions, segments and windows, any length and head size, float32 and bfloat16.

    The lse and all sums are float32. With bfloat16 arrays, the scaled queries and the output, dq, dk and dv of one call
    are rounded to bfloat16, because the library's kernels do so. The results of the calls of a ring are summed in
    float32.
    """

    blocks: Blocks
    interpret: bool = False  # runs on any device, slowly: for tests
    heads_first = True

    def residual_dtype(self, dtype: jnp.dtype) -> jnp.dtype:
        return dtype  # the backward of the library's kernels takes the output in this type

    def forward(self, q, k, v, mask: Mask, mod: ScoreMod, before: PartialAttention | None = None) -> PartialAttention:
        def attend(k, v, mask: Mask) -> PartialAttention:
            keys = _Keys.in_order(k, v, mask)
            one = partial(_forward, mod=mod, tiles=_Tiles.of(self.blocks, q, k), interpret=self.interpret)
            out, lse = _by_sequence(one, (q, keys.k, keys.v), keys.seen())
            return PartialAttention.of(out.astype(jnp.float32), lse)

        return forward_by_pieces(attend, q, k, v, mask, before, LONGEST)

    def backward(
        self, q, k, v, mask: Mask, mod: ScoreMod, inputs: BackwardInputs, before: Gradients | None = None
    ) -> Gradients:
        d_out, lse, delta = inputs.d_out.astype(q.dtype), finite(inputs.whole.lse), inputs.delta

        def differentiate(k, v, mask: Mask) -> Gradients:
            keys = _Keys.in_order(k, v, mask)
            one = partial(_backward, mod=mod, tiles=_Tiles.of(self.blocks, q, k), interpret=self.interpret)
            dq, dk, dv = _by_sequence(one, (q, keys.k, keys.v, lse, delta, d_out), keys.seen())
            return Gradients(dq, keys.back(dk), keys.back(dv))

        return backward_by_pieces(differentiate, q, k, v, mask, before, LONGEST)


def _by_sequence(function: Callable, arrays, seen: "_Interval"):
    """Returns function(*arrays, seen) for each sequence, one after the other."""
    every = (*arrays, seen)
    if arrays[0].shape[0] == 1:
        return jax.tree.map(lambda x: x[None], function(*jax.tree.map(lambda x: x[0], every)))
    return lax.map(lambda one: function(*one), every)


class _Interval(NamedTuple):
    """The keys that each query sees: from index start up to, but not including, index stop."""

    start: Int32[Array, "*batch T"]
    stop: Int32[Array, "*batch T"]


class _Keys(NamedTuple):
    """Keys and values in order of (segment, position), padding last."""

    k: Float[Array, "B S K H"]
    v: Float[Array, "B S K H"]
    mask: Mask  # with the keys in their original order, because counting keys does not depend on the order
    is_ordered: Bool[Array, ""]  # the original order was already this one
    place: Int32[Array, "B S"]  # the new index of each key

    @classmethod
    def in_order(cls, k, v, mask: Mask) -> "_Keys":
        segment, position = _segment(mask), mask.k_position
        before, after = (segment[:, :-1], position[:, :-1]), (segment[:, 1:], position[:, 1:])
        is_ordered = (_precedes(before, after, or_ties=True) | (after[0] > LAST)).all()

        def counted():
            other, one = (tuple(jnp.expand_dims(x, d) for x in (segment, position)) for d in (1, 2))
            places = jnp.arange(k.shape[1], dtype=jnp.int32)
            tied = (other[0] == one[0]) & (other[1] == one[1]) & (places[None, None] < places[None, :, None])
            return (_precedes(other, one) | tied).sum(2, dtype=jnp.int32)

        def as_they_are():
            return jnp.broadcast_to(jnp.arange(k.shape[1], dtype=jnp.int32), segment.shape)

        place = lax.cond(is_ordered, as_they_are, counted)

        def ordered(x):
            which = jax.vmap(lambda place: jnp.zeros_like(place).at[place].set(as_they_are()[0]))(place)
            return _taken(x, which)

        k, v = lax.cond(is_ordered, lambda *kv: kv, lambda *kv: tuple(ordered(x) for x in kv), k, v)
        return cls(k, v, mask, is_ordered, place)

    def back(self, x: Float[Array, "B S K H"]) -> Float32[Array, "B S K H"]:
        """Returns x, an array of the ordered keys, in the original order of the keys."""
        return lax.cond(self.is_ordered, lambda x: x, lambda x: _taken(x, self.place), x).astype(jnp.float32)

    def seen(self) -> _Interval:
        """Returns the interval of ordered keys that each query sees.

        The bounds are counts of preceding keys. The comparisons are summed without being stored, which takes little
        time compared with attention, whereas a sort takes seconds to compile for a TPU.
        """
        mask = self.mask
        key = tuple(x[:, None, :] for x in (_segment(mask), mask.k_position))
        q_segment, q_position = mask.q_segment.astype(jnp.uint32)[:, :, None], mask.q_position[:, :, None]
        back, ahead = (None if side is None else side - 1 for side in mask.reach)
        first = FIRST if back is None else jnp.maximum(q_position, FIRST + back) - back
        start = _precedes(key, (q_segment, first)).sum(2, dtype=jnp.int32)
        last = LAST if ahead is None else jnp.minimum(q_position, LAST - ahead) + ahead
        last = q_position if mask.is_causal else last
        stop = _precedes(key, (q_segment, last), or_ties=True).sum(2, dtype=jnp.int32)
        is_empty = (start >= stop) | (mask.q_segment < 0)
        return _Interval(*(jnp.where(is_empty, 0, x) for x in (start, stop)))


def _segment(mask: Mask) -> UInt32[Array, "B S"]:
    """Returns the segments of the keys as uint32, in which padding (-1) comes after all others."""
    return mask.k_segment.astype(jnp.uint32)


def _precedes(a, b, *, or_ties: bool = False) -> Bool[Array, "..."]:
    """Returns whether a = (segment, position) is before b."""
    earlier = a[1] <= b[1] if or_ties else a[1] < b[1]
    return (a[0] < b[0]) | ((a[0] == b[0]) & earlier)


def _taken(x: Float[Array, "B S K H"], which: Int32[Array, "B S"]) -> Float[Array, "B S K H"]:
    return jnp.take_along_axis(x, which[:, :, None, None], axis=1)


# The code below is for one sequence, q[T, N, H] and k[S, K, H]. The library's kernels want heads first.


class _Tiles(NamedTuple):
    """The block sizes of the kernel, and the padded lengths, which are multiples of them."""

    q: int
    k: int
    q_length: int
    k_length: int

    @classmethod
    def of(cls, blocks: Blocks, q: Float[Array, "B T N H"], k: Float[Array, "B S K H"]) -> "_Tiles":
        def up(length: int, unit: int) -> int:
            return -(-length // unit) * unit

        q_length, k_length = q.shape[1], k.shape[1]
        q_block, k_block = min(up(blocks.q, LANES), up(q_length, LANES)), min(up(blocks.k, LANES), up(k_length, LANES))
        return cls(q_block, k_block, up(q_length, q_block), up(k_length, k_block))

    @property
    def computed(self) -> int:
        """The number of keys of a block that are computed at once."""
        return next(n for n in range(min(COMPUTED, self.k), 0, -LANES) if self.k % n == 0)

    def queries(self, q: Float[Array, "T N H"]) -> Float[Array, "N padded H"]:
        return pad(_swapped(q), 1, self.q_length)

    def numbers(self, x: Float32[Array, "N T"]) -> Float32[Array, "N padded"]:
        return pad(x, 1, self.q_length)

    def keys(self, k: Float[Array, "S K H"]) -> Float[Array, "K padded H"]:
        return pad(_swapped(k), 1, self.k_length)

    def masks(self, seen: _Interval):
        """Returns two MaskInfo of the library: for kernels whose inner loop is over keys, and over queries."""
        from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

        start, stop = (pad(x, 0, self.q_length) for x in seen)
        packed = (stop << PLACE_BITS) | start
        by_block = jnp.where(stop > 0, start, LONGEST), stop
        first, last = (x.reshape(-1, self.q) for x in by_block)
        block = jnp.arange(0, self.k_length, self.k)[None]
        is_seen = (first.min(1)[:, None] < block + self.k) & (last.max(1)[:, None] > block)

        def mask_info(next_block):
            return MaskInfo(_small(next_block)[None], None, is_seen.astype(jnp.int8)[None], None, packed)

        return mask_info(_next_seen(is_seen)), mask_info(_next_seen(is_seen.T).T)


def _next_seen(is_seen: Bool[Array, "outer inner"]) -> Int32[Array, "outer inner"]:
    """Returns, for each pair of blocks, the next inner block to be computed, which a kernel fetches in advance."""
    places = jnp.arange(is_seen.size, dtype=jnp.int32)
    following = lax.cummin(jnp.where(is_seen.reshape(-1), places, is_seen.size), reverse=True)
    return jnp.where(following < is_seen.size, following % is_seen.shape[1], 0).reshape(is_seen.shape)


def _small(blocks: Int32[Array, "..."]) -> Array:
    """Returns block indices in the smallest integer type that holds them, because scalar memory is scarce."""
    most = max(blocks.shape)
    return blocks.astype(jnp.int8 if most <= 2**7 else jnp.int16 if most <= 2**15 else jnp.int32)


def _is_seen(interval: Int32[Array, "q k"], place: Int32[Array, "q k"]) -> Bool[Array, "q k"]:
    return (place >= (interval & (LONGEST - 1))) & (place < (interval >> PLACE_BITS))


def _precision(q: Array):
    """Returns the matmul-precision context in which the library's kernels are called.

    Products of bfloat16 are exact in float32, and the TPU compiler rejects a request for higher precision.
    """
    return jax.default_matmul_precision("default") if q.dtype == jnp.bfloat16 else nullcontext()


def _scaled(q: Array, mod: ScoreMod) -> Array:
    return q * mod.scale  # the library does not scale the scores


def _forward(q, k, v, seen: _Interval, *, mod: ScoreMod, tiles: _Tiles, interpret: bool) -> tuple[Array, Array]:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

    length, (mask, _) = q.shape[0], tiles.masks(seen)
    with _precision(q):
        out, (lse,) = splash._splash_attention_forward(
            mask,
            tiles.queries(_scaled(q, mod)),
            tiles.keys(k),
            tiles.keys(v),
            None,  # segments
            None,  # sinks
            mask_value=splash.DEFAULT_MASK_VALUE,
            is_mqa=False,
            block_sizes=splash.BlockSizes(block_q=tiles.q, block_kv=tiles.k, block_kv_compute=tiles.computed),
            residual_checkpoint_name=None,
            attn_logits_soft_cap=mod.soft_cap,
            save_residuals=True,
            mask_function=_is_seen,
            interpret=interpret,
        )
    # For a query that sees no key, the library returns a mean over hidden values, or NaN.
    is_empty = seen.stop == 0
    out, lse = out[:, :length], lse[:, :length]
    return _swapped(jnp.where(is_empty[:, None], 0.0, out)), jnp.where(is_empty, -jnp.inf, lse)


def _backward(q, k, v, lse, delta, d_out, seen: _Interval, *, mod: ScoreMod, tiles: _Tiles, interpret: bool):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

    length, (by_key, by_query) = q.shape[0], tiles.masks(seen)
    of_q = tiles.numbers(lse), tiles.queries(d_out), tiles.numbers(delta)
    arrays = (tiles.queries(_scaled(q, mod)), tiles.keys(k), tiles.keys(v), None, None, *of_q)
    layout = splash.QKVLayout.HEAD_DIM_MINOR
    both = {
        "bq": tiles.q,
        "is_mqa": False,
        "mask_value": splash.DEFAULT_MASK_VALUE,
        "attn_logits_soft_cap": mod.soft_cap,
        "q_layout": layout,
        "k_layout": layout,
        "v_layout": layout,
        "mask_function": _is_seen,
        "interpret": interpret,
    }
    with _precision(q):
        _, dk, dv = splash._splash_attention_bwd_dkv(
            *arrays, bkv=tiles.k, bkv_compute=tiles.computed, mask_info=by_query, use_fused_bwd_kernel=False, **both
        )
        dq = splash._splash_attention_bwd_dq(*arrays, bkv=tiles.k, mask_info=by_key, **both)
    dq = dq[:, :length].astype(jnp.float32) * mod.scale
    return tuple(_swapped(x) for x in (dq, dk[:, : k.shape[0]], dv[:, : k.shape[0]]))


def _swapped(x: Float[Array, "T N H"]) -> Float[Array, "N T H"]:
    """Returns x with the axes of tokens and heads swapped."""
    return jnp.swapaxes(x, 0, 1)
