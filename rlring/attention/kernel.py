"""Kernel: the interface on which every attention scheme is built, and the custom VJP around it.

A kernel has two functions. forward() returns attention over some keys. backward() takes the results of attention over
*all* keys, so that gradients from disjoint sets of keys add up. Computations on one device are kernels, and so are
those over several devices, such as a ring of kernels or a kernel over gathered keys.
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
    """Gradients of attention, at least float32, because the gradient of a key is a sum over all queries of a long
    context."""

    dq: Float[Array, "B T N H"]
    dk: Float[Array, "B S K H"]
    dv: Float[Array, "B S K V"]
    mod: ModGradients = ModGradients()


def no_gradients(q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], v: Float[Array, "B S K V"]) -> Gradients:
    """Returns Gradients of zeros, without gradients of a ScoreMod."""
    return Gradients(*(zeros(x.shape, accumulator_type(q.dtype), x) for x in (q, k, v)))


class BackwardInputs(NamedTuple):
    """The inputs of backward(): the results of attention over all keys, and the gradients of these results."""

    out: Float[Array, "B T N V"]
    d_out: Float[Array, "B T N V"]
    exponent: Float[Array, "B N T"]  # as in Whole
    total: Float[Array, "B N T"]  # as in Whole
    delta: Float[Array, "B N T"]  # subtracted from the gradient of each weight: the effect of normalisation
    d_lse: Float[Array, "B N T"] | None = None  # the gradient of the lse, already subtracted from delta

    @classmethod
    def of(
        cls, whole: Whole, d_out: Float[Array, "B T N V"], d_lse: Float[Array, "B N T"] | None = None
    ) -> "BackwardInputs":
        """Returns the inputs, with delta computed from out and d_out (FlashAttention-2, equation 4)."""
        none = cls(whole.out, d_out, whole.exponent, whole.total, whole.total, d_lse)
        return none.with_delta(delta_of(whole.out, d_out))

    def with_delta(self, delta: Float[Array, "B N T"]) -> "BackwardInputs":
        """Returns the inputs with this result of delta_of(), minus the gradient of the lse."""
        if self.d_lse is not None:
            delta -= jnp.where(self.total == 0.0, 0.0, self.d_lse.astype(delta.dtype))
        return self._replace(delta=delta)

    @property
    def whole(self) -> Whole:
        return Whole(self.out, self.exponent, self.total)


@runtime_checkable
class Kernel(Protocol):
    """A way to compute attention over some keys. Hashable, because it is a static argument."""

    @property
    def heads_first(self) -> bool:
        """Whether a ring sends keys with heads before tokens, [B, K, S, H], because the kernel computes in that
        layout."""
        ...

    def residual_dtype(self, dtype: jnp.dtype) -> jnp.dtype:
        """Returns the type in which the output is kept for backward(), given the type of the arrays.

        In bfloat16 this would be the largest of all errors: the error of sum(out * d_out) enters every gradient of a
        query.
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

        Args:
            before: attention over other keys, which is merged into the result.
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
        """Returns the gradients of attention over these keys.

        Args:
            inputs: from attention over *all* keys.
            before: gradients to which these are added.
        """
        ...


def delta_of(out: Float[Array, "B T N V"], d_out: Float[Array, "B T N V"]) -> Float[Array, "B N T"]:
    """Returns sum(out * d_out) for each query and head."""
    # As a plain sum, or with the output axes swapped in the product, XLA on CPU takes forty times as long (jax 0.10).
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
    """Returns attention, computed in q's type, and the log-sum-exps of its logits, including sinks.

    The output has type kernel.residual_dtype(), or a wider one; gradients have the types of the arrays. Lengths need
    not be multiples of the kernel's blocks. With forward_mode, jax.jvp can differentiate it, and jax.grad cannot.
    """
    by = _attend_forward_mode if forward_mode else _attend
    out, lse = by(q, k, v, mask, replace(mod, sinks=None), kernel)
    return (out, lse) if mod.sinks is None else with_sinks(out, lse, mod.sinks)


def with_sinks(
    out: Float[Array, "B T N V"], lse: Float[Array, "B N T"], sinks: Float[Array, "N"]
) -> tuple[Float[Array, "B T N V"], Float[Array, "B N T"]]:
    """Returns attention with one more key per head, whose logit is the sink and whose value is 0; at least float32.

    `out` and `lse` must be those over all keys, so the sink counts once on any number of devices. Attention sinks: Xiao
    et al. 2309.17453; learnt: gpt-oss.
    """
    sinks = jnp.broadcast_to(sinks.astype(lse.dtype)[None, :, None], lse.shape)
    sees_none = jnp.isneginf(lse)  # such a query has no key but the sink, which may be -inf as well
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
    """Computes attend() without sinks; its gradients are computed by kernel.backward()."""
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
    """Returns the output of attend() in q's type; `mod` defaults to plain softmax attention."""
    return attend(q, k, v, mask, mod or ScoreMod.plain(q.shape[-1]), kernel)[0].astype(q.dtype)


def _as_computed(q: Array, k: Array, v: Array) -> tuple[Array, Array]:
    """Returns keys and values cast to the type of the queries."""
    return k.astype(q.dtype), v.astype(q.dtype)


def tie_to_data(data: Array, mask: Mask) -> tuple[Array, Mask]:
    """Returns both unchanged, but computations from the returned mask now depend on the data.

    In a scan over layers, computations from positions alone are the same in all layers. Without this, XLA computes the
    masks of all pairs of blocks before the scan and keeps them for the backward, which is quadratic in the length.
    """
    return lax.optimization_barrier((data, mask))


def _named_for_remat(total: PartialAttention, dtype: jnp.dtype) -> Whole:
    """Returns attention over all keys, with the output cast to `dtype` and with checkpoint names for remat policies."""
    whole = total.whole()
    numbers = (checkpoint_name(x, "attention_lse") for x in (whole.exponent, whole.total))
    return Whole(checkpoint_name(whole.out.astype(dtype), "attention_out"), *numbers)
