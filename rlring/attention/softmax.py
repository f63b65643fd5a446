"""Partial and merge(): softmax attention over a part of the keys, and how parts add up. Every scheme shares this."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Shaped


class Partial(NamedTuple):
    """Attention over some of the keys. Always float32: the parts of a long context are merged many times.

    A row that sees nothing has out = 0 and lse = -inf, the neutral element of merge().
    """

    out: Float32[Array, "B T N H"]
    lse: Float32[Array, "B N T"]  # log of the sum of the exponentials of the scores


def nothing(q: Float[Array, "B T N H"]) -> Partial:
    """Returns the Partial over no keys at all."""
    batch, length, heads, _ = q.shape
    return Partial(jnp.zeros(q.shape, jnp.float32), jnp.full((batch, heads, length), -jnp.inf, jnp.float32))


def merge(a: Partial, b: Partial) -> Partial:
    """Returns attention over the union of two disjoint sets of keys.

    Both weights are computed from their distance to the common lse, so neither exponential can overflow.
    """
    lse = jnp.logaddexp(a.lse, b.lse)
    finite = finite_lse(lse)
    weight_a, weight_b = jnp.exp(a.lse - finite), jnp.exp(b.lse - finite)
    return Partial(a.out * by_token(weight_a) + b.out * by_token(weight_b), lse)


def by_token(x: Shaped[Array, "B N T"]) -> Shaped[Array, "B T N 1"]:
    """Returns one number a query as what broadcasts against the queries."""
    return jnp.swapaxes(x, 1, 2)[..., None]


def finite_lse(lse: Float32[Array, "..."]) -> Float32[Array, "..."]:
    """Returns lse with 0 for -inf, so that exp(-inf - lse) is 0 and not NaN in a row that sees nothing."""
    return jnp.where(lse == -jnp.inf, 0.0, lse)
