"""Blockwise attention on one device: memory linear in length (Rabe and Staats 2112.05682, FlashAttention-2 2307.08691).

forward() and backward() are the block interface: what a hop of the ring, a gathered context or a head-split context
runs locally. backward() takes the *global* out and lse, so the gradients over disjoint sets of keys simply add up.

Three loops, each only where there is something to split: over rows, over the blocks of one side, over those blocks of
the other side that the mask shows. In the largest array, the scores of a block, no pass is made that can be saved.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Float32

from rlring.attention.blocks import Blocks, by_rows, joined, pad, pick, take, visits
from rlring.attention.mask import Mask
from rlring.attention.softmax import Partial, finite_lse


class Gradients(NamedTuple):
    """Always float32: the gradient of a key is a sum over every query of a long context."""

    dq: Float32[Array, "R G T H"]
    dk: Float32[Array, "R S H"]
    dv: Float32[Array, "R S H"]


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def blockwise_attention(
    q: Float[Array, "R G T H"], k: Float[Array, "R S H"], v: Float[Array, "R S H"], mask: Mask, blocks: Blocks
) -> Float[Array, "R G T H"]:
    """Returns attention in q's type. Lengths need not be multiples of the blocks, and may be shorter."""
    return forward(q, k, v, mask, blocks).out.astype(q.dtype)


def _attention_forward(q, k, v, mask, blocks):
    q, mask = tie_to_data(q, mask)
    out, lse = named_for_remat(*forward(q, k, v, mask, blocks), q.dtype)
    return out, (q, k, v, mask, out, lse)


def _attention_backward(blocks, residuals, d_out):
    q, k, v, mask, out, lse = residuals
    d_out, mask = tie_to_data(d_out, mask)
    dq, dk, dv = backward(q, k, v, mask, out, lse, d_out, blocks)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


blockwise_attention.defvjp(_attention_forward, _attention_backward)


def tie_to_data(data: Array, mask: Mask) -> tuple[Array, Mask]:
    """Returns both unchanged, but what follows from the mask now waits for the data.

    The trap: in a scan over layers what depends on positions alone is the same for all layers, so without this the
    masks of all pairs of blocks are computed ahead of the scan and kept for the backward: quadratic in the length.
    """
    return lax.optimization_barrier((data, mask))


def named_for_remat(out: Array, lse: Array, dtype: jnp.dtype) -> tuple[Array, Array]:
    """Returns out in the compute type and lse, by names with which a remat policy can keep them."""
    return checkpoint_name(out.astype(dtype), "attention_out"), checkpoint_name(lse, "attention_lse")


