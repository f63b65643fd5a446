"""What a kernel asks of a mask: which blocks of keys a block of queries sees, in part or as a whole."""

from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int32

Seen = tuple[Bool[Array, "blocks"], Bool[Array, "blocks"]]  # in part or as a whole; as a whole


class Bounds(NamedTuple):
    """The least and greatest position and segment of each block of tokens: enough to skip a block unread."""

    low_position: Int32[Array, "B blocks"]  # over tokens that are there; low > high where there is none
    high_position: Int32[Array, "B blocks"]
    low_segment: Int32[Array, "B blocks"]  # over tokens that are there
    high_segment: Int32[Array, "B blocks"]
    is_whole: Bool[Array, "B blocks"]  # every token of the block is there

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
    """Which blocks see which. A pytree whose arrays have B or R rows; what is seen in any row is seen."""

    def of_queries(self, i) -> Seen:
        """Returns which blocks of keys this block of queries sees."""
        ...

    def of_keys(self, j) -> Seen:
        """Returns which blocks of queries see this block of keys."""
        ...


class PairsView(NamedTuple):
    """What is known of every pair of blocks."""

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
    """Returns the bounds of one block, or of so many from this one on."""
    return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, first, size, 1), bounds)
