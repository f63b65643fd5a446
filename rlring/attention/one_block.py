"""Attention of one block of rows: the online softmax, forward, and the gradients of the block, backward.

Queries are flat, Q = G * T of them for each key/value head: one matrix product a row.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from rlring.attention.blocks import Visits
from rlring.attention.exponential import power_of_two
from rlring.attention.mask import Mask
from rlring.attention.softmax import accumulator_type, divisor, exponent_or_none, finite, product

MOST = 1e19  # of a sum of exponentials, in float32
LOG2_E = float(1.0 / np.log(2))


class Running(NamedTuple):
    """The online softmax: the exponent keeps the exponentials in range, and out is still to be divided by the total."""

    exponent: Float[Array, "R Q"]  # -inf where nothing has been seen
    total: Float[Array, "R Q"]
    out: Float[Array, "R Q H"]

    @classmethod
    def after(cls, out: Float[Array, "R Q H"], exponent: Float[Array, "R Q"], total: Float[Array, "R Q"]) -> "Running":
        """Resumes from what finish() returned."""
        return cls(exponent_or_none(exponent, total), total, out)

    @classmethod
    def none(cls, q: Float[Array, "R Q H"]) -> "Running":
        """Returns the softmax over no keys."""
        dtype = accumulator_type(q.dtype)
        zero = jnp.zeros(q.shape[:2], dtype)
        return cls.after(jnp.zeros(q.shape, dtype), zero, zero)

    def is_in_range(self) -> Bool[Array, ""]:
        """Returns whether no sum came near the end of the numbers."""
        return (self.total.max() < MOST) & jnp.isfinite(jnp.abs(self.out).max())

    def finish(self) -> tuple[Float[Array, "R Q H"], Float[Array, "R Q"], Float[Array, "R Q"]]:
        """Returns out, exponent and total, as softmax.Partial has them."""
        return self.out, finite(self.exponent), self.total


def softmax_over(
    plan: Visits, attend_to: Callable, so_far: Callable[[], Running], *, shields: Bool[Array, ""]
) -> Running:
    """Returns the softmax after attend_to(block, running, add=..., is_masked=..., shields=...) at every block seen.

    so_far() is called where it is needed: kept from one place to the other it would be copied.
    """
    start = so_far()
    # One block tells how great the scores are, unless it is known.
    probes = jnp.where(jnp.isfinite(start.exponent).all(), 0, jnp.minimum(plan.whole, 1))
    known = plan.visit(0, probes, attend_to, start)
    fast = plan.visit(probes, plan.whole, partial(attend_to, add=_add_in_range), known)
    running = lax.cond(fast.is_in_range(), lambda: fast, lambda: plan.visit(0, plan.whole, attend_to, so_far()))
    return plan.visit_masked(attend_to, running, shields=shields)


def first(q, k, v, visible: Bool[Array, "R Q S"] | None) -> Running:
    """Returns attention over a block of keys; visible None: every query sees every key."""
    scores = _scores(q, k, visible)
    exponent = _greatest(scores, q)
    weights = _weights(scores, finite(exponent), q)
    return Running(exponent, _sum(weights), _weighted(weights, v))


def attend(
    q: Float[Array, "R Q H"], k: Float[Array, "R S H"], v: Float[Array, "R S H"], mask: Mask, *, shields: bool
) -> Running:
    """Returns attention of flat rows, at once: memory is Q * S. The mask has a row for each of them, or each sequence.

    shields: NaN and infinity reach only the queries that see them, as in every scheme; else all of the row.
    """
    seen = visible(mask, q)
    scores = jnp.where(seen, _shielded_product(q, k), -jnp.inf) if shields else _scores(q, k, seen)
    exponent = _greatest(scores, q)
    weights = _weights(scores, finite(exponent), q)
    out = _weighted(weights, v)
    if shields:

        def shielded():  # slow, where shielded values for the product would be a copy of all of them
            return jnp.where(seen[..., None], weights[..., None] * v[:, None].astype(weights.dtype), 0).sum(
                2, dtype=out.dtype
            )

        out = lax.cond(jnp.isfinite(out).all(), lambda: out, shielded)
    return Running(exponent, _sum(weights), out)


@jax.custom_jvp
def _shielded_product(q: Float[Array, "R Q H"], k: Float[Array, "R S H"]) -> Float[Array, "R Q S"]:
    """Returns _scores(); what is not finite in one of the two reaches no gradient of what does not see it."""
    return _scores(q, k, None)


@_shielded_product.defjvp
def _product_jvp(primals, tangents):
    (q, k), (q_tangent, k_tangent) = primals, tangents
    q_finite, k_finite = (jnp.where(_is_finite(x), x, 0) for x in (q, k))
    return _shielded_product(q, k), _scores(q_tangent, k_finite, None) + _scores(q_finite, k_tangent, None)


def add(running: Running, q, k, v, visible: Bool[Array, "R Q S"] | None) -> Running:
    """Returns attention over a block of more keys."""
    scores = _scores(q, k, visible)
    exponent = jnp.maximum(running.exponent, _greatest(scores, q))
    weights = _weights(scores, finite(exponent), q)
    fade = power_of_two(running.exponent, finite(exponent))
    total = running.total * fade + _sum(weights)
    return Running(exponent, total, running.out * fade[..., None] + _weighted(weights, v))


def _add_in_range(running: Running, q, k, v, visible: None) -> Running:
    """Returns what add does, a pass faster, unless a score is far above those so far: then is_in_range() is False.

    Any exponent near that of the greatest score serves: it cancels.
    """
    weights = _weights(_scores(q, k, visible), running.exponent, q)
    return Running(running.exponent, running.total + _sum(weights), running.out + _weighted(weights, v))


def gradients(q, d_out, exponent, total, delta, k, v, visible: Bool[Array, "R Q S"] | None, *, shields: bool = False):
    """Returns dq[R, Q, H], dk[R, H, S] and dv[R, H, S]: tokens last, so that no product transposes the scores.

    exponent and total are those over all keys. The weights are those of the forward, to the last bit: so over all keys
    d_scores adds up to 0, and what the keys have in common adds nothing to dq.
    """
    accumulator = accumulator_type(q.dtype)
    weights = _weights(_scores(q, k, visible), exponent, q).astype(accumulator) * (1.0 / divisor(total)[..., None])
    d_weights = product("rqh,rsh->rqs", d_out, v, accumulator)
    d_scores = weights * (d_weights - delta[..., None])  # never rounded: they cancel each other
    if shields:  # as shielded() says, here for the products with queries and keys
        weights = jnp.where(_is_finite(d_out), weights, jnp.nan)
        weights, d_scores = (jnp.where(visible, x, 0) for x in (weights, d_scores))
        q, k, d_out = (jnp.where(_is_finite(x), x, 0) for x in (q, k, d_out))
    dq = product("rqs,rsh->rqh", d_scores, k, accumulator) * _scale(q)
    dk = product("rqh,rqs->rhs", q, d_scores, accumulator) * _scale(q)
    dv = product("rqh,rqs->rhs", d_out, _for_product(weights, q), accumulator)
    return dq, dk, dv


def has_gaps(*arrays: Float[Array, "..."]) -> Bool[Array, ""]:
    """Returns whether any number of the arrays is NaN or infinite: then blocks seen in part are shielded."""

    def is_finite(x: Array) -> Bool[Array, ""]:
        # A sum is not finite where a number is not. XLA on CPU adds fastest in a product, and its max may skip NaN.
        ones = jnp.ones(x.shape[-1], x.dtype)
        return jnp.isfinite(jnp.dot(x, ones, preferred_element_type=accumulator_type(x.dtype))).all()

    return ~jnp.stack([is_finite(x) for x in arrays]).all()


def shielded(k: Float[Array, "R S H"], v: Float[Array, "R S H"]) -> tuple[Float[Array, "R S H"], Float[Array, "R S H"]]:
    """Returns keys and values for a block that is masked: NaN and infinity reach only the queries that see them.

    A masked weight is 0, but 0 * NaN is NaN. So values that are not finite become 0, and their keys NaN: a query that
    sees such a key gets NaN.
    """
    is_finite = _is_finite(v)
    return jnp.where(is_finite, k, jnp.nan), jnp.where(is_finite, v, 0)


def visible(mask: Mask, q: Float[Array, "R Q H"]) -> Bool[Array, "R Q S"]:
    """Returns what each query of these rows sees, of a mask for each row or for the rows of each sequence."""
    seen, (rows, queries, _) = mask.visible(), q.shape
    masks, length, keys = seen.shape
    every = jnp.broadcast_to(seen[:, None], (masks, rows * queries // (masks * length), length, keys))
    return every.reshape(rows, queries, keys)


def _scale(q: Float[Array, "R Q H"]) -> float:
    """Returns what scores are multiplied by: 1 / sqrt(H) (Vaswani et al. 1706.03762, equation 1)."""
    return q.shape[-1] ** -0.5


def _scores(q, k, visible):
    """Returns the scores before their scaling, which costs a pass here and nothing inside the exponential."""
    scores = product("rqh,rsh->rqs", q, k, accumulator_type(q.dtype))
    return scores if visible is None else jnp.where(visible, scores, -jnp.inf)


def _greatest(scores, q):
    """Returns the exponent to which no weight is greater than 1."""
    return jnp.ceil(scores.max(-1) * (_scale(q) * LOG2_E))


def _weights(scores, exponent, q):
    """Returns exp(score * scale) / 2**exponent."""
    return _for_product(power_of_two(scores * (_scale(q) * LOG2_E), exponent[..., None]), q)


def _for_product(weights, q):
    """Returns weights in the type in which they are multiplied with values.

    That is bfloat16 where the arrays are, which matrix units multiply fastest. It is not float16, in which the small
    weights of a long context would be 0.
    """
    return weights.astype(jnp.bfloat16) if q.dtype == jnp.bfloat16 else weights


def _sum(weights):
    return weights.sum(-1, dtype=accumulator_type(weights.dtype))


def _weighted(weights, v):
    return product("rqs,rsh->rqh", weights, v, accumulator_type(v.dtype))


def _is_finite(x: Float[Array, "R S H"]) -> Bool[Array, "R S 1"]:
    return jnp.isfinite(x).all(-1, keepdims=True)
