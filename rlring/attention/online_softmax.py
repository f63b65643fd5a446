"""Attention of one block: the online softmax of the forward, and the gradients of the backward.

Queries are flattened, Q = G * T per key/value head, so that each row needs one matrix product.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from rlring.attention.blocks import BlockSchedule
from rlring.attention.exponential import power_of_two
from rlring.attention.score_mod import Tile
from rlring.attention.softmax import accumulator_type, divisor, exponent_or_none, finite, product, zeros

MOST = 1e19  # limit of a sum of exponentials, well within the range of float32


class SoftmaxState(NamedTuple):
    """The state of the online softmax. Exponentials are relative to 2**exponent; out is not yet divided by total."""

    exponent: Float[Array, "R Q"]  # -inf for queries that have seen no key yet
    total: Float[Array, "R Q"]
    out: Float[Array, "R Q H"]

    @classmethod
    def after(
        cls, out: Float[Array, "R Q H"], exponent: Float[Array, "R Q"], total: Float[Array, "R Q"]
    ) -> "SoftmaxState":
        """Returns the state from the results of finish()."""
        return cls(exponent_or_none(exponent, total), total, out)

    @classmethod
    def none(cls, q: Float[Array, "R Q H"], value_size: int) -> "SoftmaxState":
        """Returns the state of the softmax over no keys."""
        dtype = accumulator_type(q.dtype)
        zero = zeros(q.shape[:2], dtype, q)
        return cls.after(zeros((*q.shape[:2], value_size), dtype, q), zero, zero)

    def is_in_range(self) -> Bool[Array, ""]:
        """Returns whether no sum came close to overflow."""
        return (self.total.max() < MOST) & jnp.isfinite(jnp.abs(self.out).max())

    def finish(self) -> tuple[Float[Array, "R Q H"], Float[Array, "R Q"], Float[Array, "R Q"]]:
        """Returns out, exponent and total, as in softmax.PartialAttention."""
        return self.out, finite(self.exponent), self.total


def softmax_over(
    plan: BlockSchedule, attend_to: Callable, so_far: Callable[[], SoftmaxState], *, shields: Bool[Array, ""]
) -> SoftmaxState:
    """Returns the softmax after attend_to(block, running, add=..., is_masked=..., shields=...) for every block seen.

    so_far() returns the initial state. It is called twice, because XLA would copy a state that is kept.
    """
    start = so_far()
    # The first block sets the exponents, unless they are already set.
    probes = jnp.where(jnp.isfinite(start.exponent).all(), 0, jnp.minimum(plan.whole, 1))
    known = plan.visit(0, probes, attend_to, start)
    fast = plan.visit(probes, plan.whole, partial(attend_to, add=_add_in_range), known)
    running = lax.cond(fast.is_in_range(), lambda: fast, lambda: plan.visit(0, plan.whole, attend_to, so_far()))
    return plan.visit_masked(attend_to, running, shields=shields)


def first(q, k, v, tile: Tile) -> SoftmaxState:
    """Returns the softmax over one block of keys."""
    logits = tile.logits(_scores(q, k))
    exponent = _greatest(logits, tile)
    weights = _weights(logits, finite(exponent), tile, q)
    return SoftmaxState(exponent, _sum(weights), _weighted(weights, v, tile))


def attend(
    q: Float[Array, "R Q H"], k: Float[Array, "R S H"], v: Float[Array, "R S V"], tile: Tile, *, shields: bool
) -> SoftmaxState:
    """Returns attention of flat rows over all keys at once, with memory Q * S. The tile must have a mask.

    With `shields`, NaN and infinity affect only the queries that see them, as in every scheme; without, the whole row.
    """
    if not shields:
        return first(q, k, v, tile)
    logits = tile.logits(_shielded_product(q, k))
    exponent = _greatest(logits, tile)
    weights = _weights(logits, finite(exponent), tile, q)
    out = _weighted(weights, v, tile)

    def shielded():  # slow, but shielding values for a matrix product would copy all of them
        # The weights are computed outside of the branch, because their gradients need a collective.
        kept = tile.kept(weights)[..., None]
        values = jnp.where(tile.visible[..., None], kept * v[:, None].astype(kept.dtype), 0)
        return values.sum(2, dtype=out.dtype) / tile.mod.kept_share

    return SoftmaxState(exponent, _sum(weights), lax.cond(jnp.isfinite(out).all(), lambda: out, shielded))


@jax.custom_jvp
def _shielded_product(q: Float[Array, "R Q H"], k: Float[Array, "R S H"]) -> Float[Array, "R Q S"]:
    """Returns _scores(); NaN and infinity in q or k do not enter the gradients of tokens that do not see them."""
    return _scores(q, k)


@_shielded_product.defjvp
def _product_jvp(primals, tangents):
    (q, k), (q_tangent, k_tangent) = primals, tangents
    q_finite, k_finite = (jnp.where(_is_finite(x), x, 0) for x in (q, k))
    return _shielded_product(q, k), _scores(q_tangent, k_finite) + _scores(q_finite, k_tangent)


def add(running: SoftmaxState, q, k, v, tile: Tile) -> SoftmaxState:
    """Returns the softmax after adding a block of keys."""
    logits = tile.logits(_scores(q, k))
    exponent = jnp.maximum(running.exponent, _greatest(logits, tile))
    weights = _weights(logits, finite(exponent), tile, q)
    fade = power_of_two(running.exponent, finite(exponent))
    total = running.total * fade + _sum(weights)
    return SoftmaxState(exponent, total, running.out * fade[..., None] + _weighted(weights, v, tile))


def _add_in_range(running: SoftmaxState, q, k, v, tile: Tile) -> SoftmaxState:
    """Like add(), but keeps the exponent, which saves a pass over the scores. If a score is far above the previous
    ones, is_in_range() of the result is False. Any exponent near that of the largest score will do, since it cancels.
    """
    weights = _weights(tile.logits(_scores(q, k)), running.exponent, tile, q)
    return SoftmaxState(running.exponent, running.total + _sum(weights), running.out + _weighted(weights, v, tile))


class BlockGradients(NamedTuple):
    """The gradients of a block. dk and dv have tokens last, so that no product has to transpose the scores."""

    dq: Float[Array, "R Q H"]
    dk: Float[Array, "R H S"]
    dv: Float[Array, "R H S"]
    logits: Float[Array, "R Q S"]


def gradients(q, d_out, exponent, total, delta, k, v, tile: Tile, *, shields: bool = False) -> BlockGradients:
    """Returns the gradients of the block.

    exponent and total are those over all keys. The weights equal those of the forward to the last bit. So d_logits sums
    to 0 over all keys, and a component that all keys share does not enter dq.
    """
    accumulator, mod = accumulator_type(q.dtype), tile.mod
    scores = _scores(q, k)
    weights = _weights(tile.logits(scores), exponent, tile, q).astype(accumulator) * (1.0 / divisor(total)[..., None])
    d_weights = tile.kept(product("rqh,rsh->rqs", d_out, v, accumulator))
    if mod.dropout:
        d_weights = d_weights / mod.kept_share
    d_logits = weights * (d_weights - delta[..., None])  # not rounded, because they cancel each other
    weights = tile.kept(weights)
    if shields:  # as in shielded(), here for the products with queries and keys
        weights = jnp.where(_is_finite(d_out), weights, jnp.nan)
        weights, d_logits = (jnp.where(tile.visible, x, 0) for x in (weights, d_logits))
        q, k, d_out = (jnp.where(_is_finite(x), x, 0) for x in (q, k, d_out))
    d_scores = mod.d_scores(d_logits, scores)
    if shields and mod.soft_cap is not None:  # tanh of a score that is not visible may be NaN
        d_scores = jnp.where(tile.visible, d_scores, 0)
    dq = product("rqs,rsh->rqh", d_scores, k, accumulator) * mod.scale
    dk = product("rqh,rqs->rhs", q, d_scores, accumulator) * mod.scale
    dv = product("rqh,rqs->rhs", d_out, _for_product(weights, q), accumulator)
    return BlockGradients(dq, dk, dv / mod.kept_share if mod.dropout else dv, d_logits)


def has_gaps(*arrays: Float[Array, "..."]) -> Bool[Array, ""]:
    """Returns whether any number of the arrays is NaN or infinite. Then partly visible blocks are shielded."""

    def is_finite(x: Array) -> Bool[Array, ""]:
        # A sum with NaN or infinity is not finite. XLA on CPU sums fastest in a matrix product; its max may skip NaN.
        ones = jnp.ones(x.shape[-1], x.dtype)
        return jnp.isfinite(jnp.dot(x, ones, preferred_element_type=accumulator_type(x.dtype))).all()

    return ~jnp.stack([is_finite(x) for x in arrays]).all()


def shielded(k: Float[Array, "R S H"], v: Float[Array, "R S V"]) -> tuple[Float[Array, "R S H"], Float[Array, "R S V"]]:
    """Returns keys and values for a masked block, such that NaN and infinity affect only the queries that see them.

    A masked weight is 0, but 0 * NaN is NaN. So values that are not finite become 0, and their keys become NaN: only a
    query that sees such a key gets NaN.
    """
    is_finite = _is_finite(v)
    return jnp.where(is_finite, k, jnp.nan), jnp.where(is_finite, v, 0)


def _scores(q, k):
    """Returns q k^T. It is scaled later, inside the exponential, where scaling needs no extra pass."""
    return product("rqh,rsh->rqs", q, k, accumulator_type(q.dtype))


def _greatest(logits, tile: Tile):
    """Returns the smallest integer exponent relative to which no weight exceeds 1."""
    return jnp.ceil(logits.max(-1) * tile.mod.unit)


def _weights(logits, exponent, tile: Tile, q):
    """Returns exp(logit) / 2**exponent."""
    return _for_product(power_of_two(logits * tile.mod.unit, exponent[..., None]), q)


def _for_product(weights, q):
    """Returns weights in the type in which they are multiplied with values.

    This is bfloat16 if the arrays are bfloat16, which matrix units multiply fastest. It is never float16, in which the
    small weights of a long context would underflow to 0.
    """
    return weights.astype(jnp.bfloat16) if q.dtype == jnp.bfloat16 else weights


def _sum(weights):
    return weights.sum(-1, dtype=accumulator_type(weights.dtype))


def _weighted(weights, v, tile: Tile):
    out = product("rqs,rsh->rqh", tile.kept(weights), v, accumulator_type(v.dtype))
    return out / tile.mod.kept_share if tile.mod.dropout else out


def _is_finite(x: Float[Array, "R S H"]) -> Bool[Array, "R S 1"]:
    return jnp.isfinite(x).all(-1, keepdims=True)
