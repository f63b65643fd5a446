"""How the hops of a ring transfer: what is packed together, what waits for what, and which of it suits which platform.

The mathematics of the ring is in ring.py, and the same with every Transport.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

# The hops of a longer ring are a loop: the program must not grow with the cluster. Not those of a shorter one: XLA on
# CPU runs collectives that stand side by side in one order on all devices, but not those of a loop and those beside it.
UNROLLED_HOPS = 8


class Transport(NamedTuple):
    """In which order a ring transfers and computes.

    Overlapping, each hop is one collective, issued before the compute of the hop. A CPU hides nothing: there the
    backward sends array by array and goes on from what has arrived, which takes a quarter of the memory.
    """

    overlaps: bool = True
    loops: bool = False  # the compiler for TPUs keeps the hops of a loop apart, but not those that stand side by side

    @classmethod
    def of(cls, platform: str) -> "Transport":
        """Returns what suits a platform: "cpu", "gpu", "tpu", or "old tpu"."""
        return cls(overlaps=platform != "cpu", loops=platform in ("tpu", "old tpu"))

    def repeat(self, step, times: int, state):
        """Returns the state after so many steps."""
        if times >= 2 and (self.loops or times > UNROLLED_HOPS):
            return lax.fori_loop(0, times, lambda _, state: step(state), state)
        for _ in range(times):
            state = step(state)
        return state

    def shift(self, tree, axis: str, step: int):
        """Returns the tree that the device `step` before this one on the ring holds.

        On CPU what has numbers goes array by array: nothing is hidden there, and each fits in where another has been,
        which four at once do not. Not in half precision: that is sent as float32, twice the bytes, where it is not
        packed.
        """
        return _shifted(tree, self, axis, step)

    def _shifted(self, tree, axis: str, step: int):
        leaves, structure = jax.tree.flatten(tree)
        alone = [not self.overlaps and jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize >= 4 for x in leaves]
        together = [x for x, is_alone in zip(leaves, alone, strict=True) if not is_alone]
        arrived = iter(unpacked(sent(packed(together), axis, step), together) if together else [])
        moved = [sent(x, axis, step) if is_alone else next(arrived) for x, is_alone in zip(leaves, alone, strict=True)]
        return jax.tree.unflatten(structure, moved)


@partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3))
def _shifted(tree, transport: Transport, axis: str, step: int):
    return transport._shifted(tree, axis, step)


@_shifted.defjvp
def _shifted_jvp(transport: Transport, axis: str, step: int, primals, tangents):
    # Array by array: bits have no derivative.
    return _shifted(*primals, transport, axis, step), jax.tree.map(partial(_sent_if_real, axis, step), *tangents)


OVERLAPPING = Transport()


class Packing(NamedTuple):
    """How what goes around a ring is held while it does."""

    load: Callable
    unload: Callable  # of what was loaded, and of something like it

    def sent(self, loaded, axis: str):
        return jax.tree.map(partial(_sent_if_real, axis, 1), loaded)


def _sent_if_real(axis: str, step: int, x: Array) -> Array:
    """Returns what the device before this one holds; of whole numbers there is no derivative to send."""
    return x if x.dtype == jax.dtypes.float0 else sent(x, axis, step)


def in_turn(results):
    """Returns the results of a hop, what arrived and what was computed, none of which is used before all are there.

    No permute waits for any compute: without this a compiler may send all keys around before it begins to compute, with
    nothing to hide the transfers behind and the keys of the whole ring in memory. The one for TPUs does.
    """
    return lax.optimization_barrier(results)


def sent(x: Array, axis: str, step: int) -> Array:
    devices = lax.axis_size(axis)
    return lax.ppermute(x, axis, [(r, (r + step) % devices) for r in range(devices)])


def packed(tree) -> Array:
    """Returns the bits of all arrays as one buffer of integers, which no backend rounds, flushes or canonicalises."""
    leaves = jax.tree.leaves(tree)
    return jnp.concatenate([word.reshape(-1) for x in leaves for word in _words(x, _unit(leaves))])


def unpacked(packed: Array, like):
    """Returns the inverse of packed() for arrays like these."""
    leaves, structure = jax.tree.flatten(like)
    arrays, start = [], 0
    for x in leaves:
        stops = range(start + x.size, start + x.nbytes // packed.itemsize + 1, x.size)
        words = [lax.slice_in_dim(packed, stop - x.size, stop).reshape(x.shape) for stop in stops]
        arrays.append(_of_words(words, x.dtype))
        start = stops[-1]
    return jax.tree.unflatten(structure, arrays)


def _unit(leaves: list[Array]) -> jnp.dtype:
    """Returns the widest integers of which all arrays are whole multiples."""
    return jnp.dtype(f"uint{8 * min(x.dtype.itemsize for x in leaves)}")


def _words(x: Array, unit: jnp.dtype) -> list[Array]:
    """Returns the bits of x, the low ones first, as arrays of its shape.

    Not as one array with one more dimension: on a TPU an innermost dimension of 2 takes the memory of one of 128.
    """
    bits = lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
    return [(bits >> (8 * i)).astype(unit) for i in range(0, x.dtype.itemsize, unit.itemsize)]


def _of_words(words: list[Array], dtype: jnp.dtype) -> Array:
    """Returns the inverse of _words."""
    whole, size = jnp.dtype(f"uint{8 * dtype.itemsize}"), dtype.itemsize // len(words)
    bits = sum((word.astype(whole) << (8 * size * i) for i, word in enumerate(words[1:], 1)), words[0].astype(whole))
    return lax.bitcast_convert_type(bits, dtype)


PACKED = Packing(packed, unpacked)  # one collective a hop
UNPACKED = Packing(lambda tree: tree, lambda tree, _: tree)  # for derivatives, which bits have none of
