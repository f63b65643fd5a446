"""Blockwise attention on one device: memory linear in length (Rabe and Staats 2112.05682, FlashAttention-2 2307.08691).

Two loops: over the blocks of one side, of rows that take turns; and over those blocks of the other side that the mask
shows. In the largest array, the scores of a block, no pass is made that can be saved.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32

from rlring.attention.blocks import Blocks, Visits, pad, pick, visits
from rlring.attention.local import Gradients, delta_of, no_gradients
from rlring.attention.mask import Mask
from rlring.attention.softmax import Partial, finite_lse, nothing

MOST = 1e19  # of a sum of exponentials, in float32


class BlockwiseKernel(NamedTuple):
    """The kernel in plain JAX: every mask, every type, every device."""

    blocks: Blocks

    def kept_type(self, dtype: jnp.dtype) -> jnp.dtype:
        return jnp.promote_types(dtype, jnp.float32)

    def forward(self, q, k, v, mask: Mask, before: Partial | None = None) -> Partial:
        return forward(q, k, v, mask, self.blocks, before)

    def backward(self, q, k, v, mask: Mask, out, lse, d_out, before: Gradients | None = None) -> Gradients:
        return backward(q, k, v, mask, out, lse, d_out, self.blocks, before)


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

    def attend_from(n, total: Partial) -> Partial:
        rows, i = turns[n // counted], n % counted
        start, mask_here = i * blocks.q, rows.of_masks(mask)
        q_block = rows.take(q, start, blocks.q)

        def attend_to(j, running, *, add=_next, is_masked=False):
            visible = _visible(blocks.mask(mask_here, i, j), q_block) if is_masked else None
            k_block, v_block = (rows.take(x, j * blocks.k, blocks.k) for x in (k, v))
            return add(running, q_block, k_block, v_block, visible)

        def so_far() -> _Running:
            out, lse = rows.take(total.out, start, blocks.q), rows.take_numbers(total.lse, start, blocks.q)
            return _Running.after(out, lse)

        if is_one_block:  # faster without any loop
            running = attend_to(0, so_far(), is_masked=True)
        else:
            plan = visits(mask_here, *rows.of_masks((pick(q_bounds, i), k_bounds)))
            running = _softmax_over(plan, attend_to, so_far)
        out, lse = running.finish()
        return Partial(rows.put(total.out, out, start), rows.put_numbers(total.lse, lse, start))

    total = nothing(q) if before is None else Partial(pad(before.out, 1, q.shape[1]), pad(before.lse, 2, q.shape[1]))
    out, lse = _each(turns.count * counted, attend_from, total)
    return Partial(out[:, :length], lse[:, :, :length])


def backward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Mask,
    out: Float[Array, "B T N H"],
    lse: Float32[Array, "B N T"],
    d_out: Float[Array, "B T N H"],
    blocks: Blocks,
    before: Gradients | None = None,
) -> Gradients:
    """Kernel.backward. The mask may also have a row for each key/value head of each sequence."""
    q_length, k_length, blocks = q.shape[1], k.shape[1], blocks.fit(q, k)
    turns = blocks.turns(q, k)
    delta = delta_of(out, d_out)
    q, k, v, mask = blocks.padded(q, k, v, mask)
    d_out, (lse, delta) = pad(d_out, 1, q.shape[1]), (pad(x, 2, q.shape[1]) for x in (finite_lse(lse), delta))
    counted = k.shape[1] // blocks.k
    is_one_block = counted == 1 and q.shape[1] == blocks.q
    q_bounds, k_bounds = mask.q_bounds(blocks.q), mask.k_bounds(blocks.k)

    def gradients_of(n, total: Gradients) -> Gradients:
        rows, j = turns[n // counted], n % counted
        mask_here = rows.of_masks(mask)
        k_block, v_block = (rows.take(x, j * blocks.k, blocks.k) for x in (k, v))

        def add_from(i, gradients, *, is_masked):
            start, (dq, dk, dv) = i * blocks.q, gradients
            of_q = [rows.take(x, start, blocks.q) for x in (q, d_out)]
            of_q += [rows.take_numbers(x, start, blocks.q) for x in (lse, delta)]
            visible = _visible(blocks.mask(mask_here, i, j), of_q[0]) if is_masked else None
            dq_more, dk_more, dv_more = _gradients(*of_q, k_block, v_block, visible)
            return rows.add(dq, dq_more, start), dk + dk_more, dv + dv_more

        zero = jnp.zeros(k_block.mT.shape, jnp.float32)
        gradients = total.dq, zero, zero
        if is_one_block:  # faster without any loop
            dq, dk, dv = add_from(0, gradients, is_masked=True)
        else:
            plan = visits(mask_here, *rows.of_masks((q_bounds, pick(k_bounds, j))))
            dq, dk, dv = plan.walk(add_from, gradients)
        keep = rows.put if before is None else rows.add
        dk, dv = (keep(x, part.mT, j * blocks.k) for x, part in ((total.dk, dk), (total.dv, dv)))
        return Gradients(dq, dk, dv)

    total = (
        no_gradients(q, k)
        if before is None
        else Gradients(*(pad(x, 1, like.shape[1]) for x, like in zip(before, (q, k, v), strict=True)))
    )
    dq, dk, dv = _each(turns.count * counted, gradients_of, total)
    return Gradients(dq[:, :q_length], dk[:, :k_length], dv[:, :k_length])


def in_one_block(
    q: Float[Array, "R Q H"], k: Float[Array, "R S H"], v: Float[Array, "R S H"], mask: Mask
) -> tuple[Float32[Array, "R Q H"], Float32[Array, "R Q"]]:
    """Returns out and lse of flat rows, at once: memory is Q * S. The mask has a row for each sequence or each row."""
    return _first(q, k, v, _visible(mask, q)).finish()


def _each(count: int, step: Callable, state):
    return step(0, state) if count == 1 else lax.fori_loop(0, count, step, state)


# One block. Its queries are flat, Q = G * T of them for each key/value head: one matrix product a row.


class _Running(NamedTuple):
    """The online softmax: the greatest score so far keeps the exponentials in range, and out is still to be divided."""

    top: Float32[Array, "R Q"]
    total: Float32[Array, "R Q"]
    out: Float32[Array, "R Q H"]

    @classmethod
    def after(cls, out: Float32[Array, "R Q H"], lse: Float32[Array, "R Q"]) -> "_Running":
        """Returns where attention over other keys has come to: relative to their lse the exponentials add up to 1."""
        return cls(lse / _scale(out), jnp.where(lse == -jnp.inf, 0.0, 1.0), out)

    @classmethod
    def none(cls, q: Float[Array, "R Q H"]) -> "_Running":
        """Returns where attention over no keys has come to."""
        return cls.after(jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:2], -jnp.inf, jnp.float32))

    def is_in_range(self) -> Bool[Array, ""]:
        """Returns whether no sum came near the end of the numbers."""
        return (self.total.max() < MOST) & jnp.isfinite(jnp.abs(self.out).max())

    def finish(self) -> tuple[Float32[Array, "R Q H"], Float32[Array, "R Q"]]:
        """Returns out and lse."""
        total = jnp.where(self.total == 0.0, 1.0, self.total)
        return self.out / total[..., None], self.top * _scale(self.out) + jnp.log(total)


def _softmax_over(plan: Visits, attend_to: Callable, so_far: Callable[[], _Running]) -> _Running:
    """Returns the softmax after attend_to(block, running, add=..., is_masked=...) at every block that is seen.

    so_far() is called where it is needed: kept from one place to the other it would be copied.
    """
    start = so_far()
    # One block tells how great the scores are, unless it is known.
    first = jnp.where(jnp.isfinite(start.top).all(), 0, jnp.minimum(plan.whole, 1))
    known = plan.visit(0, first, attend_to, start)
    fast = plan.visit(first, plan.whole, partial(attend_to, add=_next_in_range), known)
    running = lax.cond(fast.is_in_range(), lambda: fast, lambda: plan.visit(0, plan.whole, attend_to, so_far()))
    return plan.visit(plan.whole, plan.seen, partial(attend_to, is_masked=True), running)


def _first(q, k, v, visible: Bool[Array, "R Q S"] | None) -> _Running:
    scores = _scores(q, k, visible)
    top = scores.max(-1)
    weights = jnp.exp((scores - finite_lse(top)[..., None]) * _scale(q))
    return _Running(top, weights.sum(-1), _weighted(weights, v))


def _next(running: _Running, q, k, v, visible: Bool[Array, "R Q S"] | None) -> _Running:
    scores = _scores(q, k, visible)
    top = jnp.maximum(running.top, scores.max(-1))
    finite = finite_lse(top)
    weights = jnp.exp((scores - finite[..., None]) * _scale(q))
    fade = jnp.exp((running.top - finite) * _scale(q))
    total = running.total * fade + weights.sum(-1)
    return _Running(top, total, running.out * fade[..., None] + _weighted(weights, v))


def _next_in_range(running: _Running, q, k, v, visible: None) -> _Running:
    """Returns what _next does, a pass faster, unless a score is far above the top so far: then is_in_range() is False.

    Any number near the greatest score serves as the top: it cancels.
    """
    weights = jnp.exp((_scores(q, k, visible) - running.top[..., None]) * _scale(q))
    return _Running(running.top, running.total + weights.sum(-1), running.out + _weighted(weights, v))


def _gradients(q, d_out, lse, delta, k, v, visible: Bool[Array, "R Q S"] | None):
    """Returns dq[R, Q, H], dk[R, H, S] and dv[R, H, S]: tokens last, so that no product transposes the scores."""
    weights = jnp.exp(_scores(q, k, visible) * _scale(q) - lse[..., None])
    d_weights = jnp.einsum("rqh,rsh->rqs", d_out, v, preferred_element_type=jnp.float32)
    d_scores = weights * (d_weights - delta[..., None])  # rounded to bfloat16 it would double the error of dq
    dq = jnp.einsum("rqs,rsh->rqh", d_scores, k, preferred_element_type=jnp.float32) * _scale(q)
    dk = jnp.einsum("rqh,rqs->rhs", q, d_scores, preferred_element_type=jnp.float32) * _scale(q)
    dv = jnp.einsum("rqh,rqs->rhs", d_out, weights.astype(d_out.dtype), preferred_element_type=jnp.float32)
    return dq, dk, dv


def _scores(q, k, visible):
    """Returns the scores before their scaling, which costs a pass here and nothing inside the exponential."""
    # float32 whatever the compute type, as everything that a softmax touches.
    scores = jnp.einsum("rqh,rsh->rqs", q, k, preferred_element_type=jnp.float32)
    return scores if visible is None else jnp.where(visible, scores, -jnp.inf)


def _weighted(weights, v):
    return jnp.einsum("rqs,rsh->rqh", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)


def _scale(x: Array) -> float:
    return x.shape[-1] ** -0.5


def _visible(mask: Mask, q: Float[Array, "R Q H"]) -> Bool[Array, "R Q S"]:
    """Returns what each query of these rows sees, of a mask for each row or for the rows of each sequence."""
    visible, (rows, queries, _) = mask.visible(), q.shape
    masks, length, keys = visible.shape
    every = jnp.broadcast_to(visible[:, None], (masks, rows * queries // (masks * length), length, keys))
    return every.reshape(rows, queries, keys)
