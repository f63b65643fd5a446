"""KVCache: the keys and values of everything seen so far, as a value."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from rlring.attention import Mask
from rlring.errors import UsageError
from rlring.mesh import SEQUENCE_AXES

CACHE_SPEC = P(None, "data", SEQUENCE_AXES, None, None)  # of keys and values [L, B, S, K, H]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Keys and values of `S` slots in every layer, with the position and segment of each slot.

    A slot that holds nothing has segment -1, so nobody sees it. Tokens are written one after the other; past the last
    slot writing starts again at the first, which is exact as long as the attention window is no longer than what the
    slots still hold:
    that is how a window bounds the memory. Writing returns a new cache (XLA reuses the memory when the old one is
    donated).
    """

    key: Float[Array, "L B S K H"]
    value: Float[Array, "L B S K H"]
    position: Int[Array, "B S"]
    segment: Int[Array, "B S"]
    written: Int[Array, ""]
    """Tokens written since the cache was empty."""

    @property
    def capacity(self) -> int:
        return self.position.shape[1]

    def mask(self, q_position: Int[Array, "B T"], q_segment: Int[Array, "B T"], *, window: int | None) -> Mask:
        """Returns the causal mask of new tokens against every slot."""
        return Mask(q_position, self.position, q_segment, self.segment, is_causal=True, window=window)

    def place(
        self, position: Int[Array, "B T"], segment: Int[Array, "B T"], *, mesh: Mesh | None
    ) -> tuple["KVCache", Int[Array, ""]]:
        """Returns the cache with the next `T` slots given to tokens at `position`, and the first of those slots.

        Their keys and values are then written layer by layer with `write`. `T` must divide the capacity (and, on a
        mesh, each device's share of it), so that one write never crosses a border.
        """
        tokens = position.shape[1]
        shards = 1 if mesh is None else mesh.shape["ring"] * mesh.shape["ulysses"]
        if self.capacity % (tokens * shards):
            raise UsageError(
                f"a cache of {self.capacity} slots over {shards} devices cannot take {tokens} tokens at a time; "
                f"make its capacity a multiple of {tokens * shards}."
            )
        slot = self.written % self.capacity
        placed = replace(
            self,
            position=write(self.position, position, slot, mesh=mesh),
            segment=write(self.segment, segment, slot, mesh=mesh),
            written=self.written + tokens,
        )
        return placed, slot


def write(
    slots: Array, new: Array, slot: Int[Array, ""], *, layer: Int[Array, ""] | None = None, mesh: Mesh | None
) -> Array:
    """Returns `slots` ([B, S, ...], or [L, B, S, ...] with `layer`) with `new` ([B, T, ...]) written from `slot` on.

    On a mesh each device writes only when the slot is its own: nothing is gathered.
    """
    lead = () if layer is None else (layer,)
    new = new.astype(slots.dtype)[(None,) * len(lead)]
    sequence = len(lead) + 1

    def local_write(slots: Array, new: Array, slot: Array, lead: tuple) -> Array:
        own = slots.shape[sequence]
        if mesh is None:
            start, mine = slot, None
        else:
            shard = jax.lax.axis_index(SEQUENCE_AXES)
            start = jnp.clip(slot - shard * own, 0, own - new.shape[sequence])
            mine = slot // own == shard
        index = (*lead, 0, start) + (0,) * (slots.ndim - sequence - 1)
        if mine is not None:
            old = jax.lax.dynamic_slice(slots, index, new.shape[:sequence] + new.shape[sequence:])
            new = jnp.where(mine, new, old)
        return jax.lax.dynamic_update_slice(slots, new, index)

    if mesh is None:
        return local_write(slots, new, slot, lead)
    blank = (None,) * (slots.ndim - sequence - 1)
    stored = P(*(None,) * len(lead), "data", SEQUENCE_AXES, *blank)
    given = P(*(None,) * len(lead), "data", None, *blank)
    return jax.shard_map(
        local_write, mesh=mesh, in_specs=(stored, given, P(), (P(),) * len(lead)), out_specs=stored, check_vma=False
    )(slots, new, slot, lead)


def from_prompt(
    key: Float[Array, "L B T K H"],
    value: Float[Array, "L B T K H"],
    position: Int[Array, "B T"],
    segment: Int[Array, "B T"],
    *,
    capacity: int,
    mesh: Mesh | None,
) -> KVCache:
    """Returns a cache of `capacity` slots whose first `T` hold a prompt."""
    tokens = position.shape[1]
    if capacity < tokens:
        raise UsageError(f"a cache of {capacity} slots cannot hold a prompt of {tokens} tokens; raise its capacity.")
    pad = capacity - tokens

    def slots(array: Array, axis: int, fill: int) -> Array:
        widths = [(0, 0)] * array.ndim
        widths[axis] = (0, pad)
        padded = jnp.pad(array, widths, constant_values=fill)
        if mesh is None:
            return padded
        spec = CACHE_SPEC if array.ndim == 5 else P("data", SEQUENCE_AXES)
        return jax.lax.with_sharding_constraint(padded, NamedSharding(mesh, spec))

    return KVCache(
        key=slots(key, 2, 0),
        value=slots(value, 2, 0),
        position=slots(position, 1, 0),
        segment=slots(segment, 1, -1),
        written=jnp.asarray(tokens, jnp.int32),
    )
