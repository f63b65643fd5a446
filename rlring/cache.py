"""KVCache: an immutable cache of the keys and values of earlier tokens, for decoding.

Every layer has its own arrays, in the layout in which attention computes, so that a step reads each array once and
copies none.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from rlring.attention import Mask, SparsePattern
from rlring.attention.checks import check_batch
from rlring.attention.decode import attend
from rlring.dense_cache import DenseSlots
from rlring.errors import UsageError, shown
from rlring.sparse_cache import SparseSlots

KeyValue = tuple[Float[Array, "B T K H"], Float[Array, "B T K H"]]  # keys and values of tokens in one layer


Slots = DenseSlots | SparseSlots


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """The keys and values of every layer, with the positions and segments of their tokens.

    Dense layers hold the last `capacity` tokens (DenseSlots), sparse layers the tokens that their heads can still see
    (SparseSlots). If a token would see one that the cache no longer holds, its output is NaN. Writing returns a new
    cache; XLA reuses the memory of the old one if it is donated.
    """

    key: tuple[Float[Array, "B K S H"], ...]  # one array per layer
    value: tuple[Float[Array, "B K S H"], ...]
    dense: DenseSlots | None  # None: no layer is dense
    sparse: SparseSlots | None  # None: no layer is sparse
    capacity: int = field(metadata={"static": True})  # tokens
    is_sparse: tuple[bool, ...] = field(metadata={"static": True})  # one per layer

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
        """Returns an empty cache for `batch` rows of up to `capacity` tokens.

        Args:
            patterns: for each layer None if it is dense, else its SparsePattern, the same in all sparse layers.

        Raises:
            UsageError: capacity below 1, or a batch or capacity that cannot be split over the mesh.
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
        dense = None if all(is_sparse) else DenseSlots.empty(batch, capacity, devices=shards)
        cache = cls((), (), dense, sparse, capacity, is_sparse)
        shapes = [(batch, kv_heads, cache._slots(kind).position.shape[-1], head_size) for kind in is_sparse]
        key, value = (tuple(jnp.zeros(shape, dtype) for shape in shapes) for _ in range(2))
        return replace(cache, key=key, value=value)._laid_out(mesh)

    def with_prompt(self, kept: Sequence[KeyValue], prompt: Mask, *, mesh: Mesh | None) -> "KVCache":
        """Returns the cache filled with a prompt; call it on an empty cache. `kept` has the prompt's keys and values in
        each layer.

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
        """Returns the attention of new tokens over the cache of layer `layer` and over each other, and the layer's keys
        and values with those of the new tokens written, for `with_tokens`. `now` is the mask of the new tokens.

        Keys and values are written before they are read. In the other order, XLA would copy them.
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
        """Returns the cache with the new tokens of mask `now`. `held` has, for each layer, the keys and values that
        attend() returned."""

        def after(slots: Slots, held, tokens, now: Mask, shard):
            return slots.after(now, shard)

        key, value = zip(*held, strict=True)
        dense, sparse = (
            slots and _on_shards(after, slots, (), (), now, mesh, returns="slots")
            for slots in (self.dense, self.sparse)
        )
        return replace(self, key=key, value=value, dense=dense, sparse=sparse)

    def rolled_back(self, tokens: Int[Array, "B"], *, mesh: Mesh | None = None) -> "KVCache":
        """Returns the cache without the last `tokens[b]` tokens of each row b, as if they had never been written.

        For speculative decoding (2211.17192): write all proposed tokens, then roll back those that are not accepted.
        Tokens that were overwritten do not come back: if a query sees one, its output is NaN. With a window, a capacity
        of window + T - 1 is enough for steps of T tokens, if each step is rolled back before the next. Padding does not
        count as a token. If a row has fewer tokens, all are removed. `tokens` may be traced.

        Raises:
            UsageError: a cache with sparse layers, or `tokens` is not an array of B whole numbers from 0 on.
        """
        if self.dense is None or self.sparse is not None:
            raise UsageError(
                "a cache with sparse layers cannot be rolled back: its slots are given by position, and what was in "
                "them is gone. Keep the cache from before the tokens, or use another attention scheme."
            )
        rows, shape, dtype = self.dense.written.shape, getattr(tokens, "shape", None), getattr(tokens, "dtype", None)
        fits = shape == rows and dtype is not None and jnp.issubdtype(dtype, jnp.integer)
        least = np.min(tokens) if fits and rows[0] and not isinstance(tokens, jax.core.Tracer) else 0
        if not fits or least < 0:
            got = f"{dtype}{list(shape)}" if shape is not None else shown(tokens)
            raise UsageError(
                f"a cache is rolled back by a number of tokens for each of its {rows[0]} rows, from 0 on; got "
                f"{got if least >= 0 else f'{got} with {least}'}."
            )

        def erased(slots: DenseSlots, held, _, freed, shard):
            return slots.erased(held, freed, shard)

        freed = self.dense.freed_by(jnp.asarray(tokens, jnp.int32))
        held = self.key, self.value
        key, value = _on_shards(erased, self.dense, held, (), freed, mesh, returns="held")
        return replace(self, key=key, value=value, dense=self.dense.without(freed))._laid_out(mesh)

    def check(self, tokens: int) -> None:
        """Raises UsageError if this number of tokens cannot be written in one step."""
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


def _on_shards(function: Callable, slots: Slots, held, tokens, now: Mask | Array, mesh: Mesh | None, *, returns):
    """Calls function(slots, held, tokens, now, shard) on each device with its parts of the arrays; returns the result.

    `held` has arrays [B, K, S, H], `tokens` arrays [B, T, N, H]. `shard` is the index of the device among those over
    which the slots or the heads are split. `returns` names the sharding of the results: keys of `specs` below.
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
