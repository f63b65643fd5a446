"""Attention along a band: the tiles of many queries at once, each against the keys a few tiles before it.

What a short window shows lies along the diagonal, in tiles too small for a product each. Here those that are equally
far from the diagonal are one batched product. Exact for every mask, and fast where few such offsets are seen.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from rlring.attention import one_block
from rlring.attention.blocks import Blocks, Visits, pad, pick
from rlring.attention.local import Gradients, delta_of, no_gradients
from rlring.attention.mask import Bounds, Mask
from rlring.attention.rows import Rows, Turns
from rlring.attention.softmax import Partial, Whole, accumulator_type, nothing


class _Band(NamedTuple):
    """How attention is cut: chunks of queries, or in the backward of keys, of some tiles each."""

    tile: int  # tokens, of queries and of keys
    chunk: int  # tiles
    tiles: int  # of the padded sequence: a multiple of the chunk
    group: int  # query heads of a row
    turns: Turns

    @classmethod
    def of(cls, q: Array, k: Array, tile: int, scores: int) -> "_Band":
        tiles = -(-max(q.shape[1], k.shape[1]) // tile)
        turns = Blocks(tile, tile, scores).turns(q, k)
        group = q.shape[2] // k.shape[2]
        chunk = min(tiles, max(1, scores // (turns.rows * group * tile * tile)))
        return cls(tile, chunk, -(-tiles // chunk) * chunk, group, turns)

    @property
    def length(self) -> int:
        return self.tiles * self.tile

    @property
    def size(self) -> int:
        """Returns the tokens of a chunk."""
        return self.chunk * self.tile

    @property
    def chunks(self) -> int:
        return self.tiles // self.chunk

    def take(self, rows: Rows, x: Float[Array, "B T N H"], tile) -> Float[Array, "r*C G*tile H"]:
        """Returns these rows of the chunk that begins with this tile, tile by tile."""
        return self._cut(self._chunk(rows.take, x, tile, 1))

    def take_numbers(self, rows: Rows, x: Float[Array, "B N T"], tile) -> Float[Array, "r*C G*tile"]:
        """Returns what take() does, of arrays of one number a query."""
        return self._cut(self._chunk(rows.take_numbers, x, tile, 2))

    def uncut(self, x: Float[Array, "r*C G*tile ..."]) -> Float[Array, "r Q ..."]:
        """Returns the rows of a chunk, from its tiles."""
        _, queries, *rest = x.shape
        tiles = x.reshape(-1, self.chunk, queries // self.tile, self.tile, *rest)
        return jnp.moveaxis(tiles, 2, 1).reshape(tiles.shape[0], self.chunk * queries, *rest)

    def add(self, rows: Rows, x: Float[Array, "B T N H"], tiles: Float[Array, "r*C Q H"], tile) -> Array:
        """Returns x with what is found for the chunk that begins with this tile added to it."""
        start, more = tile * self.tile, self.uncut(tiles)

        def straight(x: Array) -> Array:
            return rows.add(x, more, start)

        def around(x: Array) -> Array:
            tokens = self._tokens_around(tile)
            chunk = rows.add(jnp.take(x, tokens, 1), more, 0)
            return x.at[:, tokens].set(chunk, unique_indices=True)

        # Loops of one step or none: what they go on with is not copied, as it is for branches.
        goes_around = self._goes_around(tile).astype(jnp.int32)
        x = lax.fori_loop(goes_around, 1, lambda _, x: straight(x), x)
        return lax.fori_loop(0, goes_around, lambda _, x: around(x), x)

    def visible(self, mask: Mask, q_tile, k_tile) -> Bool[Array, "r*C Q tile"]:
        """Returns what the queries of a chunk's tiles see of the tiles of another, in pairs; the mask is the rows'."""

        def tiles(x, tile):
            chunk = self._chunk(lambda x, start, size: lax.dynamic_slice_in_dim(x, start, size, 1), x, tile, 1)
            return chunk.reshape(-1, self.tile)

        pairs = replace(
            mask,
            q_position=tiles(mask.q_position, q_tile),
            q_segment=tiles(mask.q_segment, q_tile),
            k_position=tiles(mask.k_position, k_tile),
            k_segment=tiles(mask.k_segment, k_tile),
        )
        visible = pairs.visible().reshape(mask.rows, 1, self.chunk, 1, self.tile, self.tile)
        heads = self.turns.rows // mask.rows
        every = jnp.broadcast_to(visible, (mask.rows, heads, self.chunk, self.group, self.tile, self.tile))
        return every.reshape(-1, self.group * self.tile, self.tile)

    def _cut(self, x: Float[Array, "r Q ..."]) -> Float[Array, "r*C G*tile ..."]:
        rows, queries, *rest = x.shape
        tiles = x.reshape(rows, -1, self.chunk, self.tile, *rest)
        return jnp.moveaxis(tiles, 1, 2).reshape(rows * self.chunk, queries // self.chunk, *rest)

    def _chunk(self, take: Callable, x: Array, tile, dimension: int) -> Array:
        """Returns take(x, start, size) of the chunk that begins with this tile; the first tile follows the last."""

        def straight(x: Array) -> Array:
            return take(x, tile * self.tile, self.size)

        def around(x: Array) -> Array:
            return take(jnp.take(x, self._tokens_around(tile), dimension), 0, self.size)

        # Few chunks go around. With what follows the last tile put there, all would be slices, of a copy of it all.
        return lax.cond(self._goes_around(tile), around, straight, x)

    def _goes_around(self, tile) -> Bool[Array, ""]:
        """Returns whether the chunk that begins with this tile goes on with the first."""
        return tile + self.chunk > self.tiles

    def _tokens_around(self, tile) -> Int32[Array, "size"]:
        return (tile * self.tile + jnp.arange(self.size, dtype=jnp.int32)) % self.length

    def visits(self, tile, seen, whole) -> Visits:
        """Returns by how many tiles the other side is ahead where any of the chunk's tiles sees it.

        `seen` and `whole` say which tile of the other side each of the chunk's sees, [chunk, tiles].
        """
        ahead = tile + jnp.arange(self.chunk, dtype=jnp.int32)[:, None] + jnp.arange(self.tiles, dtype=jnp.int32)[None]
        seen, whole = (jnp.take_along_axis(x, ahead % self.tiles, 1) for x in (seen, whole))
        return Visits.of(seen.any(0), whole.all(0))


def forward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Mask,
    tile: int,
    scores: int,
) -> Partial:
    """Kernel.forward; so many scores are held at once."""
    q_length, band = q.shape[1], _Band.of(q, k, tile, scores)
    length = band.length
    q, k, v, mask = (*(pad(x, 1, length) for x in (q, k, v)), mask.padded(length, length))
    q_bounds, k_bounds = mask.q_bounds(tile), mask.k_bounds(tile)

    shields_any = one_block.has_gaps(v)

    def attend_from(n, total: Partial) -> Partial:
        rows, first = band.turns[n // band.chunks], n % band.chunks * band.chunk
        mask_here, q_tiles = rows.of_masks(mask), band.take(rows, q, first)

        def attend_to(ahead, running, *, add=one_block.add, is_masked=False, shields=False):
            place = (first + ahead) % band.tiles
            visible = band.visible(mask_here, first, place) if is_masked else None
            k_tiles, v_tiles = band.take(rows, k, place), band.take(rows, v, place)
            if shields:
                k_tiles, v_tiles = one_block.shielded(k_tiles, v_tiles)
            return add(running, q_tiles, k_tiles, v_tiles, visible)

        bounds = rows.of_masks((pick(q_bounds, first, band.chunk), k_bounds))
        plan = band.visits(first, *_seen(mask_here, bounds))
        running = one_block.softmax_over(plan, attend_to, lambda: one_block.Running.none(q_tiles), shields=shields_any)
        return rows.put_partial(total, tuple(band.uncut(x) for x in running.finish()), first * tile)

    return lax.fori_loop(0, band.turns.count * band.chunks, attend_from, nothing(q)).cut(q_length)


def backward(q, k, v, mask: Mask, whole: Whole, d_out, tile: int, scores: int) -> Gradients:
    """Kernel.backward; so many scores are held at once."""
    q_length, k_length, band = q.shape[1], k.shape[1], _Band.of(q, k, tile, scores)
    length = band.length
    numbers = [pad(x, 2, length) for x in (whole.exponent, whole.total, delta_of(whole.out, d_out))]
    q, k, v, d_out = (pad(x, 1, length) for x in (q, k, v, d_out))
    mask = mask.padded(length, length)
    q_bounds, k_bounds = mask.q_bounds(tile), mask.k_bounds(tile)

    shields_any = one_block.has_gaps(q, k, v, d_out, whole.total)

    def gradients_of(n, total: Gradients) -> Gradients:
        rows, first = band.turns[n // band.chunks], n % band.chunks * band.chunk
        mask_here = rows.of_masks(mask)
        k_tiles, v_tiles = band.take(rows, k, first), band.take(rows, v, first)

        def add_from(ahead, found, *, is_masked=False, shields=False):
            place, (dq, dk, dv) = (first + ahead) % band.tiles, found
            visible = band.visible(mask_here, place, first) if is_masked else None
            of_q = (band.take(rows, x, place) for x in (q, d_out))
            of_q = *of_q, *(band.take_numbers(rows, x, place) for x in numbers)
            dq_more, dk_more, dv_more = one_block.gradients(*of_q, k_tiles, v_tiles, visible, shields=shields)
            return band.add(rows, dq, dq_more, place), dk + dk_more, dv + dv_more

        zero = jnp.zeros(k_tiles.mT.shape, accumulator_type(k.dtype))
        bounds = rows.of_masks((q_bounds, pick(k_bounds, first, band.chunk)))
        plan = band.visits(first, *(x.T for x in _seen(mask_here, bounds)))
        dq, dk, dv = plan.walk(add_from, (total.dq, zero, zero), shields=shields_any)
        dk, dv = (rows.put(x, band.uncut(part.mT), first * tile) for x, part in ((total.dk, dk), (total.dv, dv)))
        return Gradients(dq, dk, dv)

    dq, dk, dv = lax.fori_loop(0, band.turns.count * band.chunks, gradients_of, no_gradients(q, k))
    return Gradients(dq[:, :q_length], dk[:, :k_length], dv[:, :k_length])


def _seen(mask: Mask, bounds: tuple[Bounds, Bounds]) -> tuple[Bool[Array, "q k"], Bool[Array, "q k"]]:
    """Returns which tiles of keys each tile of queries sees in part and as a whole."""
    q = jax.tree.map(lambda x: x[:, :, None], bounds[0])
    k = jax.tree.map(lambda x: x[:, None, :], bounds[1])
    return mask.may_see(q, k), mask.sees_all(q, k)
