"""Blockwise attention on one device: memory linear in length (Rabe and Staats 2112.05682, FlashAttention-2 2307.08691).

The outer loop is over groups of rows and over the blocks of one side, queries in the forward and keys in the backward.
The inner loop is over those blocks of the other side that the mask shows. The code makes as few passes as possible over
the scores of a block, the largest array.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from rlring.attention import online_softmax
from rlring.attention.block_view import BlockView
from rlring.attention.blocks import Blocks, BlockSchedule, pad
from rlring.attention.fixed_order import FixedOrder
from rlring.attention.kernel import BackwardInputs, Gradients, no_gradients
from rlring.attention.mask import Mask
from rlring.attention.online_softmax import SoftmaxState
from rlring.attention.rows import RowGroups, Rows
from rlring.attention.score_mod import ScoreMod, Tile
from rlring.attention.softmax import PartialAttention, accumulator_type, nothing, zeros


class BlockwiseKernel(NamedTuple):
    """The kernel in plain JAX, for every mask, type and device."""

    blocks: Blocks
    order: FixedOrder | None = None  # None: the fastest order
    heads_first = False

    def residual_dtype(self, dtype: jnp.dtype) -> jnp.dtype:
        return accumulator_type(dtype)

    def forward(self, q, k, v, mask: Mask, mod: ScoreMod, before: PartialAttention | None = None) -> PartialAttention:
        return forward(q, k, v, mask, mod, self.blocks, before, self.order)

    def backward(
        self, q, k, v, mask: Mask, mod: ScoreMod, inputs: BackwardInputs, before: Gradients | None = None
    ) -> Gradients:
        return backward(q, k, v, mask, mod, inputs, self.blocks, before, self.order)


def forward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    mask: Mask,
    mod: ScoreMod,
    blocks: Blocks,
    before: PartialAttention | None = None,
    order: FixedOrder | None = None,
) -> PartialAttention:
    """Computes Kernel.forward. The mask may also have a row for each key/value head of each sequence."""
    call, has_gaps = _Call.of(q, k, v, mask, mod, blocks, order), online_softmax.has_gaps(v)
    total = nothing(call.q, v) if before is None else before.padded(call.q.shape[1])

    def attend_from(n, total: PartialAttention) -> PartialAttention:
        rows, i = call.row_groups[n // call.q_blocks], n % call.q_blocks
        return call.attend_from(rows, i, total, shields=has_gaps, is_first=before is None)

    return _each(call.row_groups.count * call.q_blocks, attend_from, total).cut(q.shape[1])


def backward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    mask: Mask,
    mod: ScoreMod,
    inputs: BackwardInputs,
    blocks: Blocks,
    before: Gradients | None = None,
    order: FixedOrder | None = None,
) -> Gradients:
    """Computes Kernel.backward. The mask may also have a row for each key/value head of each sequence."""
    call = _Call.of(q, k, v, mask, mod, blocks, order)
    d_out = pad(inputs.d_out, 1, call.q.shape[1])
    of_q = d_out, *(pad(x, 2, d_out.shape[1]) for x in (inputs.exponent, inputs.total, inputs.delta))
    has_gaps = online_softmax.has_gaps(call.q, call.k, call.v, d_out, of_q[2])
    total = no_gradients(call.q, call.k, call.v)
    if before is not None:
        total = Gradients(*(pad(x, 1, like.shape[1]) for x, like in zip(before[:3], total[:3], strict=True)))
    total = total._replace(mod=call.mod.no_gradients() if before is None else call.mod.padded_gradients(before.mod))

    def add_from(n, total: Gradients) -> Gradients:
        rows, j = call.row_groups[n // call.k_blocks], n % call.k_blocks
        j = j if order is None else order.block_of_keys(j, call.k_blocks)
        return call.gradients_of(rows, j, of_q, total, shields=has_gaps, is_first=before is None)

    dq, dk, dv, d_mod = _each(call.row_groups.count * call.k_blocks, add_from, total)
    lengths = q.shape[1], k.shape[1], k.shape[1]
    cut = (x[:, :length] for x, length in zip((dq, dk, dv), lengths, strict=True))
    return Gradients(*cut, mod.cut_gradients(d_mod))


class _Call(NamedTuple):
    """The arrays and settings of one call, padded to whole blocks."""

    q: Float[Array, "B T N H"]
    k: Float[Array, "B S K H"]
    v: Float[Array, "B S K V"]
    mask: Mask
    mod: ScoreMod
    blocks: Blocks
    row_groups: RowGroups
    view: BlockView
    order: FixedOrder | None  # None: the fastest order

    @classmethod
    def of(cls, q, k, v, mask: Mask, mod: ScoreMod, blocks: Blocks, order: FixedOrder | None = None) -> "_Call":
        blocks = blocks.fit(q, k)
        row_groups = blocks.row_groups(q, k)
        q, k, v, mask, mod = blocks.padded(q, k, v, mask, mod)
        return cls(q, k, v, mask, mod, blocks, row_groups, mask.view(blocks.q, blocks.k), order)

    @property
    def q_blocks(self) -> int:
        return self.q.shape[1] // self.blocks.q

    @property
    def k_blocks(self) -> int:
        return self.k.shape[1] // self.blocks.k

    @property
    def is_one_block(self) -> bool:
        return self.q_blocks == self.k_blocks == 1

    def attend_from(
        self, rows: Rows, i, total: PartialAttention, *, shields: Bool[Array, ""], is_first: bool
    ) -> PartialAttention:
        """Returns the total with the attention of block i of these rows' queries written to it."""
        blocks, start, mask = self.blocks, i * self.blocks.q, rows.of_masks(self.mask)
        q = rows.take(self.q, start, blocks.q)

        def attend_to(j, state, *, add=online_softmax.add, is_masked=False, shields=False):
            seen = blocks.mask(mask, i, j)
            tile = Tile.of(self.mod, blocks.terms(self.mod, rows, seen, start), seen, q, is_masked=is_masked)
            k, v = (rows.take(x, j * blocks.k, blocks.k) for x in (self.k, self.v))
            if shields:
                k, v = online_softmax.shielded(k, v)
            return add(state, q, k, v, tile)

        def so_far() -> SoftmaxState:
            numbers = (rows.take_numbers(x, start, blocks.q) for x in (total.exponent, total.total))
            return SoftmaxState.after(rows.take(total.out, start, blocks.q), *numbers)

        if self.order is not None:
            plan = self.order.keys(rows.of_masks(self.view).of_queries(i), i, self.q_blocks)
            state = plan.walk(attend_to, so_far())
        elif self.is_one_block and is_first:  # faster without a loop
            state = attend_to(0, None, add=_first, is_masked=True, shields=True)
        elif self.is_one_block:
            state = attend_to(0, so_far(), is_masked=True, shields=True)
        else:
            plan = BlockSchedule.of(*rows.of_masks(self.view).of_queries(i))
            state = online_softmax.softmax_over(plan, attend_to, so_far, shields=shields)
        return rows.put_partial(total, state.finish(), start)

    def gradients_of(
        self, rows: Rows, j, of_q, total: Gradients, *, shields: Bool[Array, ""], is_first: bool
    ) -> Gradients:
        """Returns the total with the gradients of attention to block j of these rows' keys added."""
        blocks, mask, (d_out, *numbers) = self.blocks, rows.of_masks(self.mask), of_q
        k, v = (rows.take(x, j * blocks.k, blocks.k) for x in (self.k, self.v))

        def add_from(i, found: Gradients, *, is_masked=False, shields=False) -> Gradients:
            start = i * blocks.q
            here = [rows.take(x, start, blocks.q) for x in (self.q, d_out)]
            here += [rows.take_numbers(x, start, blocks.q) for x in numbers]
            seen = blocks.mask(mask, i, j)
            terms = blocks.terms(self.mod, rows, seen, start)
            tile = Tile.of(self.mod, terms, seen, here[0], is_masked=is_masked)
            more = online_softmax.gradients(*here, k, v, tile, shields=shields)
            d_mod = blocks.add_terms(found.mod, tile.gradients(more.logits, terms), rows, seen, start)
            return Gradients(rows.add(found.dq, more.dq, start), found.dk + more.dk, found.dv + more.dv, d_mod)

        if self.order is not None:
            so_far = (rows.take(x, j * blocks.k, blocks.k).mT for x in (total.dk, total.dv))
            plan = self.order.queries(rows.of_masks(self.view).of_keys(j), j, self.k_blocks)
            found = plan.walk(add_from, Gradients(total.dq, *so_far, total.mod))
            return self.with_keys(found, total, rows, j, keep=rows.put)
        none = (zeros(x.mT.shape, accumulator_type(x.dtype), x) for x in (k, v))
        found = Gradients(total.dq, *none, total.mod)
        if self.is_one_block:  # faster without a loop
            found = add_from(0, found, is_masked=True, shields=True)
        else:
            plan = BlockSchedule.of(*rows.of_masks(self.view).of_keys(j))
            found = plan.walk(add_from, found, shields=shields)
        return self.with_keys(found, total, rows, j, keep=rows.put if is_first else rows.add)

    def with_keys(self, found: Gradients, total: Gradients, rows: Rows, j, *, keep: Callable) -> Gradients:
        """Returns `found` with dk and dv of all keys, into which `keep` has written those of block j."""
        dk, dv = (keep(x, part.mT, j * self.blocks.k) for x, part in ((total.dk, found.dk), (total.dv, found.dv)))
        return found._replace(dk=dk, dv=dv)


def _each(count: int, step: Callable, state):
    return step(0, state) if count == 1 else lax.fori_loop(0, count, step, state)


def _first(_, *block) -> SoftmaxState:
    return online_softmax.first(*block)
