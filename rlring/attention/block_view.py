"""Block-level visibility of a mask, for kernels: which blocks of keys each block of queries sees, partly or fully."""

from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int32

Seen = tuple[Bool[Array, "blocks"], Bool[Array, "blocks"]]  # (seen at least partly, fully visible)


class Bounds(NamedTuple):
    """The smallest and largest position and segment of each block of tokens, from which blocks can be skipped."""

    low_position: Int32[Array, "B blocks"]  # without padding; low > high if the block is all padding
    high_position: Int32[Array, "B blocks"]
    low_segment: Int32[Array, "B blocks"]  # without padding
    high_segment: Int32[Array, "B blocks"]
    is_whole: Bool[Array, "B blocks"]  # the block has no padding

    @classmethod
    def of(cls, position: Int32[Array, "B T"], segment: Int32[Array, "B T"], size: int) -> "Bounds":
        """Returns the bounds of each block of `size` tokens; `size` divides T."""
        position, segment = (x.reshape(x.shape[0], -1, size) for x in (position, segment))
        there, far = segment >= 0, jnp.iinfo(jnp.int32).max
        return cls(
            jnp.where(there, position, far).min(2),
            jnp.where(there, position, -far).max(2),
            jnp.where(there, segment, far).min(2),
            segment.max(2),
            there.all(2),
        )


@runtime_checkable
class BlockView(Protocol):
    """Which blocks of queries see which blocks of keys. A pytree whose arrays have B or R rows.

    A block counts as seen if it is seen in any row, and as fully visible if it is in all rows.
    """

    def of_queries(self, i) -> Seen:
        """Returns which blocks of keys are seen by block i of queries."""
        ...

    def of_keys(self, j) -> Seen:
        """Returns which blocks of queries see block j of keys."""
        ...


class PairsView(NamedTuple):
    """A BlockView that stores, for every pair of blocks, whether any query sees any key and whether all see all."""

    any: Bool[Array, "B q k"]
    all: Bool[Array, "B q k"]

    def of_queries(self, i) -> Seen:
        return self._seen(i, 1)

    def of_keys(self, j) -> Seen:
        return self._seen(j, 2)

    def _seen(self, block, dimension: int) -> Seen:
        seen, whole = (lax.dynamic_index_in_dim(x, block, dimension, keepdims=False) for x in self)
        return seen.any(0), whole.all(0)


def pick(bounds: Bounds, first, size: int = 1) -> Bounds:
    """Returns the bounds of `size` blocks from block `first` on."""
    return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, first, size, 1), bounds)
