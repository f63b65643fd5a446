"""How a ring sends its data in each step ("hop"): packing, order of transfer and compute, and platform defaults.

The mathematics of the ring is in ring.py and does not depend on the Transport.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

# The hops of a longer ring are a loop, so that the program does not grow with the cluster. Those of a shorter ring are
# unrolled: XLA on CPU runs independent collectives in one order on all devices, but not if some of them are in a loop.
UNROLLED_HOPS = 8


class Transport(NamedTuple):
    """The order in which a ring transfers and computes.

    If `overlaps`, each hop is one collective, issued before the compute of the hop. A CPU cannot overlap them: there
    the backward sends array by array, and continues from the gradients that have arrived, which takes a quarter of the
    memory.
    """

    overlaps: bool = True
    loops: bool = False  # always a loop: the TPU compiler would mix the hops of an unrolled ring

    @classmethod
    def of(cls, platform: str) -> "Transport":
        """Returns the default for a platform: "cpu", "gpu", "tpu", or "old tpu"."""
        return cls(overlaps=platform != "cpu", loops=platform in ("tpu", "old tpu"))

    def repeat(self, step, times: int, state):
        """Returns the state after `times` calls of step(state)."""
        if times >= 2 and (self.loops or times > UNROLLED_HOPS):
            return lax.fori_loop(0, times, lambda _, state: step(state), state)
        for _ in range(times):
            state = step(state)
        return state

    def shift(self, tree, axis: str, step: int):
        """Returns the tree of the device that is `step` places before this one on the ring.

        Without overlap (on CPU), floating-point arrays are sent one by one, so that each can reuse the memory of an
        earlier one. Half precision is still packed, because XLA for CPUs would send it as float32.
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
    # The tangents are sent array by array, because packed bits have no derivative.
    return _shifted(*primals, transport, axis, step), jax.tree.map(partial(_sent_if_real, axis, step), *tangents)


OVERLAPPING = Transport()


class Packing(NamedTuple):
    """The form in which data is sent around a ring."""

    load: Callable  # tree -> packed form
    unload: Callable  # (packed form, a tree of the same structure and shapes) -> tree

    def sent(self, loaded, axis: str):
        return jax.tree.map(partial(_sent_if_real, axis, 1), loaded)


def _sent_if_real(axis: str, step: int, x: Array) -> Array:
    """Returns x of the device `step` places before this one; tangents of integers (float0) are returned unchanged."""
    return x if x.dtype == jax.dtypes.float0 else sent(x, axis, step)


def in_turn(results):
    """Returns the results of a hop (arrived data and computed attention) behind a barrier, so that none of them is used
    before all are complete.

    Permutes do not depend on compute. Without the barrier a compiler may send all keys around before it computes
    anything: then nothing hides the transfers, and the keys of the whole ring are in memory. The TPU compiler does so.
    """
    return lax.optimization_barrier(results)


def sent(x: Array, axis: str, step: int) -> Array:
    devices = lax.axis_size(axis)
    return lax.ppermute(x, axis, [(r, (r + step) % devices) for r in range(devices)])


def packed(tree) -> Array:
    """Returns the bits of all arrays as one buffer of integers, because no backend rounds, flushes or canonicalises
    integers."""
    leaves = jax.tree.leaves(tree)
    return jnp.concatenate([word.reshape(-1) for x in leaves for word in _words(x, _unit(leaves))])


def unpacked(packed: Array, like):
    """Returns the tree that was packed; `like` is a tree with the same structure, shapes and types."""
    leaves, structure = jax.tree.flatten(like)
    arrays, start = [], 0
    for x in leaves:
        stops = range(start + x.size, start + x.nbytes // packed.itemsize + 1, x.size)
        words = [lax.slice_in_dim(packed, stop - x.size, stop).reshape(x.shape) for stop in stops]
        arrays.append(_of_words(words, x.dtype))
        start = stops[-1]
    return jax.tree.unflatten(structure, arrays)


def _unit(leaves: list[Array]) -> jnp.dtype:
    """Returns the unsigned integer type of the size of the smallest item type of all arrays."""
    return jnp.dtype(f"uint{8 * min(x.dtype.itemsize for x in leaves)}")


def _words(x: Array, unit: jnp.dtype) -> list[Array]:
    """Returns the bits of x as a list of arrays of its shape, low bits first.

    An additional dimension would waste memory: on a TPU an innermost dimension of 2 takes the memory of one of 128.
    """
    bits = lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
    return [(bits >> (8 * i)).astype(unit) for i in range(0, x.dtype.itemsize, unit.itemsize)]


def _of_words(words: list[Array], dtype: jnp.dtype) -> Array:
    """Returns the array whose bits are `words`: the inverse of _words()."""
    whole, size = jnp.dtype(f"uint{8 * dtype.itemsize}"), dtype.itemsize // len(words)
    bits = sum((word.astype(whole) << (8 * size * i) for i, word in enumerate(words[1:], 1)), words[0].astype(whole))
    return lax.bitcast_convert_type(bits, dtype)


PACKED = Packing(packed, unpacked)  # one collective per hop
UNPACKED = Packing(lambda tree: tree, lambda tree, _: tree)  # for derivatives, because packed bits have none
