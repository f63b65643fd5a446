"""Dense attention: the definition, against which all other schemes are tested. Memory is quadratic in the length."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from rlring.attention.kernel import with_sinks
from rlring.attention.mask import Mask
from rlring.attention.rows import all_rows, rows_of_keys, rows_of_queries, tokens_of_rows
from rlring.attention.score_mod import ScoreMod, Tile
from rlring.attention.softmax import accumulator_type, finite


def dense_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    mask: Mask,
    mod: ScoreMod | None = None,
) -> Float[Array, "B T N V"]:
    """Returns attention over the visible keys, in q's type; queries that see no key give 0.

    Gradients come from JAX's automatic differentiation, independently of the custom VJP of the other schemes. A query
    that sees a token with NaN or infinity gives NaN; other queries are not affected by the token.
    """
    return dense(q, k, v, mask, mod or ScoreMod.plain(q.shape[-1]))[0].astype(q.dtype)


def dense(
    q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], v: Float[Array, "B S K V"], mask: Mask, mod: ScoreMod
) -> tuple[Float[Array, "B T N V"], Float[Array, "B N T"]]:
    """Returns attention and the log-sum-exps of its logits, both at least float32."""
    is_finite_q, is_finite_k = _is_finite(q), _is_finite(k) & _is_finite(v)
    q, k, v = jnp.where(is_finite_q, q, 0), jnp.where(is_finite_k, k, 0), jnp.where(is_finite_k, v, 0)
    # Scores and softmax are at least float32 whatever the compute type: sums over a long context need the digits.
    accumulator, (batch, length, heads, _) = accumulator_type(q.dtype), q.shape
    q_RGTH, k_RSH, v_RSH = rows_of_queries(q, k.shape[2]), rows_of_keys(k), rows_of_keys(v)
    scores = jnp.einsum("rgth,rsh->rgts", q_RGTH, k_RSH, preferred_element_type=accumulator)
    flat = q_RGTH.reshape(scores.shape[0], -1, q.shape[3])
    terms = all_rows(batch, k.shape[2]).terms(mod, 0, length, mask.span_of_keys)
    tile = Tile.of(mod, terms, mask, flat, is_masked=True)
    bias, visible = (None if x is None else x.reshape(scores.shape) for x in (tile.bias, tile.visible))
    logits = scores * mod.scale
    logits = logits if mod.soft_cap is None else mod.soft_cap * jnp.tanh(logits / mod.soft_cap)
    logits = logits if bias is None else logits + bias
    is_finite = rows_of_queries(is_finite_q, k.shape[2]) & rows_of_keys(is_finite_k)[:, None].mT
    logits = jnp.where(is_finite, logits, jnp.nan)
    # The largest logit is subtracted only for range. The result does not depend on it, so it needs no gradient.
    top = finite(jnp.max(logits, -1, keepdims=True, where=visible, initial=-jnp.inf))
    weights = jnp.where(visible, jnp.exp(jnp.where(visible, logits - lax.stop_gradient(top), 0.0)), 0.0)
    total = weights.sum(-1, keepdims=True)
    weights = jnp.where(visible, weights / jnp.where(total == 0.0, 1.0, total), 0.0)
    if tile.keep is not None:
        weights = jnp.where(tile.keep.reshape(scores.shape), weights / mod.kept_share, 0.0)
    out = jnp.einsum("rgts,rsh->rgth", weights.astype(v.dtype), v_RSH, preferred_element_type=accumulator)
    lse = jnp.where(total == 0.0, -jnp.inf, lax.stop_gradient(top) + jnp.log(jnp.where(total == 0.0, 1.0, total)))
    out, lse = tokens_of_rows(out, batch), lse.reshape(batch, heads, length)
    return (out, lse) if mod.sinks is None else with_sinks(out, lse, mod.sinks)


def _is_finite(x: Float[Array, "B T N H"]) -> Bool[Array, "B T N 1"]:
    return jnp.isfinite(x).all(-1, keepdims=True)
