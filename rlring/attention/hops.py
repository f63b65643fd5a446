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
from rlring.attention.local import Gradients, Kernel, named_for_remat
from rlring.attention.mask import Mask
from rlring.attention.softmax import Partial


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
    return _forward(q, k, v, mask, ring, kernel).out.astype(q.dtype)


def _attention_forward(q, k, v, mask, ring, kernel):
    out, lse = named_for_remat(*_forward(q, k, v, mask, ring, kernel), kernel.kept_type(q.dtype))
    return out.astype(q.dtype), (q, k, v, mask, out, lse)


def _attention_backward(ring, kernel, residuals, d_out):
    q, k, v, mask, out, lse = residuals
    q_size, k_size = q.shape[1] // ring, k.shape[1] // ring

    def device(r, gradients: Gradients) -> Gradients:
        mine = (take(q, r, q_size, 1), take(out, r, q_size, 1), take(lse, r, q_size, 2), take(d_out, r, q_size, 1))

        def hop(n, gradients: Gradients) -> Gradients:
            source = (r - n) % ring
            here = take(k, source, k_size, 1), take(v, source, k_size, 1)
            seen = _mask(mask, r, source, q_size, k_size)
            q_r, out_r, lse_r, d_out_r = mine

            def differentiate(gradients: Gradients) -> Gradients:
                so_far = take(gradients.dq, r, q_size, 1)
                dq, dk, dv = kernel.backward(q_r, *here, seen, out_r, lse_r, d_out_r, so_far)
                return Gradients(
                    put(gradients.dq, dq, r, 1),
                    _add(gradients.dk, dk, source),
                    _add(gradients.dv, dv, source),
                )

            return lax.cond(_sees(seen), differentiate, lambda same: same, gradients)

        return lax.fori_loop(0, ring, hop, gradients)

    zero = Gradients(*(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v)))
    dq, dk, dv = lax.fori_loop(0, ring, device, zero)
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

            return lax.cond(_sees(seen), attend, lambda total: total, total)

        home = take(k, r, k_size, 1), take(v, r, k_size, 1)
        first = kernel.forward(q_r, *home, _mask(mask, r, r, q_size, k_size))
        return lax.fori_loop(1, ring, hop, first)

    parts = lax.map(device, jnp.arange(ring))
    return Partial(joined(parts.out, 1), joined(parts.lse, 2))


def _add(x: Array, more: Array, device) -> Array:
    return put(x, take(x, device, more.shape[1], 1) + more, device, 1)


def _mask(mask: Mask, q_device, k_device, q_size: int, k_size: int) -> Mask:
    return mask.block(q_device * q_size, q_size, k_device * k_size, k_size)


def _sees(mask: Mask):
    return mask.may_see(mask.q_bounds(mask.q_position.shape[1]), mask.k_bounds(mask.k_position.shape[1]))[0]
