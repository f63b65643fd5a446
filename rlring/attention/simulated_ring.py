"""A ring simulated on one device: the computations of all its devices, one device after the other, without transfers.

It makes the same kernel calls as ring_attention(), and serves to measure the cost of dividing attention into ring
steps. It is not a scheme, because on one device it has no advantage.
"""

from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from rlring.attention.blocks import joined, put, take
from rlring.attention.kernel import BackwardInputs, Gradients, Kernel, local_attention, no_gradients
from rlring.attention.mask import Mask
from rlring.attention.score_mod import ScoreMod
from rlring.attention.softmax import PartialAttention


def simulated_ring_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    mask: Mask,
    ring: int,
    kernel: Kernel,
) -> Float[Array, "B T N V"]:
    """Returns attention in q's type, computed as on a ring of `ring` devices, which must divide both lengths."""
    return local_attention(q, k, v, mask, _SimulatedRingKernel(ring, kernel))


class _SimulatedRingKernel(NamedTuple):
    """The kernel of a simulated ring, for plain attention without bias, slopes and dropout."""

    ring: int
    kernel: Kernel
    heads_first = False

    def residual_dtype(self, dtype: jnp.dtype) -> jnp.dtype:
        return self.kernel.residual_dtype(dtype)

    def forward(self, q, k, v, mask: Mask, mod: ScoreMod, before: None = None) -> PartialAttention:
        cut = _Cut.of(self.ring, q, k, v, mask)

        def device(r) -> PartialAttention:
            first = self.kernel.forward(cut.queries(q, r), *cut.keys(r), cut.pair(r, r), mod)
            return lax.fori_loop(1, self.ring, partial(self._forward_hop, cut, mod, r), first)

        parts = lax.map(device, jnp.arange(self.ring))
        return PartialAttention(joined(parts.out, 1), *(joined(x, 2) for x in (parts.exponent, parts.total)))

    def _forward_hop(self, cut: "_Cut", mod: ScoreMod, r, n, total: PartialAttention) -> PartialAttention:
        source = (r - n) % self.ring
        seen = cut.pair(r, source)

        def attend(total: PartialAttention) -> PartialAttention:
            return self.kernel.forward(cut.queries(cut.q, r), *cut.keys(source), seen, mod, total)

        return lax.cond(seen.shows_any(), attend, lambda total: total, total)

    def backward(self, q, k, v, mask: Mask, mod: ScoreMod, inputs: BackwardInputs, before: None = None) -> Gradients:
        cut = _Cut.of(self.ring, q, k, v, mask)

        def device(r, gradients: Gradients) -> Gradients:
            tokens = (cut.queries(x, r) for x in inputs[:2])
            inputs_r = BackwardInputs(*tokens, *(take(x, r, cut.q_size, 2) for x in inputs[2:]))
            return lax.fori_loop(0, self.ring, partial(self._backward_hop, cut, mod, inputs_r, r), gradients)

        return lax.fori_loop(0, self.ring, device, no_gradients(q, k, v))

    def _backward_hop(
        self, cut: "_Cut", mod: ScoreMod, inputs: BackwardInputs, r, n, gradients: Gradients
    ) -> Gradients:
        source = (r - n) % self.ring
        seen, places = cut.pair(r, source), ((r, cut.q_size), (source, cut.k_size), (source, cut.k_size))

        def differentiate(gradients: Gradients) -> Gradients:
            before = Gradients(*(take(x, *place, 1) for x, place in zip(gradients, places, strict=False)))
            after = self.kernel.backward(cut.queries(cut.q, r), *cut.keys(source), seen, mod, inputs, before)
            parts = zip(gradients, after, places, strict=False)
            return Gradients(*(put(x, part, place, 1) for x, part, (place, _) in parts))

        return lax.cond(seen.shows_any(), differentiate, lambda same: same, gradients)


class _Cut(NamedTuple):
    """Arrays of the whole sequence, divided into the shards of the devices of a ring."""

    q: Float[Array, "B T N H"]
    k: Float[Array, "B S K H"]
    v: Float[Array, "B S K V"]
    mask: Mask
    q_size: int  # of a shard
    k_size: int

    @classmethod
    def of(cls, ring: int, q, k, v, mask: Mask) -> "_Cut":
        return cls(q, k, v, mask, q.shape[1] // ring, k.shape[1] // ring)

    def queries(self, x: Float[Array, "B T N H"], device) -> Array:
        return take(x, device, self.q_size, 1)

    def keys(self, device) -> tuple[Array, Array]:
        return take(self.k, device, self.k_size, 1), take(self.v, device, self.k_size, 1)

    def pair(self, q_device, k_device) -> Mask:
        """Returns the mask of the queries of one device and the keys of another."""
        return self.mask.block(q_device * self.q_size, self.q_size, k_device * self.k_size, self.k_size)
