"""Kernel: the block interface that every scheme is built on, and is; and the one custom VJP around it.

A kernel is two functions. forward() returns attention over some keys; backward() takes attention over *all* keys, so
gradients over disjoint sets of keys simply add up. What computes on one device is a kernel, and so is what makes the
same of several devices: a ring of kernels, a kernel over gathered keys.
"""

from dataclasses import replace
from functools import partial
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from rlring.attention.forward_mode import forward_only
from rlring.attention.mask import Mask
from rlring.attention.score_mod import ModGradients, ScoreMod
from rlring.attention.softmax import PartialAttention, Whole, accumulator_type, by_token, product, zeros


class Gradients(NamedTuple):
    """At least float32: the gradient of a key is a sum over every query of a long context."""

    dq: Float[Array, "B T N H"]
    dk: Float[Array, "B S K H"]
    dv: Float[Array, "B S K V"]
    mod: ModGradients = ModGradients()


def no_gradients(q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], v: Float[Array, "B S K V"]) -> Gradients:
    """Returns zeros, without those of a ScoreMod."""
    return Gradients(*(zeros(x.shape, accumulator_type(q.dtype), x) for x in (q, k, v)))


class BackwardInputs(NamedTuple):
    """What backward() needs to know of attention over all keys: its results, and the gradient that comes back."""

    out: Float[Array, "B T N V"]
    d_out: Float[Array, "B T N V"]
    exponent: Float[Array, "B N T"]  # as those of the Whole
    total: Float[Array, "B N T"]
    delta: Float[Array, "B N T"]  # what the softmax's normalisation adds to the gradient of each logit
    d_lse: Float[Array, "B N T"] | None = None  # the gradient of the lse, which is taken off the delta

    @classmethod
    def of(
        cls, whole: Whole, d_out: Float[Array, "B T N V"], d_lse: Float[Array, "B N T"] | None = None
    ) -> "BackwardInputs":
        """Returns it without the keys: FlashAttention-2, equation 4."""
        none = cls(whole.out, d_out, whole.exponent, whole.total, whole.total, d_lse)
        return none.with_delta(delta_of(whole.out, d_out))

    def with_delta(self, delta: Float[Array, "B N T"]) -> "BackwardInputs":
        """Returns it with a delta_of(), from which the gradient of the lse is taken off."""
        if self.d_lse is not None:
            delta -= jnp.where(self.total == 0.0, 0.0, self.d_lse.astype(delta.dtype))
        return self._replace(delta=delta)

    @property
    def whole(self) -> Whole:
        return Whole(self.out, self.exponent, self.total)


@runtime_checkable
class Kernel(Protocol):
    """How attention is computed. Hashable: it is a static argument."""

    @property
    def heads_first(self) -> bool:
        """Whether keys go around a ring with their heads before their tokens, as the kernel wants them."""
        ...

    def residual_dtype(self, dtype: jnp.dtype) -> jnp.dtype:
        """Returns the type in which the out is kept for backward(), given that of the arrays.

        In bfloat16 it is the largest error of all: every gradient of a query has that of sum(out * d_out).
        """
        ...

    def forward(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K H"],
        v: Float[Array, "B S K V"],
        mask: Mask,
        mod: ScoreMod,
        before: PartialAttention | None = None,
    ) -> PartialAttention:
        """Returns attention of q over these keys.

        before: attention over other keys, to go on from.
        """
        ...

    def backward(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K H"],
        v: Float[Array, "B S K V"],
        mask: Mask,
        mod: ScoreMod,
        inputs: BackwardInputs,
        before: Gradients | None = None,
    ) -> Gradients:
        """Returns the gradients of attention over these keys; inputs: of attention over *all* keys.

        before: gradients to add them to.
        """
        ...


def delta_of(out: Float[Array, "B T N V"], d_out: Float[Array, "B T N V"]) -> Float[Array, "B N T"]:
    """Returns sum(out * d_out) of each query."""
    # As a sum, or with its result turned round, XLA on CPU takes forty times as long (jax 0.10).
    accumulator = accumulator_type(d_out.dtype)
    return jnp.swapaxes(product("btnh,btnh->btn", out, d_out, accumulator), 1, 2)


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    mask: Mask,
    mod: ScoreMod,
    kernel: Kernel,
    *,
    forward_mode: bool = False,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B N T"]]:
    """Returns attention, computed in q's type, and the log-sum-exps of its logits, those of sinks among them.

    out is in kernel.residual_dtype(), or wider; gradients have the types of the arrays. Lengths need not be multiples
    of the kernel's blocks. forward_mode: jax.jvp differentiates it, and not jax.grad.
    """
    by = _attend_forward_mode if forward_mode else _attend
    out, lse = by(q, k, v, mask, replace(mod, sinks=None), kernel)
    return (out, lse) if mod.sinks is None else with_sinks(out, lse, mod.sinks)


