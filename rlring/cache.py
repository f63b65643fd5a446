"""KVCache: the keys and values that new tokens may still see, as a value.

Every layer has arrays of its own, of rows as attention works on them: a step reads each once and copies none.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from rlring.attention import Mask, SparsePattern
from rlring.attention.blocks import pad
from rlring.attention.checks import check_batch
from rlring.attention.decode import attend
from rlring.errors import UsageError
from rlring.mesh import SEQUENCE_AXES
from rlring.sparse_cache import SparseSlots

KeyValue = tuple[Float[Array, "B T K H"], Float[Array, "B T K H"]]  # of tokens in one layer


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DenseSlots:
    """Which tokens the slots of a dense layer hold: the last that were written; all such layers hold the same.

    Past the last slot writing starts again at the first, which is exact as long as nobody sees what was there: that is
    how a window bounds the memory, at window + T - 1 slots for steps of T tokens. Exact where the tokens of a row come
    in order, one segment after the other. Where a token takes the place of one that can still be seen, what sees either
    becomes NaN: what is wrong is seen. Tokens that are nowhere take nobody's place.
    """

    position: Int[Array, "B S"]
    segment: Int[Array, "B S"]  # -1: nothing, so nobody sees it
    written: Int[Array, ""]  # tokens since the cache was empty
    capacity: int = field(metadata={"static": True})  # of all devices together

    @classmethod
    def empty(cls, batch: int, capacity: int) -> "DenseSlots":
        shape = batch, capacity
        return cls(jnp.full(shape, -1, jnp.int32), jnp.full(shape, -1, jnp.int32), jnp.int32(0), capacity)

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
        tokens = P("data", SEQUENCE_AXES)
        return replace(self, position=tokens, segment=tokens, written=P())

    def mask(self, now: Mask) -> Mask:
        """Returns what the new tokens see of the slots."""
        return replace(now, k_position=self.position, k_segment=self.segment)

    def with_prompt(self, prompt: Mask) -> "DenseSlots":
        """Returns the slots of a cache that begins with a prompt, from empty ones."""
        held = prompt.padded(prompt.q_position.shape[1], self.capacity)
        written = jnp.int32(prompt.k_position.shape[1])
        return replace(self, position=held.k_position, segment=held.k_segment, written=written)

    def hold(self, x: Float[Array, "B T K H"], prompt: Mask) -> Float[Array, "B K S H"]:
        """Returns what empty slots hold of a prompt's keys or values."""
        # Padding may be anything, and whoever is there next is spoilt by what is no number.
        there = jnp.where((prompt.k_segment >= 0)[..., None, None], x, jnp.zeros((), x.dtype))
        return pad(jnp.moveaxis(there, 1, 2), 2, self.capacity)

    def after(self, now: Mask, shard: Int[Array, ""] | int) -> "DenseSlots":
        """Returns the slots once the new tokens are in them."""
        held, is_there = self._held(now, shard), now.k_segment >= 0
        position = jnp.where(is_there, now.k_position, held.k_position)
        segment = jnp.where(is_there, now.k_segment, held.k_segment)
        position, segment = (
            self._write(x, new, shard, 1) for x, new in ((self.position, position), (self.segment, segment))
        )
        return replace(self, position=position, segment=segment, written=self.written + now.k_position.shape[1])

    def put(
        self, x: Float[Array, "B K S H"], new: Float[Array, "B T K H"], now: Mask, shard: Int[Array, ""] | int
    ) -> Float[Array, "B K S H"]:
        """Returns the keys or values with those of new tokens written."""
        # Seen by whoever would have seen what it takes the place of.
        is_lost = (self._held(now, shard).visible() & now.visible()).any(1)
        new = jnp.where(is_lost[..., None, None], jnp.nan, new).astype(x.dtype)
        held = jnp.take(x, self._slot(new.shape[1], shard), 2, mode="clip")
        is_there = (now.k_segment >= 0)[:, None, :, None]
        return self._write(x, jnp.where(is_there, jnp.moveaxis(new, 1, 2), held), shard, 2)

    def is_lost(self, now: Mask, shard: Int[Array, ""] | int) -> Bool[Array, "B T"]:
        """Returns which of the new tokens see what others of them take the place of."""
        return self._held(now, shard).visible().any(2)

    def _held(self, now: Mask, shard) -> Mask:
        """Returns what the new tokens see of what was in the slots that they are given."""
        slot = self._slot(now.k_position.shape[1], shard)
        position, segment = (jnp.take(x, slot, 1, mode="fill", fill_value=-1) for x in (self.position, self.segment))
        return replace(now, k_position=position, k_segment=segment)

    def _slot(self, tokens: int, shard) -> Int[Array, "T"]:
        """Returns the slots that new tokens are given, one past the last for those of other devices."""
        own = self.position.shape[1]
        slot = (self.written + jnp.arange(tokens, dtype=jnp.int32)) % self.capacity - shard * own
        return jnp.where(slot < 0, own, slot)

    def _write(self, x: Array, new: Array, shard, dimension: int) -> Array:
        tokens = new.shape[dimension]
        # Those of other devices are dropped. So is one more that is nothing: a single one would become the update of a
        # slice, which XLA computes twice, to return it and to read it.
        slot = jnp.append(self._slot(tokens, shard), x.shape[dimension])
        return x.at[(slice(None),) * dimension + (slot,)].set(pad(new, dimension, tokens + 1), mode="drop")


