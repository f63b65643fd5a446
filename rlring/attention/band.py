"""Attention along a band: the tiles of many queries at once, each against the keys a few tiles before it.

What a short window shows lies along the diagonal, in tiles too small for a product each. Here those that are equally
far from the diagonal are one batched product. Exact for every mask, and fast where few such offsets are seen.
"""

from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from rlring.attention.blocks import Blocks, Visits, by_rows, pad, pick, put
from rlring.attention.blockwise import _gradients, _next, _Running, _softmax_over, _visible
from rlring.attention.local import Gradients
from rlring.attention.mask import Bounds, Mask
from rlring.attention.softmax import Partial, finite_lse, nothing


def forward(
    q: Float[Array, "R G T H"], k: Float[Array, "R S H"], v: Float[Array, "R S H"], mask: Mask, tile: int, scores: int
) -> Partial:
    """Kernel.forward; so many scores are held at once."""
    band = _Band.of(q, k, tile, scores)
    mask = mask.repeated(q.shape[0] // mask.rows)
    return by_rows(partial(_forward_rows, band=band), band.rows, (q, k, v, mask))


def backward(q, k, v, mask: Mask, out, lse, d_out, tile: int, scores: int) -> Gradients:
    """Kernel.backward."""
    band = _Band.of(q, k, tile, scores)
    # FlashAttention-2, equation 4.
    delta = jnp.einsum("rgth,rgth->rgt", out, d_out, preferred_element_type=jnp.float32)
    mask = mask.repeated(q.shape[0] // mask.rows)
    arrays = q, k, v, mask, finite_lse(lse), delta, d_out
    return by_rows(partial(_backward_rows, band=band), band.rows, arrays)


class _Band(NamedTuple):
    """How attention is cut: chunks of queries, or in the backward of keys, of some tiles each."""

    tile: int  # tokens, of queries and of keys
    chunk: int  # tiles
    rows: int  # of the batch, worked on at once
    tiles: int  # of the padded sequence: a multiple of the chunk

    @classmethod
    def of(cls, q: Array, k: Array, tile: int, scores: int) -> "_Band":
        rows, group, length, _ = q.shape
        tiles = -(-max(length, k.shape[1]) // tile)
        rows = Blocks(tile, tile, scores).rows(rows, group)
        chunk = min(tiles, max(1, scores // (rows * group * tile * tile)))
        return cls(tile, chunk, rows, -(-tiles // chunk) * chunk)

    @property
    def length(self) -> int:
        return self.tiles * self.tile

    @property
    def size(self) -> int:
        """Returns the tokens of a chunk."""
        return self.chunk * self.tile

    def at(self, x: Array, tile, dimension: int) -> Array:
        """Returns the chunk that begins with this tile; the last tile is followed by the first."""
        start = tile * self.tile

        def around(x: Array) -> Array:
            return jnp.take(x, (start + jnp.arange(self.size)) % self.length, dimension)

        def straight(x: Array) -> Array:
            return lax.dynamic_slice_in_dim(x, start, self.size, dimension)

        # Few chunks go around. With what follows the last tile put there, all would be slices, of a copy of it all.
        return lax.cond(tile + self.chunk <= self.tiles, straight, around, x)

    def cut(self, x: Array) -> Array:
        """Returns a chunk [R, G, C * tile, ...] as tiles [R * C, G * tile, ...]."""
        rows, group, _, *rest = x.shape
        tiles = jnp.moveaxis(x.reshape(rows, group, self.chunk, self.tile, *rest), 1, 2)
        return tiles.reshape(rows * self.chunk, group * self.tile, *rest)

    def uncut(self, x: Array, group: int) -> Array:
        """Returns the inverse of cut()."""
        rows, rest = x.shape[0] // self.chunk, x.shape[2:]
        tiles = x.reshape(rows, self.chunk, group, self.tile, *rest)
        return jnp.moveaxis(tiles, 2, 1).reshape(rows, group, self.size, *rest)

    def mask(self, mask: Mask, q_tile, k_tile) -> Mask:
        """Returns the mask of a chunk's tiles, in pairs."""
        block = replace(
            mask,
            q_position=self.at(mask.q_position, q_tile, 1),
            q_segment=self.at(mask.q_segment, q_tile, 1),
            k_position=self.at(mask.k_position, k_tile, 1),
            k_segment=self.at(mask.k_segment, k_tile, 1),
        )
        return jax.tree.map(lambda x: x.reshape(-1, self.tile), block)

    def visits(self, tile, seen, whole) -> Visits:
        """Returns by how many tiles the other side is ahead where any of the chunk's tiles sees it.

        `seen` and `whole` say which tile of the other side each of the chunk's sees, [chunk, tiles].
        """
        ahead = tile + jnp.arange(self.chunk, dtype=jnp.int32)[:, None] + jnp.arange(self.tiles, dtype=jnp.int32)
        seen, whole = (jnp.take_along_axis(x, ahead % self.tiles, 1) for x in (seen, whole))
        return Visits.of(seen.any(0), whole.all(0))


def _forward_rows(q, k, v, mask: Mask, *, band: _Band) -> Partial:
    (group, q_length), length = q.shape[1:3], band.length
    q, k, v, mask = pad(q, 2, length), pad(k, 1, length), pad(v, 1, length), mask.padded(length, length)
    q_bounds, k_bounds = mask.q_bounds(band.tile), mask.k_bounds(band.tile)

    def attend_from(i, total: Partial) -> Partial:
        tile = i * band.chunk
        q_tiles = band.cut(band.at(q, tile, 2))

        def attend_to(ahead, running, *, add=_next, is_masked=False):
            place = (tile + ahead) % band.tiles
            visible = _visible(band.mask(mask, tile, place), group) if is_masked else None
            k_tiles, v_tiles = (band.cut(band.at(x, place, 1)[:, None]) for x in (k, v))
            return add(running, q_tiles, k_tiles, v_tiles, visible)

        own = _pairs(pick(q_bounds, i, band.chunk), 2), _pairs(k_bounds, 1)
        plan = band.visits(tile, mask.may_see(*own), mask.sees_all(*own))
        here = _softmax_over(plan, attend_to, _Running.after(nothing(q_tiles[:, None]))).finish(1)
        return jax.tree.map(lambda x, part: put(x, band.uncut(part[:, 0], group), i, 2), total, here)

    total = lax.fori_loop(0, band.tiles // band.chunk, attend_from, nothing(q))
    return jax.tree.map(lambda x: x[:, :, :q_length], total)


def _backward_rows(q, k, v, mask: Mask, lse, delta, d_out, *, band: _Band) -> Gradients:
    (group, q_length), k_length, length = q.shape[1:3], k.shape[1], band.length
    k, v, mask = pad(k, 1, length), pad(v, 1, length), mask.padded(length, length)
    q, lse, delta, d_out = (pad(x, 2, length) for x in (q, lse, delta, d_out))
    q_bounds, k_bounds = mask.q_bounds(band.tile), mask.k_bounds(band.tile)

    def gradients_of(j, total):
        tile = j * band.chunk
        k_tiles, v_tiles = (band.cut(band.at(x, tile, 1)[:, None]) for x in (k, v))

        def add_from(ahead, gradients, *, is_masked):
            place = (tile + ahead) % band.tiles
            visible = _visible(band.mask(mask, place, tile), group) if is_masked else None
            q_tiles, *rest = (band.cut(band.at(x, place, 2)) for x in (q, lse, delta, d_out))
            dq, dk, dv = gradients
            dq_more, dk_more, dv_more = _gradients(q_tiles, k_tiles, v_tiles, visible, *rest)
            dq_chunk = lax.dynamic_slice_in_dim(dq, place * band.tile, band.size, 2) + band.uncut(dq_more, group)
            return lax.dynamic_update_slice_in_dim(dq, dq_chunk, place * band.tile, 2), dk + dk_more, dv + dv_more

        own = _pairs(q_bounds, 1), _pairs(pick(k_bounds, j, band.chunk), 2)
        plan = band.visits(tile, mask.may_see(*own), mask.sees_all(*own))
        zero = jnp.zeros(k_tiles.mT.shape, jnp.float32)
        dq, dk, dv = plan.walk(add_from, (total.dq, zero, zero))
        dk, dv = (put(x, band.uncut(part.mT, 1)[:, 0], j, 1) for x, part in ((total.dk, dk), (total.dv, dv)))
        return Gradients(dq, dk, dv)

    # With one more chunk of dq: what falls behind the last belongs to the first.
    zero = Gradients(*(jnp.zeros(x.shape, jnp.float32) for x in (pad(q, 2, length + band.size), k, v)))
    dq, dk, dv = lax.fori_loop(0, band.tiles // band.chunk, gradients_of, zero)
    dq = dq[:, :, :length].at[:, :, : band.size].add(dq[:, :, length:])
    return Gradients(dq[:, :, :q_length], dk[:, :k_length], dv[:, :k_length])


def _pairs(bounds: Bounds, dimension: int) -> Bounds:
    """Returns bounds that broadcast against those of the other side."""
    return jax.tree.map(lambda x: jnp.expand_dims(x, dimension), bounds)
