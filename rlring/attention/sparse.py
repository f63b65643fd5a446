"""S2 attention (2407.17678): every head reads its own shard of the context, and what it does not read is not computed.

A query sees its near past in full, and of the rest every stride-th block of positions, another one for each key/value
head. So the keys fall into two parts, each of which is a dense problem for blockwise.forward() and backward():

    near   all keys in their order, seen through a band along the diagonal: tiles outside of the band are not visited
    far    the strided keys of each head, gathered once into a sequence that is shorter by the stride, and seen causally

A key that is both belongs to near, so the parts are disjoint: the softmax over near goes on over far, and their
gradients add up.
That is the paper's MergeQ: a tile of queries holds as many sparsity blocks as fit, what it visits is the union of what
they see, a mask per entry does the rest, and each key is gathered once for all tiles of its head.
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

SMALLEST_TILE = 64  # tokens; products of less cost more than the scores they save


class SparseKernel(NamedTuple):
    """The kernel of a pattern: attention over the keys that both the mask and the pattern show, without a bias.

    Exact for any layout of the tokens; fast where neighbours in the layout are neighbours in position.
    """

    pattern: SparsePattern
    blocks: Blocks
    kv_heads: int  # of all devices
    axis: str | None = None  # of the mesh, over which the heads are split
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
        """Returns tiles of which not too much lies outside of the band, and how many scores are held at once."""
        tile = max(SMALLEST_TILE, self.pattern.local_blocks * self.pattern.block // 8)
        return min(self.blocks.q, self.blocks.k, tile), self.blocks.scores // 4

    def _far(self, mask: Mask, k: Float[Array, "B S K H"]) -> "_Far":
        heads = jnp.arange(k.shape[2], dtype=jnp.int32)
        if self.axis is not None:  # ulysses_attention copies the key/value heads where there are fewer than devices
            copies = k.shape[2] * lax.axis_size(self.axis) // self.kv_heads
            heads = (heads + lax.axis_index(self.axis) * k.shape[2]) // copies
        return _Far.of(mask, heads, self.kv_heads, self.pattern)

    def far_blocks(self, length: int) -> Blocks:
        """Returns tiles of which not too much lies above the diagonal, which the stride has made flat: so are they."""
        k = min(self.blocks.k, max(2 * SMALLEST_TILE, length // self.pattern.stride // 16))
        return self.blocks._replace(q=self.blocks.q * self.blocks.k // k, k=k)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _NearMask(Mask):
    """A causal mask that shows no more than the last local_blocks blocks of positions."""

    pattern: SparsePattern = field(default=SparsePattern(), metadata={"static": True})

    @classmethod
    def of(cls, mask: Mask, pattern: SparsePattern) -> "_NearMask":
        return mask.as_kind(cls, pattern=pattern)

    def visible(self) -> Bool[Array, "B T S"]:
        return super().visible() & self.pattern.is_near(self.q_position[:, :, None], self.k_position[:, None, :])

    def maybe_visible(self, q: Bounds, k: Bounds) -> Bool[Array, "..."]:
        # In all rows at once: with other bounds in each, more is visited than need be.
        near = self.pattern.is_near(q.low_position, k.high_position).any(0)
        return super().maybe_visible(q, k) & near

    def fully_visible(self, q: Bounds, k: Bounds) -> Bool[Array, "..."]:
        return super().fully_visible(q, k) & self.pattern.is_near(q.high_position, k.low_position).all(0)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class HeldMask(Mask):
    """A causal mask of keys some of which stand twice: in the first slots as near ones, in the others as strided ones.

    For one block of a few queries, as decode has: it skips nothing.
    """

    pattern: SparsePattern = field(default=SparsePattern(), metadata={"static": True})
    near: int = field(default=0, metadata={"static": True})  # slots

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
    """Some strided keys of each row: their places, and which of them are there."""

    place: Int32[Array, "R C"]
    is_there: Bool[Array, "R C"]

    def take(self, x: Float[Array, "B S K H"]) -> Float[Array, "B C K H"]:
        """Returns these keys or values."""
        return _taken(x, _by_token(self.place, x.shape[2]))

    def mask(self, mask: Mask) -> Mask:
        """Returns the mask of these keys, with R rows."""
        mask = mask.repeated(self.place.shape[0] // mask.rows)
        mask = mask.map_keys(lambda x: jnp.take_along_axis(x, self.place, 1))
        return replace(mask, k_segment=jnp.where(self.is_there, mask.k_segment, PADDING))


def _taken(x: Float[Array, "B S K H"], place: Int32[Array, "B C K"]) -> Float[Array, "B C K H"]:
    """Returns for each head its own places."""
    return jnp.take_along_axis(x, place[..., None], 1, mode="clip")


def _by_token(x: Shaped[Array, "R C"], heads: int) -> Shaped[Array, "B C K"]:
    """Returns what is known of each row as what is known of each head."""
    return jnp.swapaxes(x.reshape(-1, heads, x.shape[1]), 1, 2)


class _Far(NamedTuple):
    """The strided keys of each row, in the order of their places.

    They are worked on in chunks of as many as the sequence 0, 1, 2 ... has, so that only for layouts with more of them,
    such as many short packed sequences, there is a second chunk.
    """

    is_strided: Bool[Array, "R S"]
    count: Int32[Array, "R S"]  # of the strided keys up to here
    size: int  # of a chunk

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
        """Returns the total with what was found for one chunk of keys."""
        place = self.count - 1 - chunk * self.size
        is_here = self.is_strided & (place >= 0) & (place < self.size)
        place, is_here = (_by_token(x, total.shape[2]) for x in (place, is_here))
        # A gather: scattering is slow wherever it is not sure that no two values meet.
        return total + jnp.where(is_here[..., None], _taken(x, jnp.clip(place, 0, self.size - 1)), 0.0)

    def mask(self, mask: Mask, keys: _FarKeys, pattern: SparsePattern) -> "_FarMask":
        """Returns the mask of these keys."""
        return keys.mask(mask).as_kind(_FarMask, pattern=pattern)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _FarMask(Mask):
    """A causal mask that shows what lies before the last local_blocks blocks of positions."""

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
        """Returns the last block that queries see from afar."""
        return self._block(position) - self.pattern.local_blocks


def _in_blocks(bounds: Bounds, block: Callable[[Array], Array]) -> Bounds:
    return bounds._replace(low_position=block(bounds.low_position), high_position=block(bounds.high_position))
