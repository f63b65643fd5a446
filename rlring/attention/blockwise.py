"""Blockwise attention on one device: memory linear in length (Rabe and Staats 2112.05682, FlashAttention-2 2307.08691).

Two loops: over the blocks of one side, of rows that take turns; and over those blocks of the other side that the mask
shows. In the largest array, the scores of a block, no pass is made that can be saved.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from rlring.attention import one_block
from rlring.attention.blocks import Blocks, pad, pick, visits
from rlring.attention.local import Gradients, delta_of, no_gradients
from rlring.attention.mask import Mask
from rlring.attention.softmax import Partial, Whole, accumulator_type, nothing


class BlockwiseKernel(NamedTuple):
    """The kernel in plain JAX: every mask, every type, every device."""

    blocks: Blocks
    heads_first = False

    def kept_type(self, dtype: jnp.dtype) -> jnp.dtype:
        return accumulator_type(dtype)

    def forward(self, q, k, v, mask: Mask, before: Partial | None = None) -> Partial:
        return forward(q, k, v, mask, self.blocks, before)

    def backward(self, q, k, v, mask: Mask, whole: Whole, d_out, before: Gradients | None = None) -> Gradients:
        return backward(q, k, v, mask, whole, d_out, self.blocks, before)


def forward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Mask,
    blocks: Blocks,
    before: Partial | None = None,
) -> Partial:
    """Kernel.forward. The mask may also have a row for each key/value head of each sequence."""
    length, blocks = q.shape[1], blocks.fit(q, k)
    turns = blocks.turns(q, k)
    q, k, v, mask = blocks.padded(q, k, v, mask)
    counted = q.shape[1] // blocks.q
    is_one_block = counted == 1 and k.shape[1] == blocks.k
    q_bounds, k_bounds = mask.q_bounds(blocks.q), mask.k_bounds(blocks.k)
    shields_any = one_block.has_gaps(v)

    def attend_from(n, total: Partial) -> Partial:
        rows, i = turns[n // counted], n % counted
        start, mask_here = i * blocks.q, rows.of_masks(mask)
        q_block = rows.take(q, start, blocks.q)

        def attend_to(j, running, *, add=one_block.add, is_masked=False, shields=False):
            visible = one_block.visible(blocks.mask(mask_here, i, j), q_block) if is_masked else None
            k_block, v_block = (rows.take(x, j * blocks.k, blocks.k) for x in (k, v))
            if shields:
                k_block, v_block = one_block.shielded(k_block, v_block)
            return add(running, q_block, k_block, v_block, visible)

        def so_far() -> one_block.Running:
            numbers = (rows.take_numbers(x, start, blocks.q) for x in (total.exponent, total.total))
            return one_block.Running.after(rows.take(total.out, start, blocks.q), *numbers)

        if is_one_block and before is None:  # faster without any loop
            running = attend_to(0, None, add=lambda _, *block: one_block.first(*block), is_masked=True, shields=True)
        elif is_one_block:
            running = attend_to(0, so_far(), is_masked=True, shields=True)
        else:
            plan = visits(mask_here, *rows.of_masks((pick(q_bounds, i), k_bounds)))
            running = one_block.softmax_over(plan, attend_to, so_far, shields=shields_any)
        return rows.put_partial(total, running.finish(), start)

    total = nothing(q) if before is None else before.padded(q.shape[1])
    return _each(turns.count * counted, attend_from, total).cut(length)


def backward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Mask,
    whole: Whole,
    d_out: Float[Array, "B T N H"],
    blocks: Blocks,
    before: Gradients | None = None,
) -> Gradients:
    """Kernel.backward. The mask may also have a row for each key/value head of each sequence."""
    q_length, k_length, blocks = q.shape[1], k.shape[1], blocks.fit(q, k)
    turns = blocks.turns(q, k)
    numbers = whole.exponent, whole.total, delta_of(whole.out, d_out)
    q, k, v, mask = blocks.padded(q, k, v, mask)
    d_out, numbers = pad(d_out, 1, q.shape[1]), [pad(x, 2, q.shape[1]) for x in numbers]
    counted = k.shape[1] // blocks.k
    is_one_block = counted == 1 and q.shape[1] == blocks.q
    q_bounds, k_bounds = mask.q_bounds(blocks.q), mask.k_bounds(blocks.k)
    shields_any = one_block.has_gaps(q, k, v, d_out, whole.total)

    def gradients_of(n, total: Gradients) -> Gradients:
        rows, j = turns[n // counted], n % counted
        mask_here = rows.of_masks(mask)
        k_block, v_block = (rows.take(x, j * blocks.k, blocks.k) for x in (k, v))

        def add_from(i, found, *, is_masked=False, shields=False):
            start, (dq, dk, dv) = i * blocks.q, found
            of_q = [rows.take(x, start, blocks.q) for x in (q, d_out)]
            of_q += [rows.take_numbers(x, start, blocks.q) for x in numbers]
            visible = one_block.visible(blocks.mask(mask_here, i, j), of_q[0]) if is_masked else None
            dq_more, dk_more, dv_more = one_block.gradients(*of_q, k_block, v_block, visible, shields=shields)
            return rows.add(dq, dq_more, start), dk + dk_more, dv + dv_more

        zero = jnp.zeros(k_block.mT.shape, accumulator_type(k.dtype))
        found = total.dq, zero, zero
        if is_one_block:  # faster without any loop
            dq, dk, dv = add_from(0, found, is_masked=True, shields=True)
        else:
            plan = visits(mask_here, *rows.of_masks((q_bounds, pick(k_bounds, j))))
            dq, dk, dv = plan.walk(add_from, found, shields=shields_any)
        keep = rows.put if before is None else rows.add
        dk, dv = (keep(x, part.mT, j * blocks.k) for x, part in ((total.dk, dk), (total.dv, dv)))
        return Gradients(dq, dk, dv)

    total = no_gradients(q, k)
    if before is not None:
        total = Gradients(*(pad(x, 1, like.shape[1]) for x, like in zip(before, total, strict=True)))
    dq, dk, dv = _each(turns.count * counted, gradients_of, total)
    return Gradients(dq[:, :q_length], dk[:, :k_length], dv[:, :k_length])


def _each(count: int, step: Callable, state):
    return step(0, state) if count == 1 else lax.fori_loop(0, count, step, state)
