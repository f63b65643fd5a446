"""SparseSlots: which tokens a sparse layer's cache holds, and in which slots."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from rlring.attention import Mask, SparsePattern
from rlring.attention.sparse import HeldMask
from rlring.errors import UsageError


class _Given(NamedTuple):
    """The slots to which tokens are written. Every token occurs twice (U = 2 T): the first T entries have near slots,
    the last T have far slots."""

    position: Int[Array, "B K U"]
    segment: Int[Array, "B K U"]
    slot: Int[Array, "B K U"]  # one past the last for a token that is not kept


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SparseSlots:
    """The positions and segments of the tokens in the slots of a sparse layer's cache, by key/value head; the same for
    all sparse layers.

        near   the last local_blocks + 1 blocks of positions: position p is in slot p % near
        far    the head's strided blocks, which are kept for ever: one block in `stride`

    A token may be in both; the mask shows it once. The cache is exact if the tokens of a row come in order, one segment
    after the other, with at most one segment per step, and if the positions of a segment are all different and span at
    most the capacity. A token that overwrites one that can still be seen is written as NaN, so that errors do not go
    unnoticed.
    """

    position: Int[Array, "B K S"]
    segment: Int[Array, "B K S"]  # -1: the slot is empty, and no query sees it
    pattern: SparsePattern = field(metadata={"static": True})
    kv_heads: int = field(metadata={"static": True})  # of all devices together
    near: int = field(metadata={"static": True})  # number of near slots; the slots behind them are far

    @classmethod
    def empty(cls, batch: int, capacity: int, *, pattern: SparsePattern, kv_heads: int) -> "SparseSlots":
        """Returns empty slots, enough for `capacity` positions."""
        blocks = 1 + -(-(capacity - 1) // pattern.block)  # the most blocks that `capacity` positions in a row touch
        # One block more than a query sees, so that no new token sees a token that the new tokens overwrite.
        near = min((pattern.local_blocks + 1) * pattern.block, capacity)
        far = -(-blocks // pattern.stride) * pattern.block
        shape = batch, kv_heads, near + far
        return cls(jnp.full(shape, -1, jnp.int32), jnp.full(shape, -1, jnp.int32), pattern, kv_heads, near)

    def check(self, tokens: int) -> None:
        """Raises UsageError if `tokens` tokens cannot be written in one step."""
        if tokens > self.pattern.block:
            raise UsageError(
                f"a cache whose sparse layers have blocks of {self.pattern.block} cannot take {tokens} tokens at a "
                "time; decode fewer at a time, or make them part of the prompt."
            )

    def spec(self, mesh: Mesh) -> P:
        """Returns the partition of keys and values [B, K, S, H]: heads are split over "ulysses" if it divides them."""
        return P("data", "ulysses" if self.kv_heads % mesh.shape["ulysses"] == 0 else None, None)

    def specs(self, mesh: Mesh) -> "SparseSlots":
        """Returns the partition of each array of the slots."""
        return replace(self, position=self.spec(mesh), segment=self.spec(mesh))

    def mask(self, now: Mask) -> Mask:
        """Returns the mask of the new tokens, as queries, over the slots, as keys, for B * K rows: one per head."""
        rows = now.repeated(self.position.shape[1])
        position, segment = (x.reshape(-1, x.shape[2]) for x in (self.position, self.segment))
        return HeldMask.of(replace(rows, k_position=position, k_segment=segment), self.pattern, self.near)

    def with_prompt(self, prompt: Mask) -> "SparseSlots":
        """Returns the slots filled with a prompt; call it on empty slots."""
        given = self._given(prompt, 0)
        source, _ = self._sources(given)
        position, segment = (_picked(x, source, -1) for x in (given.position, given.segment))
        return replace(self, position=position, segment=segment)

    def hold(self, x: Float[Array, "B T K H"], prompt: Mask) -> Float[Array, "B K S H"]:
        """Returns a prompt's keys or values in the layout of the slots; for empty slots."""
        source, is_lost = self._sources(self._given(prompt, 0))
        held = _picked(jnp.moveaxis(x, 1, 2), jnp.where(source < 0, -1, source % x.shape[1]), 0)
        return _marked(held, is_lost)

    def after(self, now: Mask, shard: Int[Array, ""] | int) -> "SparseSlots":
        """Returns the slots after writing the new tokens."""
        given = self._given(now, shard)
        position, segment = (
            _put(x, new, given.slot) for x, new in ((self.position, given.position), (self.segment, given.segment))
        )
        return replace(self, position=position, segment=segment)

    def put(
        self, x: Float[Array, "B K S H"], new: Float[Array, "B T K H"], now: Mask, shard: Int[Array, ""] | int
    ) -> Float[Array, "B K S H"]:
        """Returns the keys or values `x` with those of the new tokens written."""
        given = self._given(now, shard)
        position, segment = (x[..., None] for x in self._held(given.slot))
        seen_by = given.position[:, :, None], given.segment[:, :, None]  # of all new tokens, as queries
        is_lost = self._is_lost(position, segment, given.slot[..., None], *seen_by).any(-1)
        new = jnp.tile(jnp.moveaxis(new, 1, 2), (1, 1, 2, 1))
        return _put(x, _marked(new, is_lost).astype(x.dtype), given.slot)

    def is_lost(self, now: Mask, shard: Int[Array, ""] | int) -> Bool[Array, "B T"]:
        """Returns which of the new tokens would see a token that the new tokens overwrite."""
        slot = self._given(now, shard).slot[..., None]
        position, segment = (x[..., None] for x in self._held(slot[..., 0]))
        q_position, q_segment = (x[:, None, None] for x in (now.q_position, now.q_segment))
        is_seen = self._is_lost(position, segment, slot, q_position, q_segment) & (position <= q_position)
        return (is_seen & (slot < self.position.shape[2])).any((1, 2))

    def _held(self, slot: Int[Array, "B K U"]) -> tuple[Int[Array, "B K U"], Int[Array, "B K U"]]:
        """Returns position and segment of the tokens in `slot`; an index past the last slot gives the last slot."""
        slot = jnp.minimum(slot, self.position.shape[2] - 1)
        return _picked(self.position, slot, -1), _picked(self.segment, slot, -1)

    def _heads(self, shard) -> Int[Array, "K"]:
        heads = self.position.shape[1]
        return shard * heads + jnp.arange(heads, dtype=jnp.int32)

    def _given(self, now: Mask, shard) -> _Given:
        _, heads, slots = self.position.shape
        position, segment = (jnp.repeat(x[:, None], heads, 1) for x in (now.k_position, now.k_segment))
        block, place = position // self.pattern.block, position % self.pattern.block
        is_strided = self.pattern.is_strided(block, self._heads(shard)[None, :, None], kv_heads=self.kv_heads)
        # One block in `stride` is strided, so block // stride counts them.
        far = self.near + (block // self.pattern.stride * self.pattern.block + place) % (slots - self.near)
        slot = jnp.concatenate([position % self.near, jnp.where(is_strided, far, slots)], 2)
        position, segment = (jnp.tile(x, (1, 1, 2)) for x in (position, segment))
        return _Given(position, segment, jnp.where(segment < 0, slots, slot))

    def _is_lost(self, position, segment, slot, q_position, q_segment) -> Bool[Array, "..."]:
        """Returns whether an overwritten token, given by position, segment and slot, can still be seen by the query."""
        return (
            (segment >= 0) & (segment == q_segment) & (self.pattern.is_near(q_position, position) | (slot >= self.near))
        )

    def _sources(self, given: _Given) -> tuple[Int[Array, "B K S"], Bool[Array, "B K S"]]:
        """Returns for each slot the index of the last token written to it, or -1, and whether a token that could still
        be seen was overwritten there."""
        number = jnp.broadcast_to(jnp.arange(given.slot.shape[2], dtype=jnp.int32), given.slot.shape)
        nobody = jnp.full(self.position.shape, -1, jnp.int32)
        latest = _each(lambda x, slot, number: x.at[slot].max(number, mode="drop"))
        source = latest(nobody, given.slot, number)
        winner = _picked(source, jnp.minimum(given.slot, nobody.shape[2] - 1), -1)
        seen_by = _picked(given.position, winner, 0), _picked(given.segment, winner, -1)
        is_lost = (winner != number) & self._is_lost(*given, *seen_by)
        return source, latest(nobody, given.slot, is_lost.astype(jnp.int32)) > 0


def _each(function: Callable) -> Callable:
    """Maps a function of one head of one row over the first two axes of arrays [B, K, ...]."""
    return jax.vmap(jax.vmap(function))


def _put(x: Array, new: Array, slot: Int[Array, "B K U"]) -> Array:
    """Returns `x` [B, K, S, ...] with `new` [B, K, U, ...] written to the slots `slot`."""
    return _each(lambda x, new, slot: x.at[slot].set(new, mode="drop"))(x, new, slot)


def _picked(x: Array, place: Int[Array, "B K U"], nothing: int) -> Array:
    """Returns the entries of `x` [B, K, S, ...] at `place`, [B, K, U, ...]; `nothing` where place is -1."""
    picked = _each(lambda x, place: x[jnp.maximum(place, 0)])(x, place)
    return jnp.where((place < 0).reshape(place.shape + (1,) * (x.ndim - 3)), nothing, picked)


def _marked(x: Float[Array, "B K U H"], is_lost: Bool[Array, "B K U"]) -> Array:
    return jnp.where(is_lost[..., None], jnp.nan, x)
