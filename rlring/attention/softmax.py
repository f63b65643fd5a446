"""Partial and merge(): softmax attention over a part of the keys, and how the parts add up. Every scheme shares this.

Inside the schemes arrays are rows: a row is one key/value head of one sequence, R = B * K of them, and query heads are
grouped by the row they read, N = K * G: q[R, G, T, H], k[R, S, H], v[R, S, H]. So a block's product is one batched
matrix product, and rows can take turns.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32


class Partial(NamedTuple):
    """Attention over some of the keys. Always float32: the parts of a long context are merged many times.

    A row that sees nothing has out = 0 and lse = -inf, the neutral element of merge().
    """

    out: Float32[Array, "*batch T H"]
    lse: Float32[Array, "*batch T"]  # log of the sum of the exponentials of the scores


def nothing(like: Float[Array, "*batch T H"]) -> Partial:
    """Returns the Partial over no keys at all for queries of this shape."""
    return Partial(jnp.zeros(like.shape, jnp.float32), jnp.full(like.shape[:-1], -jnp.inf, jnp.float32))


def merge(a: Partial, b: Partial) -> Partial:
    """Returns attention over the union of two disjoint sets of keys.

    Both weights are computed from their distance to the common lse, so neither exponential can overflow.
    """
    lse = jnp.logaddexp(a.lse, b.lse)
    finite = finite_lse(lse)
    weight_a, weight_b = jnp.exp(a.lse - finite), jnp.exp(b.lse - finite)
    return Partial(a.out * weight_a[..., None] + b.out * weight_b[..., None], lse)


def finite_lse(lse: Float32[Array, "..."]) -> Float32[Array, "..."]:
    """Returns lse with 0 for -inf, so that exp(-inf - lse) is 0 and not NaN in a row that sees nothing."""
    return jnp.where(lse == -jnp.inf, 0.0, lse)


def rows_of_queries(q: Float[Array, "B T N H"], kv_heads: int) -> Float[Array, "R G T H"]:
    """Returns queries as rows; head n reads key/value head n // G."""
    batch, length, heads, size = q.shape
    grouped = q.reshape(batch, length, kv_heads, heads // kv_heads, size)
    return grouped.transpose(0, 2, 3, 1, 4).reshape(batch * kv_heads, heads // kv_heads, length, size)


def rows_of_keys(k: Float[Array, "B S K H"]) -> Float[Array, "R S H"]:
    """Returns keys or values as rows."""
    batch, length, heads, size = k.shape
    return k.transpose(0, 2, 1, 3).reshape(batch * heads, length, size)


def tokens_of_rows(out: Float[Array, "R G T H"], batch: int) -> Float[Array, "B T N H"]:
    """Returns the inverse of rows_of_queries."""
    rows, group, length, size = out.shape
    grouped = out.reshape(batch, rows // batch, group, length, size)
    return grouped.transpose(0, 3, 1, 2, 4).reshape(batch, length, rows // batch * group, size)
