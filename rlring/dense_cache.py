"""DenseSlots: which tokens a dense layer's cache holds, and in which slots."""

from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from rlring.attention import Mask
from rlring.attention.blocks import pad
from rlring.errors import UsageError
from rlring.mesh import SEQUENCE_AXES


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DenseSlots:
    """The positions and segments of the tokens in the slots of a dense layer's cache; the same for all dense layers.

    The slots of a row are a ring buffer of its last `capacity` tokens; padding takes no slot. This is exact if no query
    sees an overwritten token. So a window bounds the memory: window + T - 1 slots are enough for steps of T tokens, any
    number of which may be rolled back before the next step. The tokens of a row must come in order, one segment after
    the other. The output of a token that would see an overwritten one is NaN, so that errors do not go unnoticed.
    """

    position: Int[Array, "B S"]
    segment: Int[Array, "B S"]  # -1: the slot is empty, and no query sees it
    written: Int[Array, "B"]  # slots written since the row was empty, without those rolled back
    # The last overwritten token on each device: a query that sees an earlier overwritten token sees this one as well.
    gone_position: Int[Array, "B devices"]
    gone_segment: Int[Array, "B devices"]  # -1: no token was overwritten
    capacity: int = field(metadata={"static": True})  # slots of all devices together

    @classmethod
    def empty(cls, batch: int, capacity: int, *, devices: int) -> "DenseSlots":
        """Returns empty slots, to be split over `devices` devices."""
        (position, segment), gone = (jnp.full((2, batch, n), -1, jnp.int32) for n in (capacity, devices))
        return cls(position, segment, jnp.zeros(batch, jnp.int32), *gone, capacity)

    def check(self, tokens: int) -> None:
        """Raises UsageError if `tokens` tokens cannot be written in one step."""
        if tokens > self.capacity:
            raise UsageError(
                f"a cache of {self.capacity} slots cannot take {tokens} tokens at a time; decode fewer at a time, or "
                "raise its capacity."
            )

    def spec(self, mesh: Mesh) -> P:
        """Returns the partition of keys and values [B, K, S, H]: split along the slots S."""
        return P("data", None, SEQUENCE_AXES)

    def specs(self, mesh: Mesh) -> "DenseSlots":
        """Returns the partition of each array of the slots."""
        split = P("data", SEQUENCE_AXES)
        return replace(jax.tree.map(lambda _: split, self), written=P("data"))

    def mask(self, now: Mask) -> Mask:
        """Returns the mask of the new tokens, as queries, over the slots, as keys."""
        return replace(now, k_position=self.position, k_segment=self.segment)

    def with_prompt(self, prompt: Mask) -> "DenseSlots":
        """Returns the slots filled with a prompt; call it on empty slots."""
        held = prompt.padded(prompt.q_position.shape[1], self.capacity)
        there = held.k_segment >= 0
        written = jnp.where(there, jnp.arange(1, self.capacity + 1, dtype=jnp.int32)[None], 0).max(1)
        position = jnp.where(there, held.k_position, -1)
        return replace(self, position=position, segment=held.k_segment, written=written)

    def hold(self, x: Float[Array, "B T K H"], prompt: Mask) -> Float[Array, "B K S H"]:
        """Returns a prompt's keys or values in the layout of the slots; for empty slots."""
        # The values of padding are arbitrary. A NaN among them would spoil the output, even though it is masked.
        there = jnp.where((prompt.k_segment >= 0)[..., None, None], x, jnp.zeros((), x.dtype))
        return pad(jnp.moveaxis(there, 1, 2), 2, self.capacity)

    def after(self, now: Mask, shard: Int[Array, ""] | int) -> "DenseSlots":
        """Returns the slots after writing the new tokens."""
        slot = self._slot(now, shard)
        position, segment = _put(self.position, now.k_position, slot), _put(self.segment, now.k_segment, slot)
        gone_position, gone_segment = self._gone(slot)
        written = self.written + (now.k_segment >= 0).sum(1, dtype=jnp.int32)
        return DenseSlots(position, segment, written, gone_position, gone_segment, self.capacity)

    def put(
        self, x: Float[Array, "B K S H"], new: Float[Array, "B T K H"], now: Mask, shard: Int[Array, ""] | int
    ) -> Float[Array, "B K S H"]:
        """Returns the keys or values `x` with those of the new tokens written."""
        return _put(x, jnp.moveaxis(new, 1, 2).astype(x.dtype), self._slot(now, shard))

    def is_lost(self, now: Mask, shard: Int[Array, ""] | int) -> Bool[Array, "B T"]:
        """Returns which of the new tokens would see a token that was overwritten, in this step or before."""
        after = self.after(now, shard)
        return replace(now, k_position=after.gone_position, k_segment=after.gone_segment).maybe_needed().any(2)

    def freed_by(self, tokens: Int[Array, "B"]) -> Int[Array, "B"]:
        """Returns how many of the newest slots of each row to free to remove its last `tokens` tokens. Called on the
        slots of all devices together."""
        there = jnp.take_along_axis(self.segment, self._age(), 1) >= 0
        newest = jnp.cumsum(there, 1, dtype=jnp.int32)  # tokens, by age
        freed = jnp.where(tokens > 0, (newest < tokens[:, None]).sum(1, dtype=jnp.int32) + 1, 0)
        return jnp.minimum(freed, jnp.minimum(self.written, self.capacity))

    def without(self, freed: Int[Array, "B"]) -> "DenseSlots":
        """Returns the slots without the `freed` newest of each row. Called on the slots of all devices together."""
        position, segment = (jnp.where(self._age() < freed[:, None], -1, x) for x in (self.position, self.segment))
        return replace(self, position=position, segment=segment, written=self.written - freed)

    def erased(self, held, freed: Int[Array, "B"], shard: Int[Array, ""] | int):
        """Returns the arrays `held` [B, K, S, H] with 0 in the `freed` newest slots of each row, because a NaN would
        spoil outputs even in an empty slot."""

        def erase(n, held):
            slot = jnp.where(n < freed, self._own((self.written - 1 - n) % self.capacity, shard), self.capacity)
            return jax.tree.map(lambda x: _put(x, jnp.zeros_like(x[:, :, :1]), slot[:, None]), held)

        return lax.fori_loop(0, freed.max(), erase, held)

    def _age(self) -> Int[Array, "B S"]:
        """Returns the age of each slot: how many slots were written after it. The mapping is its own inverse: entry n
        is also the slot of age n."""
        return (self.written[:, None] - 1 - jnp.arange(self.capacity, dtype=jnp.int32)[None]) % self.capacity

    def _slot(self, now: Mask, shard) -> Int[Array, "B T"]:
        """Returns the slot of each new token on this device; one past the last for padding and for slots of other
        devices."""
        there = now.k_segment >= 0
        number = self.written[:, None] + jnp.cumsum(there, 1, dtype=jnp.int32) - 1
        return jnp.where(there, self._own(number % self.capacity, shard), self.position.shape[1])

    def _own(self, slot: Int[Array, "..."], shard) -> Int[Array, "..."]:
        """Returns the local index of slots on this device; one past the last for slots of other devices."""
        own, place = self.position.shape[1], slot - shard * self.position.shape[1]
        return jnp.where(place < 0, own, jnp.minimum(place, own))

    def _gone(self, slot: Int[Array, "B T"]) -> tuple[Int[Array, "B 1"], Int[Array, "B 1"]]:
        """Returns position and segment of the last overwritten token, after `slot` is overwritten."""
        position, segment = (
            jnp.take_along_axis(x, slot, 1, mode="fill", fill_value=-1) for x in (self.position, self.segment)
        )
        order = jnp.where(segment >= 0, jnp.arange(slot.shape[1], dtype=jnp.int32)[None], -1)
        latest = jnp.take_along_axis(segment, order.argmax(1)[:, None], 1)
        latest = jnp.where(latest >= 0, latest, self.gone_segment)
        every_position = jnp.concatenate([self.gone_position, position], 1)
        is_latest = jnp.concatenate([self.gone_segment, segment], 1) == latest
        last = jnp.where(is_latest, every_position, jnp.iinfo(jnp.int32).min).max(1, keepdims=True)
        return jnp.where(latest >= 0, last, -1), latest


def _put(x: Array, new: Array, slot: Int[Array, "B T"]) -> Array:
    """Returns `x` [B, S] or [B, K, S, H] with `new` [B, T] or [B, K, T, H] written to slots `slot` of each row."""
    dimension = x.ndim // 2
    # Adds a write that is dropped. XLA would turn the write of a single slot into a slice update, and compute that
    # twice: once for the result, and once for reading it.
    new = pad(new, dimension, new.shape[dimension] + 1)
    slot = jnp.pad(slot, ((0, 0), (0, 1)), constant_values=x.shape[dimension])

    def of_row(x: Array, new: Array, slot: Int[Array, "T"]) -> Array:
        return x.at[(slice(None),) * (dimension - 1) + (slot,)].set(new, mode="drop")

    return jax.vmap(of_row)(x, new, slot)
