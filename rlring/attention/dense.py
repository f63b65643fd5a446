"""Dense attention: the definition, and the reference every other scheme is tested against. Memory is quadratic."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from rlring.attention.mask import Mask
from rlring.attention.rows import rows_of_keys, rows_of_queries, tokens_of_rows
from rlring.attention.softmax import accumulator_type, finite


def dense_attention(
    q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], v: Float[Array, "B S K H"], mask: Mask
) -> Float[Array, "B T N H"]:
    """Returns softmax(q k^T / sqrt(H)) v over the visible keys, in q's type; rows that see nothing are 0.

    Gradients are JAX's own: nothing here is shared with the custom VJPs it is the reference for. A query that sees a
    token that is not finite is NaN; one that does not is as if the token were 0.
    """
    is_finite_q, is_finite_k = _is_finite(q), _is_finite(k) & _is_finite(v)
    q, k, v = jnp.where(is_finite_q, q, 0), jnp.where(is_finite_k, k, 0), jnp.where(is_finite_k, v, 0)
    scale = q.shape[-1] ** -0.5
    # Scores and softmax are at least float32 whatever the compute type: sums over a long context need the digits.
    accumulator = accumulator_type(q.dtype)
    q_RGTH, k_RSH, v_RSH = rows_of_queries(q, k.shape[2]), rows_of_keys(k), rows_of_keys(v)
    scores = jnp.einsum("rgth,rsh->rgts", q_RGTH, k_RSH, preferred_element_type=accumulator) * scale
    is_finite = rows_of_queries(is_finite_q, k.shape[2]) & rows_of_keys(is_finite_k)[:, None].mT
    scores = jnp.where(is_finite, scores, jnp.nan)
    visible = mask.repeated(k.shape[2]).visible()[:, None]
    # The greatest score is only there for range: the result does not depend on it, so neither does the gradient.
    top = finite(jnp.max(scores, -1, keepdims=True, where=visible, initial=-jnp.inf))
    weights = jnp.where(visible, jnp.exp(jnp.where(visible, scores - lax.stop_gradient(top), 0.0)), 0.0)
    total = weights.sum(-1, keepdims=True)
    weights = jnp.where(visible, weights / jnp.where(total == 0.0, 1.0, total), 0.0)
    out = jnp.einsum("rgts,rsh->rgth", weights.astype(v.dtype), v_RSH, preferred_element_type=accumulator)
    return tokens_of_rows(out, q.shape[0]).astype(q.dtype)


def _is_finite(x: Float[Array, "B T N H"]) -> Bool[Array, "B T N 1"]:
    return jnp.isfinite(x).all(-1, keepdims=True)
