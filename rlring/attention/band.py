"""Attention for masks that are a band along the diagonal: all tiles at one offset from the diagonal are one product.

A short window shows only tiles near the diagonal, which are too small to be efficient one by one. So tiles at the same
offset from the diagonal are computed as one batched product. Exact for every mask, and fast if few offsets are seen.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from rlring.attention import online_softmax
from rlring.attention.block_view import Bounds, pick
from rlring.attention.blocks import Blocks, BlockSchedule, pad
from rlring.attention.kernel import BackwardInputs, Gradients, no_gradients
from rlring.attention.mask import Mask
from rlring.attention.rows import RowGroups, Rows
from rlring.attention.score_mod import ModGradients, RowTerms, ScoreMod, Tile
from rlring.attention.softmax import PartialAttention, accumulator_type, nothing, zeros


class _Band(NamedTuple):
    """The division of a sequence into tiles, and of tiles into chunks that are computed at once.

    Chunks are of queries in the forward and of keys in the backward.
    """

    tile: int  # tokens of a tile, for queries and keys
    chunk: int  # tiles of a chunk
    tiles: int  # tiles of the padded sequence: a multiple of the chunk
    group: int  # query heads per row
    row_groups: RowGroups

    @classmethod
    def of(cls, q: Array, k: Array, tile: int, scores: int) -> "_Band":
        tiles = -(-max(q.shape[1], k.shape[1]) // tile)
        row_groups = Blocks(tile, tile, scores).row_groups(q, k)
        group = q.shape[2] // k.shape[2]
        chunk = min(tiles, max(1, scores // (row_groups.rows * group * tile * tile)))
        return cls(tile, chunk, -(-tiles // chunk) * chunk, group, row_groups)

    @property
    def length(self) -> int:
        return self.tiles * self.tile

    @property
    def size(self) -> int:
        """The number of tokens of a chunk."""
        return self.chunk * self.tile

    @property
    def chunks(self) -> int:
        return self.tiles // self.chunk

    def take(self, rows: Rows, x: Float[Array, "B T N H"], tile) -> Float[Array, "tiles Q H"]:
        """Returns these rows of the chunk that begins with tile `tile`; the first dimension is rows times tiles."""
        return self._cut(self._chunk(rows.take, x, tile, 1))

    def take_numbers(self, rows: Rows, x: Float[Array, "B N T"], tile) -> Float[Array, "tiles Q"]:
        """Like take(), for arrays of one number per query."""
        return self._cut(self._chunk(rows.take_numbers, x, tile, 2))

    def uncut(self, x: Float[Array, "tiles q ..."]) -> Float[Array, "r Q ..."]:
        """Returns the rows of a chunk from its tiles: the inverse of _cut()."""
        _, queries, *rest = x.shape
        tiles = x.reshape(-1, self.chunk, queries // self.tile, self.tile, *rest)
        return jnp.moveaxis(tiles, 2, 1).reshape(tiles.shape[0], self.chunk * queries, *rest)

    def add(self, rows: Rows, x: Float[Array, "B T N H"], tiles: Float[Array, "tiles Q H"], tile) -> Array:
        """Returns x with `tiles` added to the chunk that begins with tile `tile`."""
        start, more = tile * self.tile, self.uncut(tiles)

        def straight(x: Array) -> Array:
            return rows.add(x, more, start)

        def around(x: Array) -> Array:
            tokens = self._tokens_around(tile)
            chunk = rows.add(jnp.take(x, tokens, 1), more, 0)
            return x.at[:, tokens].set(chunk, unique_indices=True)

        # Loops of one step or none instead of lax.cond: XLA copies the arrays of branches, but not those of loops.
        goes_around = self._goes_around(tile).astype(jnp.int32)
        x = lax.fori_loop(goes_around, 1, lambda _, x: straight(x), x)
        return lax.fori_loop(0, goes_around, lambda _, x: around(x), x)

    def tile_of(
        self, mod: ScoreMod, rows: Rows, mask: Mask, q_tiles: Array, q_tile, k_tile, *, is_masked: bool
    ) -> Tile:
        """Returns mask, bias and dropout for the tiles of a chunk of queries, each paired with a tile of a chunk of
        keys. `mask` is the mask of these rows."""

        def per_row(x):  # rows are (sequence, head, tile); a mask may be the same for all heads of a sequence
            every = x.reshape(mask.rows, 1, self.chunk, *x.shape[1:])
            every = jnp.broadcast_to(every, (mask.rows, self.row_groups.rows // mask.rows, *every.shape[2:]))
            return every.reshape(-1, 1, *x.shape[1:])

        pairs = mask.map_queries(partial(self._tiles, q_tile)).map_keys(partial(self._tiles, k_tile))
        return Tile.of(mod, self.terms(mod, rows), pairs, q_tiles, is_masked=is_masked, per_row=per_row)

    def _tiles(self, tile, x: Int32[Array, "m tokens"]) -> Int32[Array, "tiles size"]:
        """Returns an array of one number per token for a chunk, tile by tile."""
        chunk = self._chunk(lambda x, start, size: lax.dynamic_slice_in_dim(x, start, size, 1), x, tile, 1)
        return chunk.reshape(-1, self.tile)

    def terms(self, mod: ScoreMod, rows: Rows) -> RowTerms:
        """Returns the RowTerms of these rows, repeated for all tiles of a chunk."""
        return rows.terms(mod, 0, 0, None).repeated(self.chunk)

    def add_terms(self, total: ModGradients, terms: RowTerms, rows: Rows) -> ModGradients:
        """Returns the total with the gradients of the terms of all tiles added."""
        summed = jax.tree.map(lambda x: x.reshape(-1, self.chunk, *x.shape[1:]).sum(1), terms)
        return rows.add_terms(total, summed, 0, None)

    def _cut(self, x: Float[Array, "r Q ..."]) -> Float[Array, "tiles q ..."]:
        rows, queries, *rest = x.shape
        tiles = x.reshape(rows, -1, self.chunk, self.tile, *rest)
        return jnp.moveaxis(tiles, 1, 2).reshape(rows * self.chunk, queries // self.chunk, *rest)

    def _chunk(self, take: Callable, x: Array, tile, dimension: int) -> Array:
        """Returns take(x, start, size) of the chunk that begins with tile `tile`; the last tile is followed by the
        first."""

        def straight(x: Array) -> Array:
            return take(x, tile * self.tile, self.size)

        def around(x: Array) -> Array:
            return take(jnp.take(x, self._tokens_around(tile), dimension), 0, self.size)

        # Few chunks go around. Appending the first tiles after the last would avoid the gather, but copy the array.
        return lax.cond(self._goes_around(tile), around, straight, x)

    def _goes_around(self, tile) -> Bool[Array, ""]:
        """Returns whether the chunk that begins with tile `tile` continues with the first tile."""
        return tile + self.chunk > self.tiles

    def _tokens_around(self, tile) -> Int32[Array, "size"]:
        tile = jnp.asarray(tile, jnp.int32)  # int32 also when 64-bit types are enabled
        return (tile * self.tile + jnp.arange(self.size, dtype=jnp.int32)) % self.length

    def schedule(self, tile, seen, whole) -> BlockSchedule:
        """Returns the schedule of offsets: by how many tiles the other side's tiles are ahead of the chunk's tiles.

        `seen` and `whole` [chunk, tiles]: which tiles of the other side each tile of the chunk sees partly and fully.
        """
        tile = jnp.asarray(tile, jnp.int32)
        ahead = tile + jnp.arange(self.chunk, dtype=jnp.int32)[:, None] + jnp.arange(self.tiles, dtype=jnp.int32)[None]
        seen, whole = (jnp.take_along_axis(x, ahead % self.tiles, 1) for x in (seen, whole))
        return BlockSchedule.of(seen.any(0), whole.all(0))


class _Inputs(NamedTuple):
    """The arrays of one call, padded to whole chunks, and the bounds of their tiles."""

    q: Float[Array, "B T N H"]
    k: Float[Array, "B T K H"]
    v: Float[Array, "B T K V"]
    mask: Mask
    mod: ScoreMod
    q_bounds: Bounds
    k_bounds: Bounds

    @classmethod
    def of(cls, band: _Band, q: Array, k: Array, v: Array, mask: Mask, mod: ScoreMod) -> "_Inputs":
        length, mask = band.length, mask.padded(band.length, band.length)
        padded = (pad(x, 1, length) for x in (q, k, v))
        return cls(*padded, mask, mod, mask.q_bounds(band.tile), mask.k_bounds(band.tile))


def forward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    mask: Mask,
    mod: ScoreMod,
    tile: int,
    scores: int,
) -> PartialAttention:
    """Computes Kernel.forward, without a bias; at most about `scores` scores are held at once."""
    band = _Band.of(q, k, tile, scores)
    inputs = _Inputs.of(band, q, k, v, mask, mod)
    attend = partial(_attend_from, band, inputs, online_softmax.has_gaps(inputs.v))
    start = nothing(inputs.q, inputs.v)
    return lax.fori_loop(0, band.row_groups.count * band.chunks, attend, start).cut(q.shape[1])


def _attend_from(
    band: _Band, inputs: _Inputs, shields_any: Bool[Array, ""], n, total: PartialAttention
) -> PartialAttention:
    """Returns the total with the attention of the n-th chunk of queries written to it."""
    q, k, v, mask, mod, q_bounds, k_bounds = inputs
    rows, first = band.row_groups[n // band.chunks], n % band.chunks * band.chunk
    mask_here, q_tiles = rows.of_masks(mask), band.take(rows, q, first)

    def attend_to(ahead, running, *, add=online_softmax.add, is_masked=False, shields=False):
        place = (first + ahead) % band.tiles
        known = band.tile_of(mod, rows, mask_here, q_tiles, first, place, is_masked=is_masked)
        k_tiles, v_tiles = band.take(rows, k, place), band.take(rows, v, place)
        if shields:
            k_tiles, v_tiles = online_softmax.shielded(k_tiles, v_tiles)
        return add(running, q_tiles, k_tiles, v_tiles, known)

    bounds = rows.of_masks((pick(q_bounds, first, band.chunk), k_bounds))
    plan = band.schedule(first, *_seen(mask_here, bounds))
    none = partial(online_softmax.SoftmaxState.none, q_tiles, v.shape[3])
    running = online_softmax.softmax_over(plan, attend_to, none, shields=shields_any)
    return rows.put_partial(total, tuple(band.uncut(x) for x in running.finish()), first * band.tile)


class _Known(NamedTuple):
    """The BackwardInputs of the queries, padded; and whether any array has NaN or infinity."""

    d_out: Float[Array, "B T N V"]
    numbers: tuple[Float[Array, "B N T"], ...]  # exponent, total and delta
    shields: Bool[Array, ""]

    @classmethod
    def of(cls, band: _Band, inputs: _Inputs, known: BackwardInputs) -> "_Known":
        numbers = tuple(pad(x, 2, band.length) for x in (known.exponent, known.total, known.delta))
        d_out = pad(known.d_out, 1, band.length)
        return cls(d_out, numbers, online_softmax.has_gaps(inputs.q, inputs.k, inputs.v, d_out, known.total))


def backward(q, k, v, mask: Mask, mod: ScoreMod, known: BackwardInputs, tile: int, scores: int) -> Gradients:
    """Computes Kernel.backward, without a bias; at most about `scores` scores are held at once."""
    q_length, k_length, band = q.shape[1], k.shape[1], _Band.of(q, k, tile, scores)
    inputs = _Inputs.of(band, q, k, v, mask, mod)
    add = partial(_add_gradients_of, band, inputs, _Known.of(band, inputs, known))
    none = no_gradients(inputs.q, inputs.k, inputs.v)._replace(mod=mod.no_gradients())
    dq, dk, dv, d_mod = lax.fori_loop(0, band.row_groups.count * band.chunks, add, none)
    return Gradients(dq[:, :q_length], dk[:, :k_length], dv[:, :k_length], d_mod)


def _add_gradients_of(band: _Band, inputs: _Inputs, known: _Known, n, total: Gradients) -> Gradients:
    """Returns the total with the gradients of the n-th chunk of keys, and its part of the gradients of queries."""
    q, k, v, mask, mod, q_bounds, k_bounds = inputs
    rows, first = band.row_groups[n // band.chunks], n % band.chunks * band.chunk
    mask_here = rows.of_masks(mask)
    k_tiles, v_tiles = band.take(rows, k, first), band.take(rows, v, first)

    def add_from(ahead, found, *, is_masked=False, shields=False):
        place, (dq, dk, dv, d_mod) = (first + ahead) % band.tiles, found
        of_q = [band.take(rows, x, place) for x in (q, known.d_out)]
        of_q += [band.take_numbers(rows, x, place) for x in known.numbers]
        tiles = band.tile_of(mod, rows, mask_here, of_q[0], place, first, is_masked=is_masked)
        more = online_softmax.gradients(*of_q, k_tiles, v_tiles, tiles, shields=shields)
        d_mod = band.add_terms(d_mod, tiles.gradients(more.logits, band.terms(mod, rows)), rows)
        return Gradients(band.add(rows, dq, more.dq, place), dk + more.dk, dv + more.dv, d_mod)

    none = (zeros(x.mT.shape, accumulator_type(x.dtype), x) for x in (k_tiles, v_tiles))
    bounds = rows.of_masks((q_bounds, pick(k_bounds, first, band.chunk)))
    plan = band.schedule(first, *(x.T for x in _seen(mask_here, bounds)))
    found = plan.walk(add_from, Gradients(total.dq, *none, total.mod), shields=known.shields)
    parts = (total.dk, found.dk), (total.dv, found.dv)
    dk, dv = (rows.put(x, band.uncut(part.mT), first * band.tile) for x, part in parts)
    return found._replace(dk=dk, dv=dv)


def _seen(mask: Mask, bounds: tuple[Bounds, Bounds]) -> tuple[Bool[Array, "q k"], Bool[Array, "q k"]]:
    """Returns which tiles of keys each tile of queries sees partly and fully."""
    q = jax.tree.map(lambda x: x[:, :, None], bounds[0])
    k = jax.tree.map(lambda x: x[:, None, :], bounds[1])
    return mask.maybe_visible(q, k), mask.fully_visible(q, k)
