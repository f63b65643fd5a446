"""Blocks: how attention is cut into pieces, which of them are worth a visit, and in what order."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from rlring.attention.mask import Mask
from rlring.attention.rows import RowGroups, Rows
from rlring.attention.score_mod import ModGradients, RowTerms, ScoreMod

SHORTEST_HALVED = 256  # tokens of a shard; below, more but smaller products cost more than the skipped ones save


def default_block(platform: str, *, is_split: bool) -> int:
    """Returns the tokens of a block; is_split: the sequence is, over devices.

    The devices of a CPU share its cores, each product of theirs has one: with smaller blocks a ring of 8 takes 0.8 to
    0.95 of the time, all_gather 0.7, where on one device attention takes 1.3 to 1.9 times as long.
    """
    return 256 if platform == "cpu" and is_split else 512


class Blocks(NamedTuple):
    """How attention is cut into blocks."""

    q: int  # queries
    k: int  # keys
    scores: int  # scores held at once: rows that do not fit are computed group by group

    def fit(self, q: Float[Array, "B T N H"], k: Float[Array, "B S K H"]) -> "Blocks":
        """Returns blocks no longer than the sequences."""
        return self._replace(q=min(self.q, q.shape[1]), k=min(self.k, k.shape[1]))

    def within_halves(self, q_length: int, k_length: int) -> "Blocks":
        """Returns blocks none of which reaches over the middle of a shard of these lengths.

        With the zigzag order the two halves of a shard are far apart, and a block with tokens of both is always seen.
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
        """Returns all five with lengths that are multiples of the blocks; what is added is nowhere."""
        q_length, k_length = -(-q.shape[1] // self.q) * self.q, -(-k.shape[1] // self.k) * self.k
        mod = mod.padded(q_length, k_length - k.shape[1])
        return pad(q, 1, q_length), pad(k, 1, k_length), pad(v, 1, k_length), mask.padded(q_length, k_length), mod

    def mask(self, mask: Mask, i: Int32[Array, ""], j: Int32[Array, ""]) -> Mask:
        """Returns the mask of query block i and key block j."""
        return mask.block(i * self.q, self.q, j * self.k, self.k)

    def terms(self, mod: ScoreMod, rows: Rows, mask: Mask, start) -> RowTerms:
        """Returns what belongs to these rows and the queries from start, of a block with this mask."""
        return rows.terms(mod, start, self.q, mask.span_of_keys)

    def add_terms(self, total: ModGradients, part: RowTerms, rows: Rows, mask: Mask, start) -> ModGradients:
        """Returns the total with the gradients of what terms() returned."""
        return rows.add_terms(total, part, start, mask.span_of_keys)


class BlockSchedule(NamedTuple):
    """The other side's blocks in the order of work: seen as a whole, seen in part, not seen."""

    order: Int32[Array, "blocks"]
    whole: Int32[Array, ""]
    seen: Int32[Array, ""]

    @classmethod
    def of(cls, seen: Bool[Array, "blocks"], whole: Bool[Array, "blocks"]) -> "BlockSchedule":
        order = jnp.argsort(jnp.where(whole, 0, jnp.where(seen, 1, 2)))
        return cls(order, whole.sum(), seen.sum())

    def walk(self, step: Callable, state, *, shields: Bool[Array, ""]):
        """Returns the state after step(block, state, is_masked=..., shields=...) at every block that is seen."""
        state = self.visit(0, self.whole, step, state)
        return self.visit_masked(step, state, shields=shields)

    def visit_masked(self, step: Callable, state, *, shields: Bool[Array, ""]):
        """Returns the state after step(block, state, is_masked=True, shields=...) at every block seen in part."""
        # Loops of no step: what they go on with is not copied, as it is for branches.
        plain = jnp.where(shields, self.whole, self.seen)
        state = self.visit(self.whole, plain, partial(step, is_masked=True), state)
        return self.visit(plain, self.seen, partial(step, is_masked=True, shields=True), state)

    def visit(self, start, stop, step: Callable, state):
        """Returns the state after step(block, state) at these places of the order."""
        return lax.fori_loop(start, stop, lambda n, state: step(self.order[n], state), state)


def take(x: Array, block, size: int, dimension: int) -> Array:
    """Returns one block of x."""
    return lax.dynamic_slice_in_dim(x, block * size, size, dimension)


def put(x: Array, part: Array, block, dimension: int) -> Array:
    """Returns x with this block of it: in place, in a loop, where parts stacked and joined would be one more copy."""
    return lax.dynamic_update_slice_in_dim(x, part, block * part.shape[dimension], dimension)


def joined(parts: Array, dimension: int) -> Array:
    """Returns [blocks, ..., size, ...] as [..., blocks * size, ...]."""
    moved = jnp.moveaxis(parts, 0, dimension)
    shape = moved.shape
    return moved.reshape(*shape[:dimension], shape[dimension] * shape[dimension + 1], *shape[dimension + 2 :])


def pad(x: Array, dimension: int, length: int) -> Array:
    """Returns x with zeros appended up to the length."""
    return jnp.pad(x, [(0, length - size if d == dimension else 0) for d, size in enumerate(x.shape)])
