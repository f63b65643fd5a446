"""Attention where the keys are: the two functions of a kernel, and attention on one device made of them.

A kernel is the block interface that every scheme is built on: what a hop of the ring, a gathered context or a
head-split context runs locally. backward() takes attention over *all* keys, so gradients over disjoint sets of keys
simply add up.
"""

from functools import partial
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from rlring.attention.mask import Mask
from rlring.attention.softmax import Partial, Whole, accumulator_type, product


class Gradients(NamedTuple):
    """At least float32: the gradient of a key is a sum over every query of a long context."""

    dq: Float[Array, "B T N H"]
    dk: Float[Array, "B S K H"]
    dv: Float[Array, "B S K H"]


def no_gradients(q: Float[Array, "B T N H"], k: Float[Array, "B S K H"]) -> Gradients:
    """Returns zeros."""
    return Gradients(*(jnp.zeros(x.shape, accumulator_type(q.dtype)) for x in (q, k, k)))


class Kernel(Protocol):
    """How attention over keys that are here is computed. Hashable: it is a static argument."""

    @property
    def heads_first(self) -> bool:
        """Whether keys go around a ring with their heads before their tokens, as the kernel wants them."""
        ...

    def kept_type(self, dtype: jnp.dtype) -> jnp.dtype:
        """Returns the type in which the out is kept for backward(), given that of the arrays.

        In bfloat16 it is the largest error of all: every gradient of a query has that of sum(out * d_out).
        """
        ...

    def forward(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K H"],
        v: Float[Array, "B S K H"],
        mask: Mask,
        before: Partial | None = None,
    ) -> Partial:
        """Returns attention of q over these keys.

        before: attention over other keys, to go on from.
        """
        ...

    def backward(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K H"],
        v: Float[Array, "B S K H"],
        mask: Mask,
        whole: Whole,
        d_out: Float[Array, "B T N H"],
        before: Gradients | None = None,
    ) -> Gradients:
        """Returns the gradients of attention over these keys; whole: attention over *all* keys.

        before: gradients to add them to.
        """
        ...


def delta_of(out: Float[Array, "B T N H"], d_out: Float[Array, "B T N H"]) -> Float[Array, "B N T"]:
    """Returns what the softmax's normalisation adds to the gradient, without the keys: FlashAttention-2, equation 4."""
    # As a sum, or with its result turned round, XLA on CPU takes forty times as long (jax 0.10).
    accumulator = accumulator_type(d_out.dtype)
    return jnp.swapaxes(product("btnh,btnh->btn", out, d_out, accumulator), 1, 2)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def local_attention(
    q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], v: Float[Array, "B S K H"], mask: Mask, kernel: Kernel
) -> Float[Array, "B T N H"]:
    """Returns attention in q's type, in which it is computed; gradients of k and v have theirs. Lengths need not be
    multiples of a kernel's blocks."""
    return kernel.forward(q, *as_computed(q, k, v), mask).whole().out.astype(q.dtype)


def _attention_forward(q, k, v, mask, kernel):
    q, mask = tie_to_data(q, mask)
    whole = named_for_remat(kernel.forward(q, *as_computed(q, k, v), mask), kernel.kept_type(q.dtype))
    return whole.out.astype(q.dtype), (q, k, v, mask, whole)


def _attention_backward(kernel, residuals, d_out):
    q, k, v, mask, whole = residuals
    d_out, mask = tie_to_data(d_out, mask)
    dq, dk, dv = kernel.backward(q, *as_computed(q, k, v), mask, whole, d_out)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


local_attention.defvjp(_attention_forward, _attention_backward)


def as_computed(q: Array, k: Array, v: Array) -> tuple[Array, Array]:
    """Returns keys and values in the type of the queries."""
    return k.astype(q.dtype), v.astype(q.dtype)


def tie_to_data(data: Array, mask: Mask) -> tuple[Array, Mask]:
    """Returns both unchanged, but what follows from the mask now waits for the data.

    The trap: in a scan over layers what depends on positions alone is the same for all layers, so without this the
    masks of all pairs of blocks are computed ahead of the scan and kept for the backward: quadratic in the length.
    """
    return lax.optimization_barrier((data, mask))


def named_for_remat(total: Partial, dtype: jnp.dtype) -> Whole:
    """Returns attention over all keys with out in this type, by names with which a remat policy can keep it."""
    whole = total.whole()
    numbers = (checkpoint_name(x, "attention_lse") for x in (whole.exponent, whole.total))
    return Whole(checkpoint_name(whole.out.astype(dtype), "attention_out"), *numbers)
