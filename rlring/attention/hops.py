"""A ring without its links: what its devices compute, hop by hop, one device after the other on a single one.

For measuring what cutting attention into hops costs: the same kernel calls as ring_attention's, and nothing
sent. Not a scheme: on one device nothing is gained by it.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from rlring.attention.blocks import joined, put, take
from rlring.attention.local import Gradients, Kernel, named_for_remat, no_gradients
from rlring.attention.mask import Mask
from rlring.attention.softmax import Partial, Whole


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def attention_in_hops(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Mask,
    ring: int,
    kernel: Kernel,
) -> Float[Array, "B T N H"]:
    """Returns attention in q's type, computed as a ring of so many devices would; both lengths divide by them."""
    return _forward(q, k, v, mask, ring, kernel).whole().out.astype(q.dtype)


def _attention_forward(q, k, v, mask, ring, kernel):
    whole = named_for_remat(_forward(q, k, v, mask, ring, kernel), kernel.kept_type(q.dtype))
    return whole.out.astype(q.dtype), (q, k, v, mask, whole)


def _attention_backward(ring, kernel, residuals, d_out):
    q, k, v, mask, whole = residuals
    q_size, k_size = q.shape[1] // ring, k.shape[1] // ring

    def device(r, gradients: Gradients) -> Gradients:
        q_r, out_r, d_out_r = (take(x, r, q_size, 1) for x in (q, whole.out, d_out))
        whole_r = Whole(out_r, *(take(x, r, q_size, 2) for x in (whole.exponent, whole.total)))

        def hop(n, gradients: Gradients) -> Gradients:
            source = (r - n) % ring
            here = take(k, source, k_size, 1), take(v, source, k_size, 1)
            seen = _mask(mask, r, source, q_size, k_size)

            def differentiate(gradients: Gradients) -> Gradients:
                before = take(gradients.dq, r, q_size, 1), *(take(x, source, k_size, 1) for x in gradients[1:])
                after = kernel.backward(q_r, *here, seen, whole_r, d_out_r, Gradients(*before))
                places = zip(gradients, after, (r, source, source), strict=True)
                return Gradients(*(put(x, part, place, 1) for x, part, place in places))

            return lax.cond(seen.shows_any(), differentiate, lambda same: same, gradients)

        return lax.fori_loop(0, ring, hop, gradients)

    dq, dk, dv = lax.fori_loop(0, ring, device, no_gradients(q, k))
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


attention_in_hops.defvjp(_attention_forward, _attention_backward)


def _forward(q, k, v, mask: Mask, ring: int, kernel: Kernel) -> Partial:
    q_size, k_size = q.shape[1] // ring, k.shape[1] // ring

    def device(r) -> Partial:
        q_r = take(q, r, q_size, 1)

        def hop(n, total: Partial) -> Partial:
            source = (r - n) % ring
            seen = _mask(mask, r, source, q_size, k_size)

            def attend(total: Partial) -> Partial:
                here = take(k, source, k_size, 1), take(v, source, k_size, 1)
                return kernel.forward(q_r, *here, seen, total)

            return lax.cond(seen.shows_any(), attend, lambda total: total, total)

        home = take(k, r, k_size, 1), take(v, r, k_size, 1)
        first = kernel.forward(q_r, *home, _mask(mask, r, r, q_size, k_size))
        return lax.fori_loop(1, ring, hop, first)

    parts = lax.map(device, jnp.arange(ring))
    return Partial(joined(parts.out, 1), *(joined(x, 2) for x in (parts.exponent, parts.total)))


def _mask(mask: Mask, q_device, k_device, q_size: int, k_size: int) -> Mask:
    return mask.block(q_device * q_size, q_size, k_device * k_size, k_size)
