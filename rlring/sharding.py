"""Where weights live: FSDP / ZeRO-3 (Rajbhandari et al. 1910.02054) over every device, those of one sequence included;
and where batches do.

Each device keeps one part of every matrix, of its gradient and of its optimizer state. A block gathers its weights when
its turn comes and lets go of them after; the gradient of a weight is summed into where the weight lives.

A dimension is split only evenly, and few dimensions of a model divide by 1,024 devices: the devices are split into
their prime factors, and those are shared out among the dimensions of a weight.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rlring.mesh import SEQUENCE_AXES

TOKENS = P("data", SEQUENCE_AXES)  # of [B, T, ...]: rows over "data", the sequence over the other axes
GATHERED = "gathered_weights"  # a name by which remat policies do not keep them
SMALLEST_SPLIT = 2**16  # numbers of a weight; of those outside of the blocks a smaller one is not worth gathering
STACKED = "blocks"  # the attribute of a model whose weights are those of all layers, first dimension the layer


def weight_sharding(shape: tuple[int, ...], mesh: Mesh, *, is_stacked: bool = False) -> NamedSharding:
    """Returns the sharding of a weight: split over as many devices of the mesh as divide its dimensions.

    If all devices divide one dimension, only that one is split, so that one collective scatters the gradient. Small
    weights whose dimensions not all devices divide are replicated: a sum over some of the devices may be more than
    their links can route (TPU v5e), or slower than one over all.

    Args:
        is_stacked: the first dimension is the layer, which is not split.
    """
    factors = _prime_factors(mesh.size)
    names = tuple(f"part_{i}" for i in range(len(factors)))
    parts = Mesh(
        mesh.devices.reshape(factors or (1,)), names or ("part_0",), axis_types=(AxisType.Auto,) * max(1, len(factors))
    )
    first = 1 if is_stacked else 0
    by_size = sorted(range(first, len(shape)), key=lambda d: (shape[d] % mesh.size != 0, -shape[d]))
    split: list[list[str]] = [[] for _ in shape]
    left = list(shape)
    for name, factor in zip(names, factors, strict=True):
        dimension = next((d for d in by_size if left[d] % factor == 0), None)
        if dimension is not None:
            split[dimension].append(name)
            left[dimension] //= factor
    is_split_over_all = sum(map(len, split)) == len(factors)
    if not is_split_over_all and math.prod(shape[first:]) < SMALLEST_SPLIT:
        return NamedSharding(parts, P())
    return NamedSharding(parts, P(*(tuple(names) or None for names in split)))


def state_sharding(state, mesh: Mesh, *, fsdp: bool):
    """Returns, for every array of a state (weights, optimizer state), where it lives; whole everywhere without fsdp."""

    def one(path, x):
        if not fsdp or jnp.ndim(x) == 0:
            return NamedSharding(mesh, P())
        is_stacked = STACKED in jax.tree_util.keystr(path)
        if not is_stacked and x.size < SMALLEST_SPLIT:
            return NamedSharding(mesh, P())
        return weight_sharding(x.shape, mesh, is_stacked=is_stacked)

    return jax.tree_util.tree_map_with_path(one, state)


def gathered(weights, mesh: Mesh, dtype, *, smallest: int = 0):
    """Returns the weights of a block whole on every device, matrices in the compute type; those with fewer numbers
    than `smallest` are whole already.

    Gradients come back in float32, each device with its part of the sum over all.
    """

    def one(weight):
        if weight.size < smallest:
            return weight
        home, whole = weight_sharding(weight.shape, mesh), NamedSharding(mesh, P())
        # Cast before they travel. Vectors are scales of norms, which are computed in float32.
        return checkpoint_name(_gather(weight, home, whole, dtype if weight.ndim > 1 else weight.dtype), GATHERED)

    return jax.tree.map(one, weights)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gather(weight, home: NamedSharding, whole: NamedSharding, dtype):
    # The partitioner would else gather activations, which a weight that is split like them seems to ask for.
    here = jax.lax.with_sharding_constraint(weight.astype(dtype), home)
    return jax.lax.with_sharding_constraint(here, whole)


def _gather_forward(weight, home, whole, dtype):
    return _gather(weight, home, whole, dtype), None


def _gather_backward(home, whole, dtype, _, gradient):
    return (jax.lax.with_sharding_constraint(gradient, home).astype(jnp.float32),)


_gather.defvjp(_gather_forward, _gather_backward)


class BatchPart(NamedTuple):
    """The part of a batch [B, T, ...] that the devices of this process hold: no host needs to make the rest."""

    rows: np.ndarray  # of the batch, ascending
    places: np.ndarray  # in the sequence, ascending
    shape: tuple[int, int]  # of the whole batch
    mesh: Mesh | None

    @classmethod
    def of(cls, shape: tuple[int, int], mesh: Mesh | None) -> "BatchPart":
        """Returns the part of a batch of this shape; without a mesh, all of it."""
        if mesh is None:
            return cls(np.arange(shape[0]), np.arange(shape[1]), shape, mesh)
        held = NamedSharding(mesh, TOKENS).addressable_devices_indices_map(shape).values()
        rows, places = (
            np.unique(np.concatenate([np.arange(size)[index[axis]] for index in held]))
            for axis, size in enumerate(shape)
        )
        return cls(rows, places, shape, mesh)

    def on_devices(self, part):
        """Returns arrays of this part, [rows, places, ...] on every host, as one global array each."""
        return jax.device_put(part) if self.mesh is None else jax.tree.map(self._global, part)

    def _global(self, x: np.ndarray) -> jax.Array:
        def shard(index: tuple[slice, ...]) -> np.ndarray:
            wanted = (np.arange(size)[s] for size, s in zip(self.shape, index, strict=False))
            return x[np.ix_(*(np.searchsorted(held, w) for held, w in zip(self[:2], wanted, strict=True)))]

        sharding = NamedSharding(self.mesh, TOKENS)
        return jax.make_array_from_callback((*self.shape, *x.shape[2:]), sharding, shard)


def _prime_factors(number: int) -> tuple[int, ...]:
    """Returns the prime factors, the greatest first."""
    factors, divisor = [], 2
    while number > 1:
        while number % divisor == 0:
            factors.append(divisor)
            number //= divisor
        divisor += 1
    return tuple(reversed(factors))
