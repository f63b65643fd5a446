"""S2 attention (2407.17678): every head reads its own shard of the context, and the rest is not computed.

A query sees its near past in full, and every stride-th block of positions of the rest, with a different offset for each
key/value head. So the keys form two parts, each of which is computed by dense kernels:

    near   all keys in order, under a mask that is a band along the diagonal; tiles outside of the band are skipped
    far    the strided keys of each head, gathered once into a sequence that is shorter by the stride; causal

A key in both parts counts as near, so the parts are disjoint: the softmax over near keys continues over far keys, and
the gradients of the parts add up.

This is the paper's MergeQ: a tile of queries has several sparsity blocks and visits the union of the keys that they
see, with an elementwise mask. Each key is gathered once for all tiles of its head.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32, Shaped

from rlring.attention import band, blockwise
from rlring.attention.block_view import Bounds
from rlring.attention.blocks import Blocks
from rlring.attention.kernel import BackwardInputs, Gradients, no_gradients
from rlring.attention.mask import PADDING, Mask
from rlring.attention.score_mod import ScoreMod
from rlring.attention.softmax import PartialAttention, accumulator_type
from rlring.attention.sparse_pattern import SparsePattern, check_mask

SMALLEST_TILE = 64  # tokens; smaller products cost more than the skipped scores save


class SparseKernel(NamedTuple):
    """The kernel of a SparsePattern: attention over the keys that both the mask and the pattern show, without a bias.

    Exact for any order of the tokens; fast if neighbouring tokens have neighbouring positions.
    """

    pattern: SparsePattern
    blocks: Blocks
    kv_heads: int  # key/value heads of all devices together
    axis: str | None = None  # the mesh axis over which the heads are split
    heads_first = False

    def residual_dtype(self, dtype: jnp.dtype) -> jnp.dtype:
        return accumulator_type(dtype)

    def forward(self, q, k, v, mask: Mask, mod: ScoreMod, before: None = None) -> PartialAttention:
        near = band.forward(q, k, v, _NearMask.of(mask, self.pattern), mod, *self.near_cut())
        far, far_blocks = self._far(mask, k), self.far_blocks(k.shape[1])

        def add(chunk, total: PartialAttention) -> PartialAttention:
            keys = far.keys(chunk)
            seen = far.mask(mask, keys, self.pattern)
            return blockwise.forward(q, keys.take(k), keys.take(v), seen, mod, far_blocks, total)

        return lax.fori_loop(0, far.chunks, add, near)

    def backward(self, q, k, v, mask: Mask, mod: ScoreMod, inputs: BackwardInputs, before: None = None) -> Gradients:
        near = band.backward(q, k, v, _NearMask.of(mask, self.pattern), mod, inputs, *self.near_cut())
        far, far_blocks = self._far(mask, k), self.far_blocks(k.shape[1])

        def add(chunk, total: Gradients) -> Gradients:
            keys = far.keys(chunk)
            seen = far.mask(mask, keys, self.pattern)
            here = keys.take(k), keys.take(v)
            before = no_gradients(q, *here)._replace(dq=total.dq, mod=total.mod)
            found = blockwise.backward(q, *here, seen, mod, inputs, far_blocks, before)
            dk, dv = far.add(total.dk, found.dk, chunk), far.add(total.dv, found.dv, chunk)
            return found._replace(dk=dk, dv=dv)

        return lax.fori_loop(0, far.chunks, add, near)

    def near_cut(self) -> tuple[int, int]:
        """Returns the tile size, small enough that tiles do not extend far beyond the band, and the number of scores
        held at once."""
        tile = max(SMALLEST_TILE, self.pattern.local_blocks * self.pattern.block // 8)
        return min(self.blocks.q, self.blocks.k, tile), self.blocks.scores // 4

    def _far(self, mask: Mask, k: Float[Array, "B S K H"]) -> "_Far":
        heads = jnp.arange(k.shape[2], dtype=jnp.int32)
        if self.axis is not None:  # ulysses_attention() copies key/value heads if there are fewer than devices
            copies = k.shape[2] * lax.axis_size(self.axis) // self.kv_heads
            heads = (heads + lax.axis_index(self.axis) * k.shape[2]) // copies
        return _Far.of(mask, heads, self.kv_heads, self.pattern)

    def far_blocks(self, length: int) -> Blocks:
        """Returns blocks with few keys and many queries. The stride makes the diagonal flat, so such blocks extend less
        above it."""
        k = min(self.blocks.k, max(2 * SMALLEST_TILE, length // self.pattern.stride // 16))
        return self.blocks._replace(q=self.blocks.q * self.blocks.k // k, k=k)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _NearMask(Mask):
    """A causal mask limited to the last local_blocks blocks of positions."""

    pattern: SparsePattern = field(default=SparsePattern(), metadata={"static": True})

    @classmethod
    def of(cls, mask: Mask, pattern: SparsePattern) -> "_NearMask":
        return mask.as_kind(cls, pattern=pattern)

    def visible(self) -> Bool[Array, "B T S"]:
        return super().visible() & self.pattern.is_near(self.q_position[:, :, None], self.k_position[:, None, :])

    def maybe_visible(self, q: Bounds, k: Bounds) -> Bool[Array, "..."]:
        # any() over rows separately from the other conditions: rows with different bounds may visit unneeded blocks.
        near = self.pattern.is_near(q.low_position, k.high_position).any(0)
        return super().maybe_visible(q, k) & near

    def fully_visible(self, q: Bounds, k: Bounds) -> Bool[Array, "..."]:
        return super().fully_visible(q, k) & self.pattern.is_near(q.high_position, k.low_position).all(0)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class HeldMask(Mask):
    """A causal mask over the slots of a sparse cache, which hold near keys first and then strided keys.

    A key in both parts is seen once. For decoding a few queries as one block, so it skips no blocks.
    """

    pattern: SparsePattern = field(default=SparsePattern(), metadata={"static": True})
    near: int = field(default=0, metadata={"static": True})  # number of near slots

    @classmethod
    def of(cls, mask: Mask, pattern: SparsePattern, near: int) -> "HeldMask":
        check_mask(mask)
        return mask.as_kind(cls, pattern=pattern, near=near)

    def visible(self) -> Bool[Array, "B T S"]:
        is_near = self.pattern.is_near(self.q_position[:, :, None], self.k_position[:, None, :])
        return super().visible() & (is_near == (jnp.arange(self.k_position.shape[1]) < self.near)[None, None])


def _strided(mask: Mask, heads: Int32[Array, "K"], kv_heads: int, pattern: SparsePattern) -> Bool[Array, "R S"]:
    block = mask.k_position[:, None, :] // pattern.block
    is_strided = pattern.is_strided(block, heads[None, :, None], kv_heads=kv_heads) & (mask.k_segment >= 0)[:, None, :]
    return is_strided.reshape(-1, is_strided.shape[2])


class _FarKeys(NamedTuple):
    """The strided keys of each row in one chunk: their places in the sequence, and which entries are real."""

    place: Int32[Array, "R C"]
    is_there: Bool[Array, "R C"]  # False: padding, because the row has fewer strided keys

    def take(self, x: Float[Array, "B S K H"]) -> Float[Array, "B C K H"]:
        """Returns these keys or values."""
        return _taken(x, _by_token(self.place, x.shape[2]))

    def mask(self, mask: Mask) -> Mask:
        """Returns the mask of these keys, with R rows."""
        mask = mask.repeated(self.place.shape[0] // mask.rows)
        mask = mask.map_keys(lambda x: jnp.take_along_axis(x, self.place, 1))
        return replace(mask, k_segment=jnp.where(self.is_there, mask.k_segment, PADDING))


def _taken(x: Float[Array, "B S K H"], place: Int32[Array, "B C K"]) -> Float[Array, "B C K H"]:
    """Returns the entries of x at `place`, which has different places for each head."""
    return jnp.take_along_axis(x, place[..., None], 1, mode="clip")


def _by_token(x: Shaped[Array, "R C"], heads: int) -> Shaped[Array, "B C K"]:
    """Returns an array of rows [R, C] as an array of tokens and heads [B, C, K]."""
    return jnp.swapaxes(x.reshape(-1, heads, x.shape[1]), 1, 2)


class _Far(NamedTuple):
    """The strided keys of each row, in the order of their places.

    They are computed in chunks. A chunk has room for the strided keys of one sequence with positions 0, 1, 2, ...; a
    second chunk is needed only if there are more, for example with many short packed sequences.
    """

    is_strided: Bool[Array, "R S"]
    count: Int32[Array, "R S"]  # number of strided keys up to and including each place
    size: int  # keys per chunk

    @classmethod
    def of(cls, mask: Mask, heads: Int32[Array, "K"], kv_heads: int, pattern: SparsePattern) -> "_Far":
        is_strided, length = _strided(mask, heads, kv_heads, pattern), mask.k_position.shape[1]
        blocks = -(-length // pattern.block)
        size = -(-blocks // pattern.stride) * pattern.block
        return cls(is_strided, jnp.cumsum(is_strided, 1, dtype=jnp.int32), min(size, length))

    @property
    def chunks(self) -> Int32[Array, ""]:
        return -(-self.count[:, -1].max() // self.size)

    def keys(self, chunk: Int32[Array, ""]) -> _FarKeys:
        """Returns the keys of one chunk."""
        number = chunk * self.size + jnp.arange(1, self.size + 1, dtype=jnp.int32)
        place = jax.vmap(lambda count: jnp.searchsorted(count, number))(self.count)
        length = self.count.shape[1]
        return _FarKeys(jnp.minimum(place, length - 1).astype(jnp.int32), place < length)

    def add(
        self, total: Float[Array, "B S K H"], x: Float[Array, "B C K H"], chunk: Int32[Array, ""]
    ) -> Float[Array, "B S K H"]:
        """Returns the total with `x`, the gradients of one chunk of keys, added."""
        place = self.count - 1 - chunk * self.size
        is_here = self.is_strided & (place >= 0) & (place < self.size)
        place, is_here = (_by_token(x, total.shape[2]) for x in (place, is_here))
        # A gather, because a scatter is slow if XLA cannot know that no two indices are equal.
        return total + jnp.where(is_here[..., None], _taken(x, jnp.clip(place, 0, self.size - 1)), 0.0)

    def mask(self, mask: Mask, keys: _FarKeys, pattern: SparsePattern) -> "_FarMask":
        """Returns the mask of all queries over these keys, with R rows."""
        return keys.mask(mask).as_kind(_FarMask, pattern=pattern)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _FarMask(Mask):
    """A causal mask limited to positions before the last local_blocks blocks."""

    pattern: SparsePattern = field(default=SparsePattern(), metadata={"static": True})

    def visible(self) -> Bool[Array, "B T S"]:
        blocks = replace(self, q_position=self._last_far(self.q_position), k_position=self._block(self.k_position))
        return Mask.visible(blocks)

    def maybe_visible(self, q: Bounds, k: Bounds) -> Bool[Array, "..."]:
        return super().maybe_visible(_in_blocks(q, self._last_far), _in_blocks(k, self._block))

    def fully_visible(self, q: Bounds, k: Bounds) -> Bool[Array, "..."]:
        return super().fully_visible(_in_blocks(q, self._last_far), _in_blocks(k, self._block))

    def _block(self, position: Int32[Array, "..."]) -> Int32[Array, "..."]:
        return position // self.pattern.block

    def _last_far(self, position: Int32[Array, "..."]) -> Int32[Array, "..."]:
        """Returns the last block that queries at these positions see as far keys."""
        return self._block(position) - self.pattern.local_blocks


def _in_blocks(bounds: Bounds, block: Callable[[Array], Array]) -> Bounds:
    return bounds._replace(low_position=block(bounds.low_position), high_position=block(bounds.high_position))
