"""MeshAxes: which axes of a mesh carry the batch, the sequence and the heads of attention."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rlring.attention.mask import Mask
from rlring.errors import UsageError


@dataclass(frozen=True)
class MeshAxes:
    """Names of the mesh axes that attention is split over. None is no axis.

    A default name that the mesh lacks is an axis of size 1. The sequence is split over the pair (ring, ulysses),
    ulysses innermost: give ulysses the fastest links. heads is the axis of tensor parallelism: the heads are split over
    it outside of attention as well. Over axes of the mesh that are not named here, attention is replicated.
    """

    batch: tuple[str, ...] = ("data",)
    ring: str | None = "ring"
    ulysses: str | None = "ulysses"
    heads: str | None = None

    def __post_init__(self):
        if not isinstance(self.batch, tuple):
            use = f"({self.batch!r},)" if isinstance(self.batch, str) else "() for no axis"
            raise UsageError(f"MeshAxes.batch is a tuple of names; got {self.batch!r}. Use {use}.")
        names = self._names()
        if len(set(names)) < len(names):
            raise UsageError(f"each mesh axis has one part in attention; got {self}. Name each axis once.")

    @property
    def sequence(self) -> tuple[str, ...]:
        return tuple(name for name in (self.ring, self.ulysses) if name is not None)

    @property
    def tokens(self) -> P:
        """The partition of arrays [B, T, N, H]."""
        return P(self.batch or None, self.sequence or None, self.heads)

    def of(self, sizes: Mapping[str, int]) -> "MeshAxes":
        """Returns these axes without the default names that the mesh lacks; `sizes` are the sizes of the mesh's axes.

        Raises:
            UsageError: the mesh lacks an axis whose name is not a default, or it lacks all axes.
        """
        defaults = ("data", "ring", "ulysses")
        missing = [name for name in self._names() if name not in sizes]
        unknown = [name for name in missing if name not in defaults]
        if unknown or (missing and len(missing) == len(self._names()) and sizes):
            raise UsageError(
                f"the mesh has the axes {tuple(sizes)}; got {self}. Name the mesh's own axes in "
                "axes=rlring.MeshAxes(...), or make the mesh with rlring.make_mesh."
            )
        there = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "batch"}
        kept = {name: axis if axis in sizes else None for name, axis in there.items()}
        return MeshAxes(tuple(name for name in self.batch if name in sizes), **kept)

    def _names(self) -> tuple[str, ...]:
        return *self.batch, *(name for name in (self.ring, self.ulysses, self.heads) if name is not None)


DEFAULT = MeshAxes()  # the axes of rlring.make_mesh


def size_of(mesh: Mesh, name: str | tuple[str, ...] | None) -> int:
    """Returns the number of devices of the mesh along these axes."""
    names = (name,) if isinstance(name, str) else name or ()
    return math.prod(mesh.shape[one] for one in names)


def index_of(names: tuple[str, ...]):
    """Returns this device's index along these axes; 0 if there are none. Runs inside shard_map."""
    return lax.axis_index(names) if names else 0


def varying_alike(tree):
    """Returns the tree with all arrays cast to vary over the same manual axes of jax.shard_map."""
    axes = frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(tree)))

    def cast(x):
        return lax.pcast(x, tuple(axes - jax.typeof(x).manual_axis_type.varying), to="varying")

    return jax.tree.map(cast, tree)


def split_explicitly(arrays, mesh: Mesh, specs):
    """Returns the arrays resharded as `specs` over the mesh axes of type Explicit.

    jax.shard_map requires this; it splits arrays by itself only over other axes.
    """
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    if AxisType.Explicit not in kinds.values():
        return arrays

    def explicit(names):
        names = (names,) if isinstance(names, str) else names or ()
        return tuple(name for name in names if kinds[name] == AxisType.Explicit) or None

    def split(spec: P, part):
        sharding = NamedSharding(mesh, P(*map(explicit, spec)))
        return jax.tree.map(lambda x: jax.reshard(x, sharding), part)

    return jax.tree.map(split, specs, arrays, is_leaf=lambda x: isinstance(x, P))


def with_places(mask: Mask, names: tuple[str, ...]) -> Mask:
    """Returns the mask of a shard with the places (indices in the whole sequence) of its tokens filled in.

    The sequence is split over the mesh axes `names`. Runs inside shard_map.
    """

    def places(position):
        rows, length = position.shape
        start = jnp.asarray(index_of(names), jnp.int32) * length
        return jnp.broadcast_to(start + jnp.arange(length, dtype=jnp.int32), (rows, length))

    return replace(mask, q_place=places(mask.q_position), k_place=places(mask.k_position))
