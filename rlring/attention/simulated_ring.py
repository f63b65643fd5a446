"""A ring without its links: what its devices compute, hop by hop, one device after the other on a single one.

For measuring what cutting attention into hops costs: the same kernel calls as ring_attention's, and nothing
sent. Not a scheme: on one device nothing is gained by it.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from rlring.attention.blocks import joined, put, take
from rlring.attention.kernel import BackwardInputs, Gradients, Kernel, local_attention, no_gradients
from rlring.attention.mask import Mask
from rlring.attention.score_mod import ScoreMod
from rlring.attention.softmax import Partial


def simulated_ring_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    mask: Mask,
    ring: int,
    kernel: Kernel,
) -> Float[Array, "B T N V"]:
    """Returns attention in q's type, computed as a ring of so many devices would; both lengths divide by them."""
    return local_attention(q, k, v, mask, _SimulatedRingKernel(ring, kernel))


class _SimulatedRingKernel(NamedTuple):
    """For plain attention: without a bias, slopes or dropout."""

    ring: int
    kernel: Kernel
    heads_first = False

    def residual_dtype(self, dtype: jnp.dtype) -> jnp.dtype:
        return self.kernel.residual_dtype(dtype)

    def forward(self, q, k, v, mask: Mask, mod: ScoreMod, before: None = None) -> Partial:
        q_size, k_size = q.shape[1] // self.ring, k.shape[1] // self.ring

        def device(r) -> Partial:
            q_r = take(q, r, q_size, 1)

            def hop(n, total: Partial) -> Partial:
                source = (r - n) % self.ring
                seen = _mask(mask, r, source, q_size, k_size)

                def attend(total: Partial) -> Partial:
                    here = take(k, source, k_size, 1), take(v, source, k_size, 1)
                    return self.kernel.forward(q_r, *here, seen, mod, total)

                return lax.cond(seen.shows_any(), attend, lambda total: total, total)

            home = take(k, r, k_size, 1), take(v, r, k_size, 1)
            first = self.kernel.forward(q_r, *home, _mask(mask, r, r, q_size, k_size), mod)
            return lax.fori_loop(1, self.ring, hop, first)

        parts = lax.map(device, jnp.arange(self.ring))
        return Partial(joined(parts.out, 1), *(joined(x, 2) for x in (parts.exponent, parts.total)))

    def backward(self, q, k, v, mask: Mask, mod: ScoreMod, inputs: BackwardInputs, before: None = None) -> Gradients:
        q_size, k_size = q.shape[1] // self.ring, k.shape[1] // self.ring

        def device(r, gradients: Gradients) -> Gradients:
            tokens = (take(x, r, q_size, 1) for x in inputs[:2])
            inputs_r = BackwardInputs(*tokens, *(take(x, r, q_size, 2) for x in inputs[2:]))
            q_r = take(q, r, q_size, 1)

            def hop(n, gradients: Gradients) -> Gradients:
                source = (r - n) % self.ring
                here = take(k, source, k_size, 1), take(v, source, k_size, 1)
                seen = _mask(mask, r, source, q_size, k_size)

                def differentiate(gradients: Gradients) -> Gradients:
                    places = (r, q_size), (source, k_size), (source, k_size)
                    before = (take(x, *place, 1) for x, place in zip(gradients, places, strict=False))
                    after = self.kernel.backward(q_r, *here, seen, mod, inputs_r, Gradients(*before))
                    parts = zip(gradients, after, places, strict=False)
                    return Gradients(*(put(x, part, place, 1) for x, part, (place, _) in parts))

                return lax.cond(seen.shows_any(), differentiate, lambda same: same, gradients)

            return lax.fori_loop(0, self.ring, hop, gradients)

        return lax.fori_loop(0, self.ring, device, no_gradients(q, k, v))


def _mask(mask: Mask, q_device, k_device, q_size: int, k_size: int) -> Mask:
    return mask.block(q_device * q_size, q_size, k_device * k_size, k_size)
