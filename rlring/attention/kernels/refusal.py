"""The fallback of a kernel that was chosen by name: it returns NaN for masks that the kernel lacks."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rlring.attention.kernel import Gradients, no_gradients
from rlring.attention.softmax import PartialAttention, nothing


class Refusal(NamedTuple):
    """A kernel that returns only NaN. Whether a kernel lacks a mask is only known at run time, where no error can be
    raised."""

    heads_first = False

    def residual_dtype(self, dtype: jnp.dtype) -> jnp.dtype:
        return dtype

    def forward(self, q, k, v, *rest) -> PartialAttention:
        return _all_nan(nothing(q, v))

    def backward(self, q, k, v, *rest) -> Gradients:
        return _all_nan(no_gradients(q, k, v))


def _all_nan(tree):
    return jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), tree)
