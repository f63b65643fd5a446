"""All-gather attention: every device gathers all keys and values, queries stay.

The whole context is in every memory, but where it fits this often beats the ring: there is no hop to wait for.
"""

from dataclasses import replace
from functools import partial

import jax
from jax import lax
from jaxtyping import Array, Float

from rlring.attention.local import Kernel, named_for_remat, tie_to_data
from rlring.attention.mask import Mask


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def all_gather_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Mask,
    axes: tuple[str, ...],
    kernel: Kernel,
) -> Float[Array, "B T N H"]:
    """Returns attention of this device's queries over the keys of every device of the mesh axes, in q's type.

    Runs inside shard_map; q, k, v and mask are this device's shards. The gathered keys are not kept for the backward.
    """
    out, _ = _attention_forward(q, k, v, mask, axes, kernel)
    return out


def _gathered(k, v, mask: Mask, axes):
    k, v = (lax.all_gather(x, axes, axis=1, tiled=True) for x in (k, v))
    position, segment = (lax.all_gather(x, axes, axis=1, tiled=True) for x in (mask.k_position, mask.k_segment))
    return k, v, replace(mask, k_position=position, k_segment=segment)


def _attention_forward(q, k, v, mask, axes, kernel):
    q, mask = tie_to_data(q, mask)
    whole = named_for_remat(kernel.forward(q, *_gathered(k, v, mask, axes)), kernel.kept_type(q.dtype))
    return whole.out.astype(q.dtype), (q, k, v, mask, whole)


def _attention_backward(axes, kernel, residuals, d_out):
    q, k, v, mask, whole = residuals
    d_out, mask = tie_to_data(d_out, mask)
    dq, dk, dv = kernel.backward(q, *_gathered(k, v, mask, axes), whole, d_out)
    # Summed over the devices in float32, and only then rounded.
    dk, dv = (lax.psum_scatter(x, axes, scatter_dimension=1, tiled=True) for x in (dk, dv))
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


all_gather_attention.defvjp(_attention_forward, _attention_backward)
