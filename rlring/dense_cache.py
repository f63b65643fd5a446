"""DenseSlots: the last tokens of each row, and where they are kept."""

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
    """Which tokens the slots of a dense layer hold: the last of each row; all such layers hold the same.

    Each row is written from slot to slot, by tokens that are there, and past the last slot begins again at the first.
    That is exact as long as nobody sees what was there: it is how a window bounds the memory, at window + T - 1 slots
    for steps of T tokens, of which any number is rolled back before the next. Exact where the tokens of a row come in
    order, one segment after the other. A token that sees one whose place was taken becomes NaN: what is wrong is seen.
    """

    position: Int[Array, "B S"]
    segment: Int[Array, "B S"]  # -1: nothing, so nobody sees it
    written: Int[Array, "B"]  # slots given away since the row was empty, but for those that were rolled back
    # Of the tokens whose place was taken, on each device the last: who sees an earlier one sees it as well.
    gone_position: Int[Array, "B devices"]
    gone_segment: Int[Array, "B devices"]  # -1: there is none
    capacity: int = field(metadata={"static": True})  # of all devices together

    @classmethod
    def empty(cls, batch: int, capacity: int, *, devices: int) -> "DenseSlots":
        """Returns slots that hold nothing, split over so many devices."""
        (position, segment), gone = (jnp.full((2, batch, n), -1, jnp.int32) for n in (capacity, devices))
        return cls(position, segment, jnp.zeros(batch, jnp.int32), *gone, capacity)

    def check(self, tokens: int) -> None:
        """Raises UsageError if so many tokens cannot be written at a time."""
        if tokens > self.capacity:
            raise UsageError(
                f"a cache of {self.capacity} slots cannot take {tokens} tokens at a time; decode fewer at a time, or "
                "raise its capacity."
            )

    def spec(self, mesh: Mesh) -> P:
        """Returns how keys and values [B, K, S, H] are laid out: split along the sequence."""
        return P("data", None, SEQUENCE_AXES)

    def specs(self, mesh: Mesh) -> "DenseSlots":
        """Returns how the slots themselves are laid out."""
        split = P("data", SEQUENCE_AXES)
        return replace(jax.tree.map(lambda _: split, self), written=P("data"))

    def mask(self, now: Mask) -> Mask:
        """Returns what the new tokens see of the slots."""
        return replace(now, k_position=self.position, k_segment=self.segment)

    def with_prompt(self, prompt: Mask) -> "DenseSlots":
        """Returns the slots of a cache that begins with a prompt, from empty ones."""
        held = prompt.padded(prompt.q_position.shape[1], self.capacity)
        there = held.k_segment >= 0
        written = jnp.where(there, jnp.arange(1, self.capacity + 1, dtype=jnp.int32)[None], 0).max(1)
        position = jnp.where(there, held.k_position, -1)
        return replace(self, position=position, segment=held.k_segment, written=written)

    def hold(self, x: Float[Array, "B T K H"], prompt: Mask) -> Float[Array, "B K S H"]:
        """Returns what empty slots hold of a prompt's keys or values."""
        # Padding may be anything, and whoever is there next is spoilt by what is no number.
        there = jnp.where((prompt.k_segment >= 0)[..., None, None], x, jnp.zeros((), x.dtype))
        return pad(jnp.moveaxis(there, 1, 2), 2, self.capacity)

    def after(self, now: Mask, shard: Int[Array, ""] | int) -> "DenseSlots":
        """Returns the slots once the new tokens are in them."""
        slot = self._slot(now, shard)
        position, segment = _put(self.position, now.k_position, slot), _put(self.segment, now.k_segment, slot)
        gone_position, gone_segment = self._gone(slot)
        written = self.written + (now.k_segment >= 0).sum(1, dtype=jnp.int32)
        return DenseSlots(position, segment, written, gone_position, gone_segment, self.capacity)

    def put(
        self, x: Float[Array, "B K S H"], new: Float[Array, "B T K H"], now: Mask, shard: Int[Array, ""] | int
    ) -> Float[Array, "B K S H"]:
        """Returns the keys or values with those of new tokens written."""
        return _put(x, jnp.moveaxis(new, 1, 2).astype(x.dtype), self._slot(now, shard))

    def is_lost(self, now: Mask, shard: Int[Array, ""] | int) -> Bool[Array, "B T"]:
        """Returns which of the new tokens see one whose place was taken, by them or before."""
        after = self.after(now, shard)
        return replace(now, k_position=after.gone_position, k_segment=after.gone_segment).maybe_needed().any(2)

    def freed_by(self, tokens: Int[Array, "B"]) -> Int[Array, "B"]:
        """Returns how many slots, the newest, are free without the last tokens of each row; of all devices' slots."""
        there = jnp.take_along_axis(self.segment, self._age(), 1) >= 0
        newest = jnp.cumsum(there, 1, dtype=jnp.int32)  # tokens, by age
        freed = jnp.where(tokens > 0, (newest < tokens[:, None]).sum(1, dtype=jnp.int32) + 1, 0)
        return jnp.minimum(freed, jnp.minimum(self.written, self.capacity))

    def without(self, freed: Int[Array, "B"]) -> "DenseSlots":
        """Returns the slots without the newest of each row, so many; of all devices' slots."""
        position, segment = (jnp.where(self._age() < freed[:, None], -1, x) for x in (self.position, self.segment))
        return replace(self, position=position, segment=segment, written=self.written - freed)

    def erased(self, held, freed: Int[Array, "B"], shard: Int[Array, ""] | int):
        """Returns arrays [B, K, S, H] with 0 in the newest slots of each row: what is no number would not be unseen."""

        def erase(n, held):
            slot = jnp.where(n < freed, self._own((self.written - 1 - n) % self.capacity, shard), self.capacity)
            return jax.tree.map(lambda x: _put(x, jnp.zeros_like(x[:, :, :1]), slot[:, None]), held)

        return lax.fori_loop(0, freed.max(), erase, held)

    def _age(self) -> Int[Array, "B S"]:
        """Returns how many slots were given away after each; and, the other way round, which slot has this age."""
        return (self.written[:, None] - 1 - jnp.arange(self.capacity, dtype=jnp.int32)[None]) % self.capacity

    def _slot(self, now: Mask, shard) -> Int[Array, "B T"]:
        """Returns the slots that new tokens are given, one past the last for those that are nowhere or elsewhere."""
        there = now.k_segment >= 0
        number = self.written[:, None] + jnp.cumsum(there, 1, dtype=jnp.int32) - 1
        return jnp.where(there, self._own(number % self.capacity, shard), self.position.shape[1])

    def _own(self, slot: Int[Array, "..."], shard) -> Int[Array, "..."]:
        """Returns the places of slots on this device, one past the last for those of others."""
        own, place = self.position.shape[1], slot - shard * self.position.shape[1]
        return jnp.where(place < 0, own, jnp.minimum(place, own))

    def _gone(self, slot: Int[Array, "B T"]) -> tuple[Int[Array, "B 1"], Int[Array, "B 1"]]:
        """Returns position and segment of the last token whose place is taken, once these slots are given away."""
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
    """Returns [B, S] or [B, K, S, H] with [B, T] or [B, K, T, H] in the slots of each row."""
    dimension = x.ndim // 2
    # One more that is dropped: a single one would become the update of a slice, which XLA computes twice, to return it
    # and to read it.
    new = pad(new, dimension, new.shape[dimension] + 1)
    slot = jnp.pad(slot, ((0, 0), (0, 1)), constant_values=x.shape[dimension])

    def of_row(x: Array, new: Array, slot: Int[Array, "T"]) -> Array:
        return x.at[(slice(None),) * (dimension - 1) + (slot,)].set(new, mode="drop")

    return jax.vmap(of_row)(x, new, slot)