Slots = DenseSlots | SparseSlots


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """The keys and values of every layer, and which tokens they are of.

    Dense layers hold the last `capacity` tokens (DenseSlots), sparse layers what their heads can still see
    (SparseSlots). A token that would see what they no longer hold becomes NaN. Writing returns a new cache (XLA reuses
    the memory when the old one is donated).
    """

    key: tuple[Float[Array, "B K S H"], ...]  # of each layer
    value: tuple[Float[Array, "B K S H"], ...]
    dense: DenseSlots | None  # None: there is no such layer
    sparse: SparseSlots | None
    capacity: int = field(metadata={"static": True})  # tokens
    is_sparse: tuple[bool, ...] = field(metadata={"static": True})  # each layer

    @classmethod
    def empty(
        cls,
        batch: int,
        *,
        capacity: int,
        patterns: Sequence[SparsePattern | None],
        kv_heads: int,
        head_size: int,
        dtype: str,
        mesh: Mesh | None,
    ) -> "KVCache":
        """Returns a cache that holds nothing; each layer is dense (None) or has the pattern, the same in all.

        Raises:
            UsageError: no capacity, or a batch or capacity that cannot be split over the mesh.
        """
        if capacity < 1:
            raise UsageError(
                f"a cache holds at least one token; got capacity={capacity}. Give it room for all that is seen."
            )
        if mesh is not None:
            check_batch(batch, mesh)
        shards = 1 if mesh is None else mesh.shape["ring"] * mesh.shape["ulysses"]
        if capacity % shards:
            raise UsageError(
                f"the slots of a cache are split over {shards} devices; got capacity={capacity}. Use a multiple of "
                f"{shards}."
            )
        is_sparse = tuple(pattern is not None for pattern in patterns)
        pattern = next((p for p in patterns if p is not None), None)
        sparse = None if pattern is None else SparseSlots.empty(batch, capacity, pattern=pattern, kv_heads=kv_heads)
        dense = None if all(is_sparse) else DenseSlots.empty(batch, capacity)
        cache = cls((), (), dense, sparse, capacity, is_sparse)
        shapes = [(batch, kv_heads, cache._slots(kind).position.shape[-1], head_size) for kind in is_sparse]
        key, value = (tuple(jnp.zeros(shape, dtype) for shape in shapes) for _ in range(2))
        return replace(cache, key=key, value=value)._laid_out(mesh)

    def with_prompt(self, kept: Sequence[KeyValue], prompt: Mask, *, mesh: Mesh | None) -> "KVCache":
        """Returns the cache, which is empty, begun with a prompt; `kept` are its keys and values in each layer.

        Raises:
            UsageError: a prompt of more tokens than the capacity.
        """
        tokens = prompt.q_position.shape[1]
        if tokens > self.capacity:
            raise UsageError(
                f"a cache of {self.capacity} slots cannot hold a prompt of {tokens} tokens; raise its capacity."
            )
        key, value = (
            tuple(self._slots(kind).hold(pair[i], prompt) for kind, pair in zip(self.is_sparse, kept, strict=True))
            for i in range(2)
        )
        dense = None if self.dense is None else self.dense.with_prompt(prompt)
        sparse = None if self.sparse is None else self.sparse.with_prompt(prompt)
        return replace(self, key=key, value=value, dense=dense, sparse=sparse)._laid_out(mesh)

    def attend(
        self,
        layer: int,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        now: Mask,
        *,
        mesh: Mesh | None,
    ) -> tuple[Float[Array, "B T N H"], tuple[Array, Array]]:
        """Returns attention of new tokens, `now` their own mask, over a layer and each other; and its keys and values
        with theirs written, for `with_tokens`.

        They are written first: were they read first, XLA would read a copy.
        """

        def attend_here(slots: Slots, held, tokens, now: Mask, shard):
            q, k, v = tokens
            key, value = (slots.put(x, new, now, shard) for x, new in zip(held, (k, v), strict=True))
            rows = (x.reshape(-1, *x.shape[2:]).astype(q.dtype) for x in (key, value))
            axes = () if mesh is None else slots.spec(mesh)[2] or ()
            mask, is_lost = slots.after(now, shard).mask(now), slots.is_lost(now, shard)
            out, _ = attend(q, *rows, mask=mask, axes=axes, is_lost=is_lost)
            return out, (key, value)

        slots, held = self._slots(self.is_sparse[layer]), (self.key[layer], self.value[layer])
        return _on_shards(attend_here, slots, held, (q, k, v), now, mesh, returns=("tokens", "held"))

    def with_tokens(self, held: Sequence[tuple[Array, Array]], now: Mask, *, mesh: Mesh | None) -> "KVCache":
        """Returns the cache with new tokens in it, from what attend() returned for each layer."""

        def after(slots: Slots, held, tokens, now: Mask, shard):
            return slots.after(now, shard)

        key, value = zip(*held, strict=True)
        dense, sparse = (
            slots and _on_shards(after, slots, (), (), now, mesh, returns="slots")
            for slots in (self.dense, self.sparse)
        )
        return replace(self, key=key, value=value, dense=dense, sparse=sparse)

    def check(self, tokens: int) -> None:
        """Raises UsageError if so many tokens cannot be written at a time."""
        for slots in (self.dense, self.sparse):
            if slots is not None:
                slots.check(tokens)

    def _laid_out(self, mesh: Mesh | None) -> "KVCache":
        if mesh is None:
            return self

        def laid_out(x, spec: P):
            return lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

        specs = [self._slots(kind).spec(mesh) for kind in self.is_sparse]
        key, value = (tuple(map(laid_out, held, specs)) for held in (self.key, self.value))
        dense, sparse = (
            slots and jax.tree.map(laid_out, slots, slots.specs(mesh)) for slots in (self.dense, self.sparse)
        )
        return replace(self, key=key, value=value, dense=dense, sparse=sparse)

    def _slots(self, is_sparse: bool) -> Slots:
        slots = self.sparse if is_sparse else self.dense
        assert slots is not None  # there is a layer of this kind
        return slots


def _on_shards(function: Callable, slots: Slots, held, tokens, now: Mask, mesh: Mesh | None, *, returns):
    """Returns function(slots, held, tokens, now, shard) of what each device has; held[B, K, S, H], tokens[B, T, N, H].

    `shard` is the number of the device among those that the slots or their heads are split over; `returns` names how
    what is returned is laid out.
    """
    if mesh is None:
        return function(slots, held, tokens, now, 0)
    _, of_heads, of_slots = slots.spec(mesh)
    specs = {
        "slots": slots.specs(mesh),
        "held": slots.spec(mesh),
        "tokens": P("data", None, of_heads),
        "now": P("data"),
    }
    split = of_heads or of_slots

    def here(*arrays):
        return function(*arrays, lax.axis_index(split) if split else 0)

    in_specs = tuple(specs.values())
    out_specs = jax.tree.map(specs.get, returns)
    on_shards = jax.shard_map(here, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    return on_shards(slots, held, tokens, now)
