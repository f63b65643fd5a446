"""The same bits whatever the ring: blocks are visited in an order that no cutting of the sequence changes.

A block of queries visits blocks of keys in one cyclic order, from its own downwards: b, b - 1, ..., 0, last, ...,
b + 1. That is how keys come by on a ring: first those at home, then those of the devices before, wrapping round. So
those at home are visited in two parts, at the beginning and at the end, and nothing is computed twice. A block of keys
meets blocks of queries in the mirrored order, from its own upwards, and takes its gradients along from block to block.
In the backward a ring turns the other way round: there both orders are turned round as well.

What the blocks are does not depend on the ring either, nor does what is done with one: softmax and gradients are added
block by block, in place. A block that is not seen is left out, which adds nothing to a sum.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol, get_args

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from rlring.attention.block_view import Seen
from rlring.attention.blocks import Blocks, joined, put, take
from rlring.attention.kernel import BackwardInputs, Gradients, Kernel, delta_of, with_sinks
from rlring.attention.mask import Mask
from rlring.attention.score_mod import ScoreMod
from rlring.attention.softmax import PartialAttention, zeros

Part = Literal["begin", "away", "end"]  # at home from the own block on; other devices'; the rest at home


class FixedOrder(NamedTuple):
    """A part of the cyclic order in which blocks meet. Hashable."""

    part: Part
    rises: bool = False  # turned round: queries visit keys from their own upwards

    def keys(self, seen: Seen, i, q_blocks: int) -> "FixedSchedule":
        """Returns the blocks of keys that block i of queries visits."""
        blocks = seen[0].shape[0]
        is_visited = self._is_visited(_own(i, q_blocks, blocks), jnp.arange(blocks))
        return FixedSchedule.of(seen, is_visited, rises=self.rises)

    def queries(self, seen: Seen, j, k_blocks: int) -> "FixedSchedule":
        """Returns the blocks of queries that visit block j of keys."""
        blocks = seen[0].shape[0]
        is_visited = self._is_visited(_own(jnp.arange(blocks), blocks, k_blocks), j)
        return FixedSchedule.of(seen, is_visited, rises=not self.rises)

    def block_of_keys(self, n, k_blocks: int):
        """Returns which block of keys is the n-th."""
        return n if self.rises else k_blocks - 1 - n

    def _is_visited(self, own, j) -> Bool[Array, "blocks"]:
        if self.part == "away":
            return jnp.broadcast_to(True, jnp.broadcast_shapes(jnp.shape(own), jnp.shape(j)))
        begins = (j >= own) if self.rises else (j <= own)
        return begins if self.part == "begin" else ~begins


class FixedSchedule(NamedTuple):
    """The other side's blocks that are seen, in their order; BlockSchedule is the one that sorts them by kind."""

    order: Int32[Array, "blocks"]
    seen: Int32[Array, ""]
    is_whole: Bool[Array, "blocks"]

    @classmethod
    def of(cls, seen: Seen, is_visited: Bool[Array, "blocks"], *, rises: bool) -> "FixedSchedule":
        is_seen, is_whole = seen
        is_seen &= is_visited
        blocks = is_seen.shape[0]
        place = jnp.arange(blocks) if rises else jnp.arange(blocks)[::-1]
        return cls(jnp.argsort(jnp.where(is_seen, place, blocks)), is_seen.sum(), is_whole)

    def walk(self, step: Callable, state):
        """Returns the state after step(block, state, is_masked=..., shields=...) at every block that is seen."""

        def visit(start, stop, state, **how):
            return lax.fori_loop(start, stop, lambda n, state: step(self.order[n], state, **how), state)

        def step_at(n, state):
            # Two loops of one step or none, whose state is not copied, as it is for branches. The block comes from the
            # counter: XLA moves out of a loop, and does in any case, what is the same in each of its steps.
            after_whole = n + self.is_whole[self.order[n]].astype(n.dtype)
            state = visit(n, after_whole, state)
            # Always shielded: whether it is needed must not be asked of what happens to be on one device.
            return visit(after_whole, n + 1, state, is_masked=True, shields=True)

        return lax.fori_loop(0, self.seen, step_at, state)


