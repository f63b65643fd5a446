"""Blockwise attention on one device: memory linear in length (Rabe and Staats 2112.05682, FlashAttention-2 2307.08691).

Two loops: over the blocks of one side, of rows that take turns; and over those blocks of the other side that the mask
shows. In the largest array, the scores of a block, no pass is made that can be saved.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from rlring.attention import online_softmax
from rlring.attention.blocks import Blocks, pad, pick, schedule
from rlring.attention.kernel import BackwardInputs, Gradients, no_gradients
from rlring.attention.mask import Mask
from rlring.attention.score_mod import ScoreMod, Tile
from rlring.attention.softmax import Partial, accumulator_type, nothing, zeros


class BlockwiseKernel(NamedTuple):
    """The kernel in plain JAX: every mask, every type, every device."""

    blocks: Blocks
    heads_first = False

    def residual_dtype(self, dtype: jnp.dtype) -> jnp.dtype:
        return accumulator_type(dtype)

    def forward(self, q, k, v, mask: Mask, mod: ScoreMod, before: Partial | None = None) -> Partial:
        return forward(q, k, v, mask, mod, self.blocks, before)

    def backward(
        self, q, k, v, mask: Mask, mod: ScoreMod, inputs: BackwardInputs, before: Gradients | None = None
    ) -> Gradients:
        return backward(q, k, v, mask, mod, inputs, self.blocks, before)


def forward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    mask: Mask,
    mod: ScoreMod,
    blocks: Blocks,
    before: Partial | None = None,
) -> Partial:
    """Kernel.forward. The mask may also have a row for each key/value head of each sequence."""
    length, blocks = q.shape[1], blocks.fit(q, k)
    turns = blocks.turns(q, k)
    q, k, v, mask, mod = blocks.padded(q, k, v, mask, mod)
    counted = q.shape[1] // blocks.q
    is_one_block = counted == 1 and k.shape[1] == blocks.k
    q_bounds, k_bounds = mask.q_bounds(blocks.q), mask.k_bounds(blocks.k)
    shields_any = online_softmax.has_gaps(v)

    def attend_from(n, total: Partial) -> Partial:
        rows, i = turns[n // counted], n % counted
        start, mask_here = i * blocks.q, rows.of_masks(mask)
        q_block = rows.take(q, start, blocks.q)

        def attend_to(j, running, *, add=online_softmax.add, is_masked=False, shields=False):
            seen = blocks.mask(mask_here, i, j)
            tile = Tile.of(mod, blocks.terms(mod, rows, seen, start), seen, q_block, is_masked=is_masked)
            k_block, v_block = (rows.take(x, j * blocks.k, blocks.k) for x in (k, v))
            if shields:
                k_block, v_block = online_softmax.shielded(k_block, v_block)
            return add(running, q_block, k_block, v_block, tile)

        def so_far() -> online_softmax.SoftmaxState:
            numbers = (rows.take_numbers(x, start, blocks.q) for x in (total.exponent, total.total))
            return online_softmax.SoftmaxState.after(rows.take(total.out, start, blocks.q), *numbers)

        if is_one_block and before is None:  # faster without any loop
            running = attend_to(
                0, None, add=lambda _, *block: online_softmax.first(*block), is_masked=True, shields=True
            )
        elif is_one_block:
            running = attend_to(0, so_far(), is_masked=True, shields=True)
        else:
            plan = schedule(mask_here, *rows.of_masks((pick(q_bounds, i), k_bounds)))
            running = online_softmax.softmax_over(plan, attend_to, so_far, shields=shields_any)
        return rows.put_partial(total, running.finish(), start)

    total = nothing(q, v) if before is None else before.padded(q.shape[1])
    return _each(turns.count * counted, attend_from, total).cut(length)


def backward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    mask: Mask,
    mod: ScoreMod,
    inputs: BackwardInputs,
    blocks: Blocks,
    before: Gradients | None = None,
) -> Gradients:
    """Kernel.backward. The mask may also have a row for each key/value head of each sequence."""
    q_length, k_length, blocks, unpadded = q.shape[1], k.shape[1], blocks.fit(q, k), mod
    turns = blocks.turns(q, k)
    q, k, v, mask, mod = blocks.padded(q, k, v, mask, mod)
    d_out = pad(inputs.d_out, 1, q.shape[1])
    numbers = [pad(x, 2, q.shape[1]) for x in (inputs.exponent, inputs.total, inputs.delta)]
    counted = k.shape[1] // blocks.k
    is_one_block = counted == 1 and q.shape[1] == blocks.q
    q_bounds, k_bounds = mask.q_bounds(blocks.q), mask.k_bounds(blocks.k)
    shields_any = online_softmax.has_gaps(q, k, v, d_out, inputs.total)

    def gradients_of(n, total: Gradients) -> Gradients:
        rows, j = turns[n // counted], n % counted
        mask_here = rows.of_masks(mask)
        k_block, v_block = (rows.take(x, j * blocks.k, blocks.k) for x in (k, v))

        def add_from(i, found, *, is_masked=False, shields=False):
            start, (dq, dk, dv, d_mod) = i * blocks.q, found
            of_q = [rows.take(x, start, blocks.q) for x in (q, d_out)]
            of_q += [rows.take_numbers(x, start, blocks.q) for x in numbers]
            seen = blocks.mask(mask_here, i, j)
            terms = blocks.terms(mod, rows, seen, start)
            tile = Tile.of(mod, terms, seen, of_q[0], is_masked=is_masked)
            more = online_softmax.gradients(*of_q, k_block, v_block, tile, shields=shields)
            d_mod = blocks.add_terms(d_mod, tile.gradients(more.logits, terms), rows, seen, start)
            return Gradients(rows.add(dq, more.dq, start), dk + more.dk, dv + more.dv, d_mod)

        none = (zeros(x.mT.shape, accumulator_type(x.dtype), x) for x in (k_block, v_block))
        found = Gradients(total.dq, *none, total.mod)
        if is_one_block:  # faster without any loop
            found = add_from(0, found, is_masked=True, shields=True)
        else:
            plan = schedule(mask_here, *rows.of_masks((q_bounds, pick(k_bounds, j))))
            found = plan.walk(add_from, found, shields=shields_any)
        keep = rows.put if before is None else rows.add
        dk, dv = (keep(x, part.mT, j * blocks.k) for x, part in ((total.dk, found.dk), (total.dv, found.dv)))
        return found._replace(dk=dk, dv=dv)

    total = no_gradients(q, k, v)
    if before is not None:
        total = Gradients(*(pad(x, 1, like.shape[1]) for x, like in zip(before[:3], total[:3], strict=True)))
    total = total._replace(mod=mod.no_gradients() if before is None else mod.padded_gradients(before.mod))
    found = _each(turns.count * counted, gradients_of, total)
    dq, dk, dv = found.dq[:, :q_length], found.dk[:, :k_length], found.dv[:, :k_length]
    return Gradients(dq, dk, dv, unpadded.cut_gradients(found.mod))


def _each(count: int, step: Callable, state):
    return step(0, state) if count == 1 else lax.fori_loop(0, count, step, state)


def _first(_, *block) -> online_softmax.SoftmaxState:
    return online_softmax.first(*block)
