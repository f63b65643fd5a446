"""Blockwise attention on one device: memory linear in length (Rabe and Staats 2112.05682, FlashAttention-2 2307.08691).

Three loops, each only where there is something to split: over rows, over the blocks of one side, over those blocks of
the other side that the mask shows. In the largest array, the scores of a block, no pass is made that can be saved.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32

from rlring.attention.blocks import Blocks, Visits, by_rows, pad, pick, put, take, visits
from rlring.attention.local import Gradients
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

    def backward(self, q, k, v, mask: Mask, out, lse, d_out) -> Gradients:
        return backward(q, k, v, mask, out, lse, d_out, self.blocks)


def forward(
    q: Float[Array, "R G T H"],
    k: Float[Array, "R S H"],
    v: Float[Array, "R S H"],
    mask: Mask,
    blocks: Blocks,
    before: Partial | None = None,
) -> Partial:
    """Kernel.forward."""
    blocks = blocks.fit(q, k)
    attend = partial(_forward_rows, blocks=blocks)
    return by_rows(attend, blocks.rows(*q.shape[:2]), (q, k, v, mask.repeated(q.shape[0] // mask.rows), before))


def backward(
    q: Float[Array, "R G T H"],
    k: Float[Array, "R S H"],
    v: Float[Array, "R S H"],
    mask: Mask,
    out: Float[Array, "R G T H"],
    lse: Float32[Array, "R G T"],
    d_out: Float[Array, "R G T H"],
    blocks: Blocks,
) -> Gradients:
    """Kernel.backward."""
    blocks = blocks.fit(q, k)
    # FlashAttention-2, equation 4: what the softmax's normalisation adds to the gradient, without the keys.
    delta = jnp.einsum("rgth,rgth->rgt", out, d_out, preferred_element_type=jnp.float32)
    mask = mask.repeated(q.shape[0] // mask.rows)
    differentiate = partial(_backward_rows, blocks=blocks)
    return by_rows(differentiate, blocks.rows(*q.shape[:2]), (q, k, v, mask, finite_lse(lse), delta, d_out))


def _forward_rows(q, k, v, mask: Mask, before: Partial | None, *, blocks: Blocks) -> Partial:
    length, group = q.shape[2], q.shape[1]
    if length <= blocks.q and k.shape[1] <= blocks.k:  # short: faster without any loop
        visible = _visible(mask, group)
        if before is None:
            return _first(_flat(q), k, v, visible).finish(group)
        return _next(_Running.after(before), _flat(q), k, v, visible).finish(group)
    q, k, v, mask = blocks.padded(q, k, v, mask)
    before = nothing(q) if before is None else jax.tree.map(lambda x: pad(x, 2, q.shape[2]), before)
    q_bounds, k_bounds = mask.q_bounds(blocks.q), mask.k_bounds(blocks.k)

    def attend_from(i, total: Partial) -> Partial:
        q_block = _flat(take(q, i, blocks.q, 2))

        def attend_to(j, running, *, add=_next, is_masked=False):
            visible = _visible(blocks.mask(mask, i, j), group) if is_masked else None
            return add(running, q_block, take(k, j, blocks.k, 1), take(v, j, blocks.k, 1), visible)

        start = _Running.after(jax.tree.map(lambda x: take(x, i, blocks.q, 2), total))
        here = _softmax_over(visits(mask, pick(q_bounds, i), k_bounds), attend_to, start).finish(group)
        return jax.tree.map(lambda x, part: put(x, part, i, 2), total, here)

    total = lax.fori_loop(0, q.shape[2] // blocks.q, attend_from, before)
    return jax.tree.map(lambda x: x[:, :, :length], total)


def _backward_rows(q, k, v, mask: Mask, lse, delta, d_out, *, blocks: Blocks) -> Gradients:
    q_length, k_length, group = q.shape[2], k.shape[1], q.shape[1]
    if q_length <= blocks.q and k_length <= blocks.k:
        flat = (_flat(x) for x in (lse, delta, d_out))
        dq, dk, dv = _gradients(_flat(q), k, v, _visible(mask, group), *flat)
        return Gradients(dq.reshape(q.shape), dk.mT, dv.mT)
    q, k, v, mask = blocks.padded(q, k, v, mask)
    lse, delta, d_out = (pad(x, 2, q.shape[2]) for x in (lse, delta, d_out))
    q_bounds, k_bounds = mask.q_bounds(blocks.q), mask.k_bounds(blocks.k)

    def gradients_of(j, total: Gradients) -> Gradients:
        k_block, v_block = take(k, j, blocks.k, 1), take(v, j, blocks.k, 1)

        def add_from(i, gradients, *, is_masked):
            visible = _visible(blocks.mask(mask, i, j), group) if is_masked else None
            q_block, *rest = (_flat(take(x, i, blocks.q, 2)) for x in (q, lse, delta, d_out))
            dq, dk, dv = gradients
            dq_more, dk_more, dv_more = _gradients(q_block, k_block, v_block, visible, *rest)
            dq_block = take(dq, i, blocks.q, 2)
            return put(dq, dq_block + dq_more.reshape(dq_block.shape), i, 2), dk + dk_more, dv + dv_more

        zero = jnp.zeros(k_block.mT.shape, jnp.float32)
        plan = visits(mask, q_bounds, pick(k_bounds, j))
        dq, dk, dv = plan.walk(add_from, (total.dq, zero, zero))
        return Gradients(dq, put(total.dk, dk.mT, j, 1), put(total.dv, dv.mT, j, 1))

    zero = Gradients(*(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v)))
    dq, dk, dv = lax.fori_loop(0, k.shape[1] // blocks.k, gradients_of, zero)
    return Gradients(dq[:, :, :q_length], dk[:, :k_length], dv[:, :k_length])


# One block. Its queries are flat, Q = G * T of them for each key/value head: one matrix product a row.


class _Running(NamedTuple):
    """The online softmax: the greatest score so far keeps the exponentials in range, and out is still to be divided."""

    top: Float32[Array, "R Q"]
    total: Float32[Array, "R Q"]
    out: Float32[Array, "R Q H"]

    @classmethod
    def after(cls, before: Partial) -> "_Running":
        """Returns where attention over other keys has come to: relative to their lse the exponentials add up to 1."""
        out, lse = (_flat(x) for x in before)
        return cls(lse / _scale(out), jnp.where(lse == -jnp.inf, 0.0, 1.0), out)

    def is_in_range(self) -> Bool[Array, ""]:
        """Returns whether no sum came near the end of the numbers."""
        return (self.total.max() < MOST) & jnp.isfinite(self.out).all()

    def finish(self, group: int) -> Partial:
        total = jnp.where(self.total == 0.0, 1.0, self.total)
        out, lse = self.out / total[..., None], self.top * _scale(self.out) + jnp.log(total)
        return Partial(*(x.reshape(x.shape[0], group, -1, *x.shape[2:]) for x in (out, lse)))


def _softmax_over(plan: Visits, attend_to: Callable, start: _Running) -> _Running:
    """Returns the softmax after attend_to(block, running, add=..., is_masked=...) at every block that is seen."""
    # One block tells how great the scores are, unless it is known.
    first = jnp.where(jnp.isfinite(start.top).all(), 0, jnp.minimum(plan.whole, 1))
    known = plan.visit(0, first, attend_to, start)
    fast = plan.visit(first, plan.whole, partial(attend_to, add=_next_in_range), known)
    safe = partial(plan.visit, first, plan.whole, attend_to, known)
    running = lax.cond(fast.is_in_range(), lambda: fast, safe)
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


def _gradients(q, k, v, visible: Bool[Array, "R Q S"] | None, lse, delta, d_out):
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


def _visible(mask: Mask, group: int) -> Bool[Array, "R Q S"]:
    visible_RTS = mask.visible()
    rows, length, keys = visible_RTS.shape
    return jnp.broadcast_to(visible_RTS[:, None], (rows, group, length, keys)).reshape(rows, group * length, keys)


def _flat(x: Array) -> Array:
    """Returns [R, G, T, ...] as [R, G * T, ...]."""
    return x.reshape(x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:])
