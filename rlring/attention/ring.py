"""Ring attention (Liu et al. 2310.01889): queries stay, keys and values go once around the ring of devices.

A hop's transfer is issued before the hop's compute, so that the two can overlap. Keys, values, positions and segments
travel as one buffer, in one collective a hop; a device that sees nothing of what it holds skips the compute, never the
collective. In the backward the gradients of keys and values follow their keys one hop late, in float32, in the parcel
of the next keys. A CPU hides nothing: there the backward sends array by array and goes on from what has arrived, which
takes a quarter of the memory.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from rlring.attention.local import Gradients, Kernel, as_computed, named_for_remat, no_gradients, tie_to_data
from rlring.attention.mask import Mask
from rlring.attention.softmax import Partial
from rlring.mesh import AXES

# The hops of a longer ring are a loop: the program must not grow with the cluster. Not those of a shorter one: XLA on
# CPU runs collectives that stand side by side in one order on all devices, but not those of a loop and those beside it.
UNROLLED_HOPS = 8
BLOCKS_COMPARED = 16  # of each shard, to find out how far a window reaches


class _Parcel(NamedTuple):
    """What goes around the ring: some keys with all that is to be known about them."""

    k: Float[Array, "B S K H"]  # or [B, K, S, H], if the kernel wants the heads first
    v: Float[Array, "B S K H"]
    position: Int32[Array, "B S"]
    segment: Int32[Array, "B S"]

    @classmethod
    def of(cls, k: Array, v: Array, mask: Mask, kernel: Kernel) -> "_Parcel":
        return cls(_turned(k, kernel), _turned(v, kernel), mask.k_position, mask.k_segment)

    def keys(self, kernel: Kernel) -> tuple[Array, Array]:
        return _turned(self.k, kernel), _turned(self.v, kernel)

    def mask(self, mask: Mask) -> Mask:
        return replace(mask, k_position=self.position, k_segment=self.segment)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def ring_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Mask,
    axis: str,
    kernel: Kernel,
) -> Float[Array, "B T N H"]:
    """Returns attention of this device's queries over the keys of every device of the mesh axis, in q's type.

    Runs inside shard_map; q, k, v and mask are this device's shards. Exact for any layout of the tokens over the ring.
    """
    return _forward(q, k, v, mask, axis, kernel).out.astype(q.dtype)


def _attention_forward(q, k, v, mask, axis, kernel):
    q, mask = tie_to_data(q, mask)
    out, lse = named_for_remat(*_forward(q, k, v, mask, axis, kernel), kernel.kept_type(q.dtype))
    return out.astype(q.dtype), (q, k, v, mask, out, lse)


def _attention_backward(axis, kernel, residuals, d_out):
    q, k, v, mask, out, lse = residuals
    d_out, mask = tie_to_data(d_out, mask)
    dq, dk, dv = _backward(q, k, v, mask, out, lse, d_out, axis, kernel)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


def _forward(q, k, v, mask, axis, kernel) -> Partial:
    k, v = as_computed(q, k, v)

    def ring(hops: int) -> Partial:
        def hop(state, is_last=False):
            total, packed = state
            arriving = None if is_last else _sent(packed, axis, 1)
            parcel = _unpacked(packed, home)  # and sent on as it came
            hop_mask = parcel.mask(mask)

            def attend(total: Partial) -> Partial:
                return kernel.forward(q, *parcel.keys(kernel), hop_mask, total)

            # Going on inside of the branch makes every hop wait for the one before: side by side each would hold its
            # own out.
            return _in_turn((lax.cond(hop_mask.shows_any(), attend, lambda total: total, total), arriving))

        home = _Parcel.of(k, v, mask, kernel)
        arriving = _sent(_packed(home), axis, 1) if hops else None
        total = kernel.forward(q, k, v, mask)
        if hops:
            total, _ = hop(_repeat(hop, hops - 1, _in_turn((total, arriving))), is_last=True)
        return total

    return _as_far_as_seen(ring, mask, axis)


def _backward(q, k, v, mask, out, lse, d_out, axis, kernel) -> Gradients:
    k, v = as_computed(q, k, v)

    def ring(hops: int) -> Gradients:
        # A whole ring turns the other way round: a compiler that sees both passes would else keep the keys of all
        # devices since the forward. Where few hops are enough they are those of the forward.
        step = -1 if hops == lax.axis_size(axis) - 1 else 1
        shift = partial(_shift, axis=axis, step=step)

        def hop(state, is_last=False):
            dq, behind, parcel = state  # behind: what the hops before this one found for the keys that were here then
            # In one collective: two at a time are more than the compiler for TPUs hides behind one hop.
            arriving, behind = shift((None if is_last else parcel, behind))
            before = Gradients(dq, *behind)
            after, arriving = lax.platform_dependent(
                before, parcel, arriving, cpu=differentiate_in_place, default=differentiate
            )
            return after.dq, (after.dk, after.dv), arriving

        def differentiate(before: Gradients, parcel: _Parcel, arriving):
            hop_mask = parcel.mask(mask)

            def add(dq) -> Gradients:
                here = kernel.backward(q, *parcel.keys(kernel), hop_mask, out, lse, d_out)
                return _travelling(here, kernel)._replace(dq=dq + here.dq)

            here = lax.cond(hop_mask.shows_any(), add, lambda dq: no_gradients(q, parcel.k)._replace(dq=dq), before.dq)
            here, before, arriving = _in_turn((here, before, arriving))
            return Gradients(here.dq, before.dk + here.dk, before.dv + here.dv), arriving

        def differentiate_in_place(before: Gradients, parcel: _Parcel, arriving):
            """The same, waiting for what is behind: no price where nothing is sent while it computes."""
            hop_mask = parcel.mask(mask)

            def add(before: Gradients) -> Gradients:
                before = _travelling(before, kernel)
                return _travelling(kernel.backward(q, *parcel.keys(kernel), hop_mask, out, lse, d_out, before), kernel)

            return lax.cond(hop_mask.shows_any(), add, lambda same: same, before), arriving

        home = _Parcel.of(k, v, mask, kernel)
        arriving = shift(home) if hops else None
        here = kernel.backward(q, k, v, mask, out, lse, d_out)
        if hops == 0:
            return here
        # What is found at home travels as well: kept, it would be there beside what arrives in the end.
        here, arriving = _in_turn((_travelling(here, kernel), arriving))
        state = _repeat(hop, hops - 1, (here.dq, (here.dk, here.dv), arriving))
        dq, found, _ = hop(state, is_last=True)
        return _travelling(Gradients(dq, *_shift(found, axis, step=-hops * step)), kernel)

    return _as_far_as_seen(ring, mask, axis)


def _as_far_as_seen(ring: Callable, mask: Mask, axis: str):
    """Returns ring(hops): only as many hops as a window needs while the tokens stand in their order.

    Whether they do is known when it runs. If any device of the mesh sees farther, all of them go once around.
    """
    devices = lax.axis_size(axis)
    if not mask.is_causal or mask.window is None:
        return ring(devices - 1)
    near = -(-(mask.window - 1) // mask.k_position.shape[1])
    if near >= devices - 1:
        return ring(devices - 1)
    # The same on every device, so that all of them enter the same collectives.
    is_seen_beyond = lax.pmax(_sees_beyond(mask, near, axis), AXES)
    return lax.cond(is_seen_beyond, partial(ring, devices - 1), partial(ring, near))


def _sees_beyond(mask: Mask, hops: int, axis: str) -> Bool[Array, ""]:
    """Returns whether any query of this device may see any key from more than so many devices before it."""

    def size(length):
        return length // next(n for n in range(BLOCKS_COMPARED, 0, -1) if length % n == 0)

    devices, rows = lax.axis_size(axis), mask.rows
    k_bounds = lax.all_gather(mask.k_bounds(size(mask.k_position.shape[1])), axis)
    beyond = (lax.axis_index(axis) - jnp.arange(hops + 1, devices)) % devices
    k_bounds = jax.tree.map(lambda x: jnp.moveaxis(x[beyond], 1, 0).reshape(rows, 1, -1), k_bounds)
    q_bounds = jax.tree.map(lambda x: x[:, :, None], mask.q_bounds(size(mask.q_position.shape[1])))
    return mask.may_see(q_bounds, k_bounds).any()


ring_attention.defvjp(_attention_forward, _attention_backward)


def _turned(x: Array, kernel: Kernel) -> Array:
    """Returns keys as they go around, or as they are in between if they came so.

    Turned round at each hop they are more than the compiler for TPUs hides transfers behind (3b, 64 chips of a v4).
    """
    return jnp.swapaxes(x, 1, 2) if kernel.heads_first else x


def _travelling(gradients: Gradients, kernel: Kernel) -> Gradients:
    """Returns gradients with those of the keys turned as the keys are."""
    return Gradients(gradients.dq, _turned(gradients.dk, kernel), _turned(gradients.dv, kernel))


def _in_turn(results):
    """Returns the results of a hop, what arrived and what was computed, none of which is used before all are there.

    No permute waits for any compute: without this a compiler may send all keys around before it begins to compute, with
    nothing to hide the transfers behind and the keys of the whole ring in memory. The one for TPUs does.
    """
    return lax.optimization_barrier(results)


def _repeat(step, times: int, state):
    def loop(state):
        return lax.fori_loop(0, times, lambda _, state: step(state), state)

    def unrolled(state):
        for _ in range(times):
            state = step(state)
        return state

    if times < 2:
        return unrolled(state)
    if times > UNROLLED_HOPS:
        return loop(state)
    # The compiler for TPUs keeps the hops of a loop apart, but not those that stand side by side.
    return lax.platform_dependent(state, tpu=loop, default=unrolled)


def _shift(tree, axis: str, step: int):
    """Returns the tree that the device `step` before this one on the ring holds, in one collective.

    On CPU what has numbers goes array by array: nothing is hidden there, and each fits in where another has been, which
    four at once do not. Not in half precision: that is sent as float32, twice the bytes, where it is not packed.
    """

    def at_once(tree):
        return _unpacked(_sent(_packed(tree), axis, step), tree) if jax.tree.leaves(tree) else tree

    def one_by_one(tree):
        leaves, structure = jax.tree.flatten(tree)
        is_large = [jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize >= 4 for x in leaves]
        small = iter(at_once([x for x, large in zip(leaves, is_large, strict=True) if not large]))
        sent = [_sent(x, axis, step) if large else next(small) for x, large in zip(leaves, is_large, strict=True)]
        return jax.tree.unflatten(structure, sent)

    return lax.platform_dependent(tree, cpu=one_by_one, default=at_once)


def _sent(x: Array, axis: str, step: int) -> Array:
    devices = lax.axis_size(axis)
    return lax.ppermute(x, axis, [(r, (r + step) % devices) for r in range(devices)])


def _packed(tree) -> Array:
    """Returns the bits of all arrays as one buffer of integers, which no backend rounds, flushes or canonicalises."""
    leaves = jax.tree.leaves(tree)
    return jnp.concatenate([word.reshape(-1) for x in leaves for word in _words(x, _unit(leaves))])


def _unpacked(packed: Array, like):
    """Returns the inverse of _packed for arrays like these."""
    leaves, structure = jax.tree.flatten(like)
    unpacked, start = [], 0
    for x in leaves:
        stops = range(start + x.size, start + x.nbytes // packed.itemsize + 1, x.size)
        words = [lax.slice_in_dim(packed, stop - x.size, stop).reshape(x.shape) for stop in stops]
        unpacked.append(_of_words(words, x.dtype))
        start = stops[-1]
    return jax.tree.unflatten(structure, unpacked)


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
