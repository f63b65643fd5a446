"""Sharding of weights and batches: FSDP / ZeRO-3 (Rajbhandari et al. 1910.02054) over all devices of the mesh,
including those that share a sequence.

Each device keeps one part of every matrix, of its gradient and of its optimizer state. The weights of a block are
gathered just before the block is computed and are released afterwards. Gradients are scattered to the devices that keep
the weights.

A dimension can only be split evenly, and few dimensions of a model are divisible by, for example, 1,024 devices. So the
number of devices is factored into primes, and different prime factors may split different dimensions of a weight.
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

TOKENS = P("data", SEQUENCE_AXES)  # the partition of [B, T, ...]: rows over "data", the sequence over the other axes
GATHERED = "gathered_weights"  # the checkpoint name of gathered weights, which remat policies do not keep
SMALLEST_SPLIT = 2**16  # weights with fewer numbers are replicated if outside of the blocks, or not evenly divisible
STACKED = "blocks"  # the attribute of a model with the stacked weights of all layers; dimension 0 is the layer


def weight_sharding(shape: tuple[int, ...], mesh: Mesh, *, is_stacked: bool = False) -> NamedSharding:
    """Returns the sharding of a weight, split over as many devices of the mesh as its dimensions allow.

    If one dimension is divisible by the number of devices, only that dimension is split, so that one collective
    scatters the gradient. A small weight that cannot be split over all devices is replicated: a sum over some of the
    devices may not be routable on their links (TPU v5e), or slower than a sum over all.

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
    """Returns the sharding of every array of a state (weights, optimizer state); without fsdp all are replicated."""

    def one(path, x):
        if not fsdp or jnp.ndim(x) == 0:
            return NamedSharding(mesh, P())
        is_stacked = STACKED in jax.tree_util.keystr(path)
        if not is_stacked and x.size < SMALLEST_SPLIT:
            return NamedSharding(mesh, P())
        return weight_sharding(x.shape, mesh, is_stacked=is_stacked)

    return jax.tree_util.tree_map_with_path(one, state)


def gathered(weights, mesh: Mesh, dtype, *, smallest: int = 0):
    """Gathers weights, so that every device has them whole; matrices are cast to `dtype`.

    Weights with fewer than `smallest` numbers are returned unchanged. Gradients are float32, and each device gets its
    part of the sum over all devices.
    """

    def one(weight):
        if weight.size < smallest:
            return weight
        home, whole = weight_sharding(weight.shape, mesh), NamedSharding(mesh, P())
        # The cast comes before the gather. Vectors are scales of norms, which are computed in float32.
        return checkpoint_name(_gather(weight, home, whole, dtype if weight.ndim > 1 else weight.dtype), GATHERED)

    return jax.tree.map(one, weights)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gather(weight, home: NamedSharding, whole: NamedSharding, dtype):
    # Without these constraints the partitioner would gather activations instead of the weight.
    here = jax.lax.with_sharding_constraint(weight.astype(dtype), home)
    return jax.lax.with_sharding_constraint(here, whole)


def _gather_forward(weight, home, whole, dtype):
    return _gather(weight, home, whole, dtype), None


def _gather_backward(home, whole, dtype, _, gradient):
    return (jax.lax.with_sharding_constraint(gradient, home).astype(jnp.float32),)


_gather.defvjp(_gather_forward, _gather_backward)


class BatchPart(NamedTuple):
    """The part of a batch [B, T, ...] that the devices of this process hold, so that no host has to load the rest."""

    rows: np.ndarray  # row indices in the batch, ascending
    places: np.ndarray  # indices in the sequence, ascending
    shape: tuple[int, int]  # of the whole batch
    mesh: Mesh | None

    @classmethod
    def of(cls, shape: tuple[int, int], mesh: Mesh | None) -> "BatchPart":
        """Returns this process's part of a batch of shape (B, T); without a mesh, the whole batch."""
        if mesh is None:
            return cls(np.arange(shape[0]), np.arange(shape[1]), shape, mesh)
        held = NamedSharding(mesh, TOKENS).addressable_devices_indices_map(shape).values()
        rows, places = (
            np.unique(np.concatenate([np.arange(size)[index[axis]] for index in held]))
            for axis, size in enumerate(shape)
        )
        return cls(rows, places, shape, mesh)

    def on_devices(self, part):
        """Returns each array of `part`, [rows, places, ...] on every host, as a global array [B, T, ...]."""
        return jax.device_put(part) if self.mesh is None else jax.tree.map(self._global, part)

    def _global(self, x: np.ndarray) -> jax.Array:
        def shard(index: tuple[slice, ...]) -> np.ndarray:
            wanted = (np.arange(size)[s] for size, s in zip(self.shape, index, strict=False))
            return x[np.ix_(*(np.searchsorted(held, w) for held, w in zip(self[:2], wanted, strict=True)))]

        sharding = NamedSharding(self.mesh, TOKENS)
        return jax.make_array_from_callback((*self.shape, *x.shape[2:]), sharding, shard)


def _prime_factors(number: int) -> tuple[int, ...]:
    """Returns the prime factors of a number, largest first."""
    factors, divisor = [], 2
    while number > 1:
        while number % divisor == 0:
            factors.append(divisor)
            number //= divisor
        divisor += 1
    return tuple(reversed(factors))
