"""All-gather attention: every device gathers all keys and values, and keeps its own queries.

Every device holds the whole context. Where that fits into memory, it is often faster than the ring, because there is
only one collective.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from rlring.attention.kernel import BackwardInputs, Gradients, Kernel, local_attention
from rlring.attention.mask import Mask
from rlring.attention.score_mod import ScoreMod
from rlring.attention.softmax import PartialAttention


def all_gather_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    mask: Mask,
    axes: tuple[str, ...],
    kernel: Kernel,
) -> Float[Array, "B T N V"]:
    """Returns attention of this device's queries over the keys of every device of the mesh axes, in q's type.

    Runs inside shard_map; q, k, v and mask are this device's shards.
    """
    return local_attention(q, k, v, mask, GatheringKernel(axes, kernel))


class GatheringKernel(NamedTuple):
    """A kernel over the keys of all devices of the mesh axes. The backward gathers the keys again."""

    axes: tuple[str, ...]
    kernel: Kernel
    heads_first = False

    def residual_dtype(self, dtype: jnp.dtype) -> jnp.dtype:
        return self.kernel.residual_dtype(dtype)

    def forward(self, q, k, v, mask: Mask, mod: ScoreMod, before: PartialAttention | None = None) -> PartialAttention:
        return self.kernel.forward(q, *self._gathered(k, v, mask), mod, before)

    def backward(
        self, q, k, v, mask: Mask, mod: ScoreMod, inputs: BackwardInputs, before: Gradients | None = None
    ) -> Gradients:
        found = self.kernel.backward(q, *self._gathered(k, v, mask), mod, inputs)
        # The sum over devices is in float32, and is rounded afterwards.
        dk, dv = (lax.psum_scatter(x, self.axes, scatter_dimension=1, tiled=True) for x in (found.dk, found.dv))
        return found._replace(dk=dk, dv=dv)

    def _gathered(self, k, v, mask: Mask):
        def gather(x: Array) -> Array:
            return lax.all_gather(x, self.axes, axis=1, tiled=True)

        return gather(k), gather(v), mask.map_keys(gather)