class OrderedKernel(Kernel, Protocol):
    """A named tuple with these fields."""

    blocks: Blocks
    order: FixedOrder | None

    def _replace(self, *, order: FixedOrder) -> "OrderedKernel": ...


class FixedOrderKernel(NamedTuple):
    """A kernel whose blocks meet in the fixed order."""

    kernel: OrderedKernel
    heads_first = False

    def part(self, part: Part, *, rises: bool = False) -> Kernel:
        """Returns the kernel of a part of the order."""
        return self.kernel._replace(order=FixedOrder(part, rises))

    def residual_dtype(self, dtype: jnp.dtype) -> jnp.dtype:
        return self.kernel.residual_dtype(dtype)

    def by_blocks(self, inputs: BackwardInputs) -> BackwardInputs:
        """Returns it with its delta computed block by block: a product of all queries is rounded as its size wants."""
        size = self.kernel.blocks.q

        def add(n, delta):
            # Barriers: what is beside it in the program may be computed with it.
            of_block = lax.optimization_barrier([take(x, n, size, 1) for x in (inputs.out, inputs.d_out)])
            return put(delta, lax.optimization_barrier(delta_of(*of_block)), n, 2)

        none = zeros(inputs.total.shape, inputs.delta.dtype, inputs.d_out)
        return inputs.with_delta(lax.fori_loop(0, none.shape[2] // size, add, none))

    def with_sinks(self, out: Float[Array, "B T N V"], lse: Float[Array, "B N T"], sinks: Float[Array, "N"] | None):
        """Returns kernel.with_sinks() computed block by block: its gradient has a sum like that of delta."""
        if sinks is None:
            return out, lse
        size = self.kernel.blocks.q
        count = out.shape[1] // size
        out = jnp.moveaxis(out.reshape(out.shape[0], count, size, *out.shape[2:]), 1, 0)
        lse = jnp.moveaxis(lse.reshape(*lse.shape[:2], count, size), 2, 0)
        out, lse = lax.map(lambda block: with_sinks(*block, sinks), (out, lse))
        return joined(out, 1), joined(lse, 2)

    def forward(self, q, k, v, mask: Mask, mod: ScoreMod, before: PartialAttention | None = None) -> PartialAttention:
        total = self.part("begin").forward(q, k, v, mask, mod, before)
        return self.part("end").forward(q, k, v, mask, mod, total)

    def backward(
        self, q, k, v, mask: Mask, mod: ScoreMod, inputs: BackwardInputs, before: Gradients | None = None
    ) -> Gradients:
        rises, inputs = turns_back(mask), self.by_blocks(inputs)
        total = self.part("begin", rises=rises).backward(q, k, v, mask, mod, inputs, before)
        return self.part("end", rises=rises).backward(q, k, v, mask, mod, inputs, total)


class Parts(NamedTuple):
    """What computes the keys at home, those of other devices, and at last at home again."""

    begin: Kernel
    away: Kernel
    end: Kernel | None

    @classmethod
    def of(cls, kernel: Kernel, *, rises: bool = False) -> "Parts":
        if not isinstance(kernel, FixedOrderKernel):
            return cls(kernel, kernel, None)
        return cls(*(kernel.part(part, rises=rises) for part in get_args(Part)))


def turns_back(mask: Mask) -> bool:
    """Returns whether the backward turns the other way round, on a ring of any size: not where a window may spare it
    most of the hops."""
    return not (mask.is_causal and mask.reach[0] is not None)


def _own(i, q_blocks: int, k_blocks: int):
    """Returns the block of keys that stands where block i of queries ends: the same on a ring of any size."""
    return ((i + 1) * k_blocks - 1) // q_blocks
