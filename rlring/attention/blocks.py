"""Blocks: how attention is cut into blocks, which blocks are computed, and in what order."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from rlring.attention.mask import Mask
from rlring.attention.rows import RowGroups, Rows
from rlring.attention.score_mod import ModGradients, RowTerms, ScoreMod

SHORTEST_HALVED = 256  # tokens of a shard; for shorter ones, the cost of smaller products exceeds what skipping saves


def default_block(platform: str, *, is_split: bool) -> int:
    """Returns the default number of tokens of a block; `is_split`: the sequence is split over devices.

    Virtual devices of a CPU share its cores, and each product runs on one core. There, blocks of 256 reduce the time of
    a ring of 8 to 0.8 to 0.95, and that of all_gather to 0.7. On a single CPU device they increase the time 1.3 to 1.9
    times.
    """
    return 256 if platform == "cpu" and is_split else 512


class Blocks(NamedTuple):
    """How attention is cut into blocks."""

    q: int  # queries
    k: int  # keys
    scores: int  # scores held at once; if all rows do not fit, groups of rows are computed one after the other

    def fit(self, q: Float[Array, "B T N H"], k: Float[Array, "B S K H"]) -> "Blocks":
        """Returns blocks no longer than the sequences."""
        return self._replace(q=min(self.q, q.shape[1]), k=min(self.k, k.shape[1]))

    def within_halves(self, q_length: int, k_length: int) -> "Blocks":
        """Returns blocks that do not cross the middle of a shard of these lengths.

        In zigzag order the positions of the two halves of a shard are far apart, so a block with tokens of both halves
        could never be skipped.
        """

        def within(block: int, length: int) -> int:
            half = -(-length // 2)
            return -(-half // -(-half // block)) if length >= SHORTEST_HALVED else block

        return self._replace(q=within(self.q, q_length), k=within(self.k, k_length))

    def row_groups(self, q: Float[Array, "B T N H"], k: Float[Array, "B S K H"]) -> RowGroups:
        """Returns the groups of rows that are computed at once."""
        batch, _, kv_heads, _ = k.shape
        group = q.shape[2] // kv_heads
        return RowGroups.of(batch * kv_heads, kv_heads, self.scores // (group * self.q * self.k))

    def padded(
        self, q: Array, k: Array, v: Array, mask: Mask, mod: ScoreMod
    ) -> tuple[Array, Array, Array, Mask, ScoreMod]:
        """Returns all five padded to lengths that are multiples of the blocks; the added tokens are masked."""
        q_length, k_length = -(-q.shape[1] // self.q) * self.q, -(-k.shape[1] // self.k) * self.k
        mod = mod.padded(q_length, k_length - k.shape[1])
        return pad(q, 1, q_length), pad(k, 1, k_length), pad(v, 1, k_length), mask.padded(q_length, k_length), mod

    def mask(self, mask: Mask, i: Int32[Array, ""], j: Int32[Array, ""]) -> Mask:
        """Returns the mask of query block i and key block j."""
        return mask.block(i * self.q, self.q, j * self.k, self.k)

    def terms(self, mod: ScoreMod, rows: Rows, mask: Mask, start) -> RowTerms:
        """Returns the RowTerms of these rows for the block of queries from `start` and the keys of `mask`."""
        return rows.terms(mod, start, self.q, mask.span_of_keys)

    def add_terms(self, total: ModGradients, part: RowTerms, rows: Rows, mask: Mask, start) -> ModGradients:
        """Returns the total with the gradients `part` of the result of terms() added."""
        return rows.add_terms(total, part, start, mask.span_of_keys)


class BlockSchedule(NamedTuple):
    """The order in which the blocks of the other side are visited: fully visible ones, then partly visible ones.

    The unseen blocks are last in `order`, and are not visited.
    """

    order: Int32[Array, "blocks"]
    whole: Int32[Array, ""]  # number of fully visible blocks
    seen: Int32[Array, ""]  # number of blocks seen at all

    @classmethod
    def of(cls, seen: Bool[Array, "blocks"], whole: Bool[Array, "blocks"]) -> "BlockSchedule":
        order = jnp.argsort(jnp.where(whole, 0, jnp.where(seen, 1, 2)))
        return cls(order, whole.sum(), seen.sum())

    def walk(self, step: Callable, state, *, shields: Bool[Array, ""]):
        """Returns the state after step(block, state, is_masked=..., shields=...) for every block that is seen."""
        state = self.visit(0, self.whole, step, state)
        return self.visit_masked(step, state, shields=shields)

    def visit_masked(self, step: Callable, state, *, shields: Bool[Array, ""]):
        """Returns the state after step(block, state, is_masked=True, shields=...) for every partly visible block."""
        # Two loops, one of them empty, instead of lax.cond: XLA copies the state of branches, but not that of loops.
        plain = jnp.where(shields, self.whole, self.seen)
        state = self.visit(self.whole, plain, partial(step, is_masked=True), state)
        return self.visit(plain, self.seen, partial(step, is_masked=True, shields=True), state)

    def visit(self, start, stop, step: Callable, state):
        """Returns the state after step(block, state) for the entries `start` to `stop` of the order."""
        return lax.fori_loop(start, stop, lambda n, state: step(self.order[n], state), state)


def take(x: Array, block, size: int, dimension: int) -> Array:
    """Returns block number `block`, of `size` tokens, of x along `dimension`."""
    return lax.dynamic_slice_in_dim(x, block * size, size, dimension)


def put(x: Array, part: Array, block, dimension: int) -> Array:
    """Returns x with block number `block` replaced by `part`. In a loop this is in place, whereas stacking and joining
    parts would make another copy."""
    return lax.dynamic_update_slice_in_dim(x, part, block * part.shape[dimension], dimension)


def joined(parts: Array, dimension: int) -> Array:
    """Returns [blocks, ..., size, ...] as [..., blocks * size, ...]."""
    moved = jnp.moveaxis(parts, 0, dimension)
    shape = moved.shape
    return moved.reshape(*shape[:dimension], shape[dimension] * shape[dimension + 1], *shape[dimension + 2 :])


def pad(x: Array, dimension: int, length: int) -> Array:
    """Returns x with zeros appended up to the length."""
    return jnp.pad(x, [(0, length - size if d == dimension else 0) for d, size in enumerate(x.shape)])
