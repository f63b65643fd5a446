"""Deterministic attention: blocks are visited in an order that does not depend on the size of the ring, so that the
result has the same bits on every ring.

A block of queries visits blocks of keys in one cyclic order, from its own block downwards: b, b - 1, ..., 0, last, ...,
b + 1. In this order keys arrive on a ring: first the device's own, then those of the devices before it, cyclically. So
a device's own keys are visited in two parts, at the beginning and at the end, and nothing is computed twice. A block of
keys meets blocks of queries in the mirrored order, from its own block upwards, and its gradients are accumulated in
that order. In the backward pass the ring may turn in the other direction; then both orders are reversed.

The blocks themselves do not depend on the ring, and softmax and gradients are accumulated block by block, in place.
Blocks that are not seen are skipped, which does not change a sum.
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

# "begin": own keys from the block's own place on; "away": keys of other devices; "end": the rest of the own keys.
Part = Literal["begin", "away", "end"]


class FixedOrder(NamedTuple):
    """A part of the cyclic order in which blocks of queries and keys meet. Hashable."""

    part: Part
    rises: bool = False  # reversed: queries visit keys from their own block upwards

    def keys(self, seen: Seen, i, q_blocks: int) -> "FixedSchedule":
        """Returns the schedule of the blocks of keys that block i of queries visits."""
        blocks = seen[0].shape[0]
        is_visited = self._is_visited(_own(i, q_blocks, blocks), jnp.arange(blocks))
        return FixedSchedule.of(seen, is_visited, rises=self.rises)

    def queries(self, seen: Seen, j, k_blocks: int) -> "FixedSchedule":
        """Returns the schedule of the blocks of queries that visit block j of keys."""
        blocks = seen[0].shape[0]
        is_visited = self._is_visited(_own(jnp.arange(blocks), blocks, k_blocks), j)
        return FixedSchedule.of(seen, is_visited, rises=not self.rises)

    def block_of_keys(self, n, k_blocks: int):
        """Returns the index of the block of keys that is visited n-th."""
        return n if self.rises else k_blocks - 1 - n

    def _is_visited(self, own, j) -> Bool[Array, "blocks"]:
        if self.part == "away":
            return jnp.broadcast_to(True, jnp.broadcast_shapes(jnp.shape(own), jnp.shape(j)))
        begins = (j >= own) if self.rises else (j <= own)
        return begins if self.part == "begin" else ~begins


class FixedSchedule(NamedTuple):
    """The blocks of the other side that are seen, in the fixed order. (BlockSchedule sorts them by visibility.)"""

    order: Int32[Array, "blocks"]
    seen: Int32[Array, ""]  # number of blocks to visit
    is_whole: Bool[Array, "blocks"]  # by block: fully visible

    @classmethod
    def of(cls, seen: Seen, is_visited: Bool[Array, "blocks"], *, rises: bool) -> "FixedSchedule":
        is_seen, is_whole = seen
        is_seen &= is_visited
        blocks = is_seen.shape[0]
        place = jnp.arange(blocks) if rises else jnp.arange(blocks)[::-1]
        return cls(jnp.argsort(jnp.where(is_seen, place, blocks)), is_seen.sum(), is_whole)

    def walk(self, step: Callable, state):
        """Returns the state after step(block, state, is_masked=..., shields=...) for every block that is seen."""

        def visit(start, stop, state, **how):
            return lax.fori_loop(start, stop, lambda n, state: step(self.order[n], state, **how), state)

        def step_at(n, state):
            # Two loops of one step or none instead of lax.cond, which would copy the state. The block is computed from
            # the loop counter: XLA would move loop-invariant code out of the loop, and so execute it in any case.
            after_whole = n + self.is_whole[self.order[n]].astype(n.dtype)
            state = visit(n, after_whole, state)
            # Always shielded: the code must not depend on which NaN or infinity happens to be on one device.
            return visit(after_whole, n + 1, state, is_masked=True, shields=True)

        return lax.fori_loop(0, self.seen, step_at, state)


class OrderedKernel(Kernel, Protocol):
    """A kernel that is a named tuple with these fields."""

    blocks: Blocks
    order: FixedOrder | None

    def _replace(self, *, order: FixedOrder) -> "OrderedKernel": ...


class FixedOrderKernel(NamedTuple):
    """A kernel that visits its blocks in the fixed order."""

    kernel: OrderedKernel
    heads_first = False

    def part(self, part: Part, *, rises: bool = False) -> Kernel:
        """Returns the kernel for one part of the order."""
        return self.kernel._replace(order=FixedOrder(part, rises))

    def residual_dtype(self, dtype: jnp.dtype) -> jnp.dtype:
        return self.kernel.residual_dtype(dtype)

    def by_blocks(self, inputs: BackwardInputs) -> BackwardInputs:
        """Returns the inputs with delta computed block by block, because the rounding of a product over all queries
        would depend on their number."""
        size = self.kernel.blocks.q

        def add(n, delta):
            # The barriers keep XLA from fusing this with other code, which could change the rounding.
            of_block = lax.optimization_barrier([take(x, n, size, 1) for x in (inputs.out, inputs.d_out)])
            return put(delta, lax.optimization_barrier(delta_of(*of_block)), n, 2)

        none = zeros(inputs.total.shape, inputs.delta.dtype, inputs.d_out)
        return inputs.with_delta(lax.fori_loop(0, none.shape[2] // size, add, none))

    def with_sinks(self, out: Float[Array, "B T N V"], lse: Float[Array, "B N T"], sinks: Float[Array, "N"] | None):
        """Computes kernel.with_sinks() block by block, because its gradient has a sum like that of delta."""
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
    """The kernels for a device's own keys, for those of other devices, and at the end for its own keys again."""

    begin: Kernel
    away: Kernel
    end: Kernel | None

    @classmethod
    def of(cls, kernel: Kernel, *, rises: bool = False) -> "Parts":
        if not isinstance(kernel, FixedOrderKernel):
            return cls(kernel, kernel, None)
        return cls(*(kernel.part(part, rises=rises) for part in get_args(Part)))


def turns_back(mask: Mask) -> bool:
    """Returns whether the ring turns in the other direction in the backward pass, for a ring of any size. It does not
    if a window may make most ring steps unnecessary."""
    return not (mask.is_causal and mask.reach[0] is not None)


def _own(i, q_blocks: int, k_blocks: int):
    """Returns the block of keys at the place where block i of queries ends; it is the same on a ring of any size."""
    return ((i + 1) * k_blocks - 1) // q_blocks
