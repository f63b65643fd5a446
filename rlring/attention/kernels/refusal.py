"""What stands where a kernel asked for by its name lacks a mask: nothing that could pass for its work."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rlring.attention.kernel import Gradients, no_gradients
from rlring.attention.softmax import PartialAttention, nothing


class Refusal(NamedTuple):
    """A kernel whose every number is NaN: whether a mask is lacking is only known when the program runs."""

    heads_first = False

    def residual_dtype(self, dtype: jnp.dtype) -> jnp.dtype:
        return dtype

    def forward(self, q, k, v, *rest) -> PartialAttention:
        return _all_nan(nothing(q, v))

    def backward(self, q, k, v, *rest) -> Gradients:
        return _all_nan(no_gradients(q, k, v))


def _all_nan(tree):
    return jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), tree)
