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

from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int32, Integer, Shaped

from rlring.attention import band, blockwise
from rlring.attention.blocks import Blocks
from rlring.attention.local import Gradients, as_computed, named_for_remat, no_gradients, tie_to_data
from rlring.attention.mask import NOWHERE, Bounds, Mask
from rlring.attention.softmax import Partial, Whole
from rlring.attention.ulysses import ulysses_attention
from rlring.errors import UsageError

SMALLEST_TILE = 64  # tokens; products of less cost more than the scores they save


@dataclass(frozen=True)
class SparsePattern:
    """Which blocks of keys the heads see: block j of positions is seen from block i >= j if it is near or strided.

        near      i - j < local_blocks, so always the block itself
        strided   (j + head * step + offset) % stride == 0, with step = max(1, stride // kv_heads)

    `head` counts key/value heads: all query heads that share one see the same. Blocks are counted in positions, not in
    places, so the pattern does not depend on the layout, and a key that has left the near past of the queries is either
    kept for ever or never needed again. Example, local_blocks 2, stride 4, two key/value heads, `#` near, `+` strided:

        head 0   block i   0  # . . . . . . .     head 1   0  # . . . . . . .
                           1  # # . . . . . .              1  # # . . . . . .
                           2  + # # . . . . .              2  . # # . . . . .
                           3  + . # # . . . .              3  . . # # . . . .
                           4  + . . # # . . .              4  . . + # # . . .
                           5  + . . . # # . .              5  . . + . # # . .
                           6  + . . . + # # .              6  . . + . . # # .
                           7  + . . . + . # #              7  . . + . . . # #

    Raises:
        UsageError: a block, local_blocks or stride below 1.
    """

    block: int = 64  # positions
    local_blocks: int = 16
    stride: int = 8  # 1 sees all that is causal
    offset: int = 0

    def __post_init__(self):
        for name in ("block", "local_blocks", "stride"):
            if getattr(self, name) < 1:
                reason = ": a token sees itself" if name == "local_blocks" else ""
                raise UsageError(
                    f"sparse.{name} is at least 1{reason}; got {getattr(self, name)}. Leave it out for the default."
                )

    def is_strided(
        self,
        block: Integer[Array | np.ndarray, "..."],
        head: Integer[Array | np.ndarray, "..."] | int,
        *,
        kv_heads: int,
    ) -> Bool[Array | np.ndarray, "..."]:
        """Returns whether key/value head `head` of `kv_heads` sees these blocks from afar; the two broadcast."""
        step = max(1, self.stride // kv_heads)
        return (block + head * step + self.offset) % self.stride == 0

    def is_near(
        self, q_position: Integer[Array | np.ndarray, "..."], k_position: Integer[Array | np.ndarray, "..."]
    ) -> Bool[Array | np.ndarray, "..."]:
        """Returns whether keys are in the near past of queries, or later; the two broadcast."""
        # No division of keys: the same for every pair of tokens, it would cost more than the attention itself.
        return k_position >= (q_position // self.block - (self.local_blocks - 1)) * self.block

    def density(self, length: int, *, kv_heads: int) -> float:
        """Returns which share of the causal blocks is seen by positions 0 to length - 1, in the mean over the heads."""
        blocks = -(-length // self.block)
        strided = self.is_strided(np.arange(blocks), np.arange(kv_heads)[:, None], kv_heads=kv_heads)
        seen_from = np.maximum(blocks - self.local_blocks - np.arange(blocks), 0)  # by how many blocks, if strided
        near = np.minimum(np.arange(blocks) + 1, self.local_blocks).sum()
        return float((near + (strided * seen_from).sum() / kv_heads) / (blocks * (blocks + 1) / 2))


def sparse_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Mask,
    *,
    pattern: SparsePattern,
    blocks: Blocks,
    axis: str | None = None,
) -> Float[Array, "B T N H"]:
    """Returns attention over the keys that both the mask and the pattern show, in q's type.

    Exact for any layout of the tokens; fast where neighbours in the layout are neighbours in position. With a mesh
    axis, inside shard_map, the sequence is split over it, and for the compute the heads are (ulysses_attention).
    """
    kv_heads = k.shape[2]

    def local(q, k, v, mask: Mask):
        head = jnp.arange(k.shape[2], dtype=jnp.int32)
        if axis is not None:  # ulysses_attention copies the key/value heads where there are fewer than devices
            copies = k.shape[2] * lax.axis_size(axis) // kv_heads
            head = (head + lax.axis_index(axis) * k.shape[2]) // copies
        return _attention(q, k, v, mask, head, kv_heads, pattern, blocks)

    return local(q, k, v, mask) if axis is None else ulysses_attention(q, k, v, mask, axis=axis, local=local)


def check_mask(mask: Mask) -> None:
    """Raises UsageError for a mask that does not go with a pattern."""
    if not mask.is_causal or mask.window is not None:
        raise UsageError(
            "attention scheme 'sparse' needs a causal mask without a window; got "
            f"is_causal={mask.is_causal}, window={mask.window}. Its window is sparse.local_blocks * sparse.block; "
            "for any other mask use another scheme."
        )


@partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _attention(q, k, v, mask: Mask, heads, kv_heads: int, pattern: SparsePattern, blocks: Blocks):
    return _forward(q, k, v, mask, heads, kv_heads, pattern, blocks).whole().out.astype(q.dtype)


def _attention_forward(q, k, v, mask, heads, kv_heads, pattern, blocks):
    q, mask = tie_to_data(q, mask)
    total = _forward(q, k, v, mask, heads, kv_heads, pattern, blocks)
    whole = named_for_remat(total, blockwise.BlockwiseKernel(blocks).kept_type(q.dtype))
    return whole.out.astype(q.dtype), (q, k, v, mask, heads, whole)


def _attention_backward(kv_heads, pattern, blocks, residuals, d_out):
    q, k, v, mask, heads, whole = residuals
    d_out, mask = tie_to_data(d_out, mask)
    dq, dk, dv = _backward(q, k, v, mask, heads, whole, d_out, kv_heads, pattern, blocks)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, None


_attention.defvjp(_attention_forward, _attention_backward)


def _forward(q, k, v, mask, heads, kv_heads, pattern, blocks) -> Partial:
    k, v = as_computed(q, k, v)
    near = band.forward(q, k, v, _NearMask.of(mask, pattern), *_near_cut(blocks, pattern))
    far, far_blocks = _Far.of(mask, heads, kv_heads, pattern), _far_blocks(blocks, k.shape[1], pattern)

    def add(chunk, total: Partial) -> Partial:
        keys = far.keys(chunk)
        seen = far.mask(mask, keys, pattern)
        return blockwise.forward(q, keys.take(k), keys.take(v), seen, far_blocks, total)

    return lax.fori_loop(0, far.chunks, add, near)


def _backward(q, k, v, mask, heads, whole: Whole, d_out, kv_heads, pattern, blocks) -> Gradients:
    k, v = as_computed(q, k, v)
    near = band.backward(q, k, v, _NearMask.of(mask, pattern), whole, d_out, *_near_cut(blocks, pattern))
    far, far_blocks = _Far.of(mask, heads, kv_heads, pattern), _far_blocks(blocks, k.shape[1], pattern)

    def add(chunk, total: Gradients) -> Gradients:
        keys = far.keys(chunk)
        seen = far.mask(mask, keys, pattern)
        here = keys.take(k), keys.take(v)
        before = no_gradients(q, here[0])._replace(dq=total.dq)
        dq, dk, dv = blockwise.backward(q, *here, seen, whole, d_out, far_blocks, before)
        return Gradients(dq, far.add(total.dk, dk, chunk), far.add(total.dv, dv, chunk))

    return lax.fori_loop(0, far.chunks, add, near)


def _near_cut(blocks: Blocks, pattern: SparsePattern) -> tuple[int, int]:
    """Returns tiles of which not too much lies outside of the band, and how many scores are held at once."""
    tile = min(blocks.q, blocks.k, max(SMALLEST_TILE, pattern.local_blocks * pattern.block // 8))
    return tile, blocks.scores // 4


def _far_blocks(blocks: Blocks, length: int, pattern: SparsePattern) -> Blocks:
    """Returns tiles of which not too much lies above the diagonal, which the stride has made flat: so are the tiles."""
    k = min(blocks.k, max(2 * SMALLEST_TILE, length // pattern.stride // 16))
    return blocks._replace(q=blocks.q * blocks.k // k, k=k)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _NearMask(Mask):
    """A causal mask that shows no more than the last local_blocks blocks of positions."""

    pattern: SparsePattern = field(default=SparsePattern(), metadata={"static": True})

    @classmethod
    def of(cls, mask: Mask, pattern: SparsePattern) -> "_NearMask":
        return cls(mask.q_position, mask.k_position, mask.q_segment, mask.k_segment, pattern=pattern)

    def visible(self) -> Bool[Array, "B T S"]:
        return super().visible() & self.pattern.is_near(self.q_position[:, :, None], self.k_position[:, None, :])

    def may_see(self, q: Bounds, k: Bounds) -> Bool[Array, "blocks"]:
        # In all rows at once: with other bounds in each, more is visited than need be.
        near = self.pattern.is_near(q.low_position, k.high_position).any(0)
        return super().may_see(q, k) & near

    def sees_all(self, q: Bounds, k: Bounds) -> Bool[Array, "blocks"]:
        return super().sees_all(q, k) & self.pattern.is_near(q.high_position, k.low_position).all(0)


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
        return cls(mask.q_position, mask.k_position, mask.q_segment, mask.k_segment, pattern=pattern, near=near)

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
        position, segment = (jnp.take_along_axis(x, self.place, 1) for x in (mask.k_position, mask.k_segment))
        return replace(mask, k_position=position, k_segment=jnp.where(self.is_there, segment, NOWHERE))


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
        self, total: Float32[Array, "B S K H"], x: Float32[Array, "B C K H"], chunk: Int32[Array, ""]
    ) -> Float32[Array, "B S K H"]:
        """Returns the total with what was found for one chunk of keys."""
        place = self.count - 1 - chunk * self.size
        is_here = self.is_strided & (place >= 0) & (place < self.size)
        place, is_here = (_by_token(x, total.shape[2]) for x in (place, is_here))
        # A gather: scattering is slow wherever it is not sure that no two values meet.
        return total + jnp.where(is_here[..., None], _taken(x, jnp.clip(place, 0, self.size - 1)), 0.0)

    def mask(self, mask: Mask, keys: _FarKeys, pattern: SparsePattern) -> Mask:
        """Returns the mask of these keys, in blocks: causal, and beyond the near ones."""
        seen = keys.mask(mask)
        return replace(
            seen,
            q_position=seen.q_position // pattern.block - pattern.local_blocks,
            k_position=seen.k_position // pattern.block,
        )