def forward(
    q: Float[Array, "R G T H"], k: Float[Array, "R S H"], v: Float[Array, "R S H"], mask: Mask, blocks: Blocks
) -> Partial:
    """Returns attention of q over these keys, and its lse; queries that see nothing have out 0 and lse -inf.

    The mask has B rows, R a multiple of B.
    """
    blocks = blocks.fit(q, k)
    attend = partial(_forward_rows, blocks=blocks)
    return by_rows(attend, blocks.rows(*q.shape[:2]), (q, k, v, mask.repeated(q.shape[0] // mask.rows)))


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
    """Returns what these keys add to the gradients, from the out and lse over *all* keys."""
    blocks = blocks.fit(q, k)
    # FlashAttention-2, equation 4: what the softmax's normalisation adds to the gradient, without the keys.
    delta = jnp.einsum("rgth,rgth->rgt", out, d_out, preferred_element_type=jnp.float32)
    mask = mask.repeated(q.shape[0] // mask.rows)
    differentiate = partial(_backward_rows, blocks=blocks)
    return by_rows(differentiate, blocks.rows(*q.shape[:2]), (q, k, v, mask, finite_lse(lse), delta, d_out))


def _forward_rows(q, k, v, mask: Mask, *, blocks: Blocks) -> Partial:
    length, group = q.shape[2], q.shape[1]
    if length <= blocks.q and k.shape[1] <= blocks.k:
        return _first(_flat(q), k, v, _visible(mask, group)).finish(group)  # short: faster without any loop
    q, k, v, mask = blocks.padded(q, k, v, mask)
    q_bounds, k_bounds = mask.q_bounds(blocks.q), mask.k_bounds(blocks.k)

    def attend_from(i):
        q_block = _flat(take(q, i, blocks.q, 2))

        def attend_to(j, running, *, is_masked):
            visible = _visible(blocks.mask(mask, i, j), group) if is_masked else None
            return _next(running, q_block, take(k, j, blocks.k, 1), take(v, j, blocks.k, 1), visible)

        plan = visits(mask, pick(q_bounds, i), k_bounds)
        return plan.walk(attend_to, _Running.start(q_block)).finish(group)

    parts = lax.map(attend_from, jnp.arange(q.shape[2] // blocks.q))
    return Partial(*(joined(part, 2)[:, :, :length] for part in parts))


def _backward_rows(q, k, v, mask: Mask, lse, delta, d_out, *, blocks: Blocks) -> Gradients:
    q_length, k_length, group = q.shape[2], k.shape[1], q.shape[1]
    if q_length <= blocks.q and k_length <= blocks.k:
        flat = (_flat(x) for x in (lse, delta, d_out))
        dq, dk, dv = _gradients(_flat(q), k, v, _visible(mask, group), *flat)
        return Gradients(dq.reshape(q.shape), dk.mT, dv.mT)
    q, k, v, mask = blocks.padded(q, k, v, mask)
    lse, delta, d_out = (pad(x, 2, q.shape[2]) for x in (lse, delta, d_out))
    q_bounds, k_bounds = mask.q_bounds(blocks.q), mask.k_bounds(blocks.k)

    def gradients_of(dq, j):
        k_block, v_block = take(k, j, blocks.k, 1), take(v, j, blocks.k, 1)

        def add_from(i, gradients, *, is_masked):
            visible = _visible(blocks.mask(mask, i, j), group) if is_masked else None
            q_block, *rest = (_flat(take(x, i, blocks.q, 2)) for x in (q, lse, delta, d_out))
            dq, dk, dv = gradients
            dq_more, dk_more, dv_more = _gradients(q_block, k_block, v_block, visible, *rest)
            dq_block = take(dq, i, blocks.q, 2)
            dq_block += dq_more.reshape(dq_block.shape)
            return lax.dynamic_update_slice_in_dim(dq, dq_block, i * blocks.q, 2), dk + dk_more, dv + dv_more

        zero = jnp.zeros(k_block.mT.shape, jnp.float32)
        plan = visits(mask, q_bounds, pick(k_bounds, j))
        dq, dk, dv = plan.walk(add_from, (dq, zero, zero))
        return dq, (dk.mT, dv.mT)

    dq, parts = lax.scan(gradients_of, jnp.zeros(q.shape, jnp.float32), jnp.arange(k.shape[1] // blocks.k))
    dk, dv = (joined(part, 1)[:, :k_length] for part in parts)
    return Gradients(dq[:, :, :q_length], dk, dv)


# One block. Its queries are flat, Q = G * T of them for each key/value head: one matrix product a row.


class _Running(NamedTuple):
    """The online softmax: the greatest score so far keeps the exponentials in range, and out is still to be divided."""

    top: Float32[Array, "R Q"]
    total: Float32[Array, "R Q"]
    out: Float32[Array, "R Q H"]

    @classmethod
    def start(cls, q: Float[Array, "R Q H"]) -> "_Running":
        zero = jnp.zeros(q.shape, jnp.float32)
        return cls(jnp.full_like(zero[..., 0], -jnp.inf), zero[..., 0], zero)

    def finish(self, group: int) -> Partial:
        total = jnp.where(self.total == 0.0, 1.0, self.total)
        out, lse = self.out / total[..., None], self.top * _scale(self.out) + jnp.log(total)
        return Partial(*(x.reshape(x.shape[0], group, -1, *x.shape[2:]) for x in (out, lse)))


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


def _gradients(q, k, v, visible: Bool[Array, "R Q S"] | None, lse, delta, d_out):
    """Returns dq[R, Q, H], dk[R, H, S] and dv[R, H, S]: tokens last, so that no product transposes the scores."""
    weights = jnp.exp(_scores(q, k, visible) * _scale(q) - lse[..., None])
    d_weights = jnp.einsum("rqh,rsh->rqs", d_out, v, preferred_element_type=jnp.float32)
    d_scores = (weights * (d_weights - delta[..., None])).astype(q.dtype)
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
