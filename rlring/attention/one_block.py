"""Attention of one block of rows: the online softmax, forward, and the gradients of the block, backward.

Queries are flat, Q = G * T of them for each key/value head: one matrix product a row.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32

from rlring.attention.blocks import Visits
from rlring.attention.mask import Mask
from rlring.attention.softmax import finite_lse

MOST = 1e19  # of a sum of exponentials, in float32


def attend(
    q: Float[Array, "R Q H"], k: Float[Array, "R S H"], v: Float[Array, "R S H"], mask: Mask
) -> tuple[Float32[Array, "R Q H"], Float32[Array, "R Q"]]:
    """Returns out and lse of flat rows, at once: memory is Q * S. The mask has a row for each sequence or each row."""
    return first(q, k, v, visible(mask, q)).finish()


class Running(NamedTuple):
    """The online softmax: the greatest score so far keeps the exponentials in range, and out is still to be divided."""

    top: Float32[Array, "R Q"]
    total: Float32[Array, "R Q"]
    out: Float32[Array, "R Q H"]

    @classmethod
    def after(cls, out: Float32[Array, "R Q H"], lse: Float32[Array, "R Q"]) -> "Running":
        """Returns where attention over other keys has come to: relative to their lse the exponentials add up to 1."""
        return cls(lse / _scale(out), jnp.where(lse == -jnp.inf, 0.0, 1.0), out)

    @classmethod
    def none(cls, q: Float[Array, "R Q H"]) -> "Running":
        """Returns where attention over no keys has come to."""
        return cls.after(jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:2], -jnp.inf, jnp.float32))

    def is_in_range(self) -> Bool[Array, ""]:
        """Returns whether no sum came near the end of the numbers."""
        return (self.total.max() < MOST) & jnp.isfinite(jnp.abs(self.out).max())

    def finish(self) -> tuple[Float32[Array, "R Q H"], Float32[Array, "R Q"]]:
        """Returns out and lse."""
        total = jnp.where(self.total == 0.0, 1.0, self.total)
        return self.out / total[..., None], self.top * _scale(self.out) + jnp.log(total)


def softmax_over(plan: Visits, attend_to: Callable, so_far: Callable[[], Running]) -> Running:
    """Returns the softmax after attend_to(block, running, add=..., is_masked=...) at every block that is seen.

    so_far() is called where it is needed: kept from one place to the other it would be copied.
    """
    start = so_far()
    # One block tells how great the scores are, unless it is known.
    probes = jnp.where(jnp.isfinite(start.top).all(), 0, jnp.minimum(plan.whole, 1))
    known = plan.visit(0, probes, attend_to, start)
    fast = plan.visit(probes, plan.whole, partial(attend_to, add=_add_in_range), known)
    running = lax.cond(fast.is_in_range(), lambda: fast, lambda: plan.visit(0, plan.whole, attend_to, so_far()))
    return plan.visit(plan.whole, plan.seen, partial(attend_to, is_masked=True), running)


def first(q, k, v, visible: Bool[Array, "R Q S"] | None) -> Running:
    """Returns attention over a block of keys; visible None: every query sees every key."""
    scores = _scores(q, k, visible)
    top = scores.max(-1)
    weights = jnp.exp((scores - finite_lse(top)[..., None]) * _scale(q))
    return Running(top, weights.sum(-1), _weighted(weights, v))


def add(running: Running, q, k, v, visible: Bool[Array, "R Q S"] | None) -> Running:
    """Returns attention over a block of more keys."""
    scores = _scores(q, k, visible)
    top = jnp.maximum(running.top, scores.max(-1))
    finite = finite_lse(top)
    weights = jnp.exp((scores - finite[..., None]) * _scale(q))
    fade = jnp.exp((running.top - finite) * _scale(q))
    total = running.total * fade + weights.sum(-1)
    return Running(top, total, running.out * fade[..., None] + _weighted(weights, v))


def _add_in_range(running: Running, q, k, v, visible: None) -> Running:
    """Returns what add does, a pass faster, unless a score is far above the top so far: then is_in_range() is False.

    Any number near the greatest score serves as the top: it cancels.
    """
    weights = jnp.exp((_scores(q, k, visible) - running.top[..., None]) * _scale(q))
    return Running(running.top, running.total + weights.sum(-1), running.out + _weighted(weights, v))


def gradients(q, d_out, lse, delta, k, v, visible: Bool[Array, "R Q S"] | None):
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


def visible(mask: Mask, q: Float[Array, "R Q H"]) -> Bool[Array, "R Q S"]:
    """Returns what each query of these rows sees, of a mask for each row or for the rows of each sequence."""
    seen, (rows, queries, _) = mask.visible(), q.shape
    masks, length, keys = seen.shape
    every = jnp.broadcast_to(seen[:, None], (masks, rows * queries // (masks * length), length, keys))
    return every.reshape(rows, queries, keys)