def with_sinks(
    out: Float[Array, "B T N V"], lse: Float[Array, "B N T"], sinks: Float[Array, "N"]
) -> tuple[Float[Array, "B T N V"], Float[Array, "B N T"]]:
    """Returns attention with one more key of this logit for each head, whose value is 0, in at least float32.

    Counted once, however many devices share the keys. Attention sinks: Xiao et al. 2309.17453; learnt: gpt-oss.
    """
    sinks = jnp.broadcast_to(sinks.astype(lse.dtype)[None, :, None], lse.shape)
    sees_none = jnp.isneginf(lse)  # such a row has no key but the sink, which may be -inf as well
    finite_lse = jnp.where(sees_none, 0.0, lse)
    share = jnp.where(sees_none, 0.0, jax.nn.sigmoid(finite_lse - sinks))
    return out.astype(lse.dtype) * by_token(share), jnp.where(sees_none, sinks, jnp.logaddexp(finite_lse, sinks))


def _attend_forward_mode(q, k, v, mask: Mask, mod: ScoreMod, kernel: Kernel):
    q, mask = tie_to_data(q, mask)
    whole = kernel.forward(q, *_as_computed(q, k, v), mask, mod).whole()
    return forward_only(whole.out.astype(kernel.residual_dtype(q.dtype))), forward_only(whole.lse)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    mask: Mask,
    mod: ScoreMod,
    kernel: Kernel,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B N T"]]:
    """Returns attend() without sinks; its gradients are the kernel's."""
    whole = kernel.forward(q, *_as_computed(q, k, v), mask, mod).whole()
    return whole.out.astype(kernel.residual_dtype(q.dtype)), whole.lse


def _forward(q, k, v, mask, mod, kernel: Kernel):
    q, mask = tie_to_data(q, mask)
    whole = _named_for_remat(kernel.forward(q, *_as_computed(q, k, v), mask, mod), kernel.residual_dtype(q.dtype))
    return (whole.out, whole.lse), (q, k, v, mask, mod, whole)


def _backward(kernel: Kernel, residuals, gradients):
    q, k, v, mask, mod, whole = residuals
    d_out, d_lse = gradients
    d_out, mask = tie_to_data(d_out.astype(q.dtype), mask)
    found = kernel.backward(q, *_as_computed(q, k, v), mask, mod, BackwardInputs.of(whole, d_out, d_lse))
    arrays = (part.astype(x.dtype) for part, x in zip(found[:3], (q, k, v), strict=True))
    return *arrays, None, mod.cotangent(found.mod)


_attend.defvjp(_forward, _backward)


def local_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    mask: Mask,
    kernel: Kernel,
    mod: ScoreMod | None = None,
) -> Float[Array, "B T N V"]:
    """Returns attention in q's type; without a ScoreMod that of the definition."""
    return attend(q, k, v, mask, mod or ScoreMod.plain(q.shape[-1]), kernel)[0].astype(q.dtype)


def _as_computed(q: Array, k: Array, v: Array) -> tuple[Array, Array]:
    """Returns keys and values in the type of the queries."""
    return k.astype(q.dtype), v.astype(q.dtype)


def tie_to_data(data: Array, mask: Mask) -> tuple[Array, Mask]:
    """Returns both unchanged, but what follows from the mask now waits for the data.

    The trap: in a scan over layers what depends on positions alone is the same for all layers, so without this the
    masks of all pairs of blocks are computed ahead of the scan and kept for the backward: quadratic in the length.
    """
    return lax.optimization_barrier((data, mask))


def _named_for_remat(total: PartialAttention, dtype: jnp.dtype) -> Whole:
    """Returns attention over all keys with out in this type, by names with which a remat policy can keep it."""
    whole = total.whole()
    numbers = (checkpoint_name(x, "attention_lse") for x in (whole.exponent, whole.total))
    return Whole(checkpoint_name(whole.out.astype(dtype), "attention_out"), *numbers)
