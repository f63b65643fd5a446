"""Ring attention (Liu et al. 2310.01889): queries stay, keys and values go once around the ring of devices.

A hop's transfer is issued before the hop's compute, so that the two can overlap. Keys, values, positions and segments
travel as one buffer, in one collective a hop; a device that sees nothing of what it holds skips the compute, never the
collective. In the backward the gradients of keys and values follow their keys one hop late, in float32, in the buffer
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

from rlring.attention.fixed_order import FixedOrderKernel, Parts, turns_back
from rlring.attention.kernel import BackwardInputs, Gradients, Kernel, local_attention, no_gradients
from rlring.attention.mask import Mask
from rlring.attention.ring_transport import OVERLAPPING, PACKED, UNPACKED, Packing, Transport, in_turn
from rlring.attention.score_mod import ScoreMod
from rlring.attention.softmax import PartialAttention

BLOCKS_COMPARED = 16  # of each shard, to find out how far a window reaches


class _KVShard(NamedTuple):
    """What goes around the ring: the keys and values of a device, with what the mask knows of them."""

    k: Float[Array, "B S K H"]  # or [B, K, S, H], if the kernel wants the heads first
    v: Float[Array, "B S K V"]
    position: Int32[Array, "B S"]
    segment: Int32[Array, "B S"]
    place: Int32[Array, "B S"] | None

    @classmethod
    def of(cls, k: Array, v: Array, mask: Mask, kernel: Kernel) -> "_KVShard":
        return cls(_turned(k, kernel), _turned(v, kernel), mask.k_position, mask.k_segment, mask.k_place)

    def keys(self, kernel: Kernel) -> tuple[Array, Array]:
        return _turned(self.k, kernel), _turned(self.v, kernel)

    def mask(self, mask: Mask) -> Mask:
        return replace(mask, k_position=self.position, k_segment=self.segment, k_place=self.place)


def ring_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    mask: Mask,
    axis: str,
    kernel: Kernel,
    transport: Transport = OVERLAPPING,
) -> Float[Array, "B T N V"]:
    """Returns attention of this device's queries over the keys of every device of the mesh axis, in q's type.

    Runs inside shard_map; q, k, v and mask are this device's shards. Exact for any layout of the tokens over the ring.
    """
    return local_attention(q, k, v, mask, RingKernel(axis, kernel, transport))


class RingKernel(NamedTuple):
    """A kernel over the keys of all devices of the mesh axis, which go around."""

    axis: str
    kernel: Kernel
    transport: Transport = OVERLAPPING
    heads_first = False

    def residual_dtype(self, dtype: jnp.dtype) -> jnp.dtype:
        return self.kernel.residual_dtype(dtype)

    @property
    def is_in_order(self) -> bool:
        """Whether the bits are the same on a ring of any size."""
        return isinstance(self.kernel, FixedOrderKernel)

    def parts(self, *, rises: bool = False) -> Parts:
        """Returns the kernels of the keys here, of those that arrive, and at last of those here again."""
        return Parts.of(self.kernel, rises=rises)

    def forward(self, q, k, v, mask: Mask, mod: ScoreMod, before: PartialAttention | None = None) -> PartialAttention:
        return _forward(self, q, k, v, mask, mod, before)

    def backward(
        self, q, k, v, mask: Mask, mod: ScoreMod, inputs: BackwardInputs, before: Gradients | None = None
    ) -> Gradients:
        if isinstance(self.kernel, FixedOrderKernel):
            inputs = self.kernel.by_blocks(inputs)
        return _as_far_as_seen(_Backward(self, q, k, v, mask, mod, inputs).around, mask, self.axis)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _forward(here: RingKernel, *arrays) -> PartialAttention:
    return _forward_packed_as(PACKED, here, *arrays)


@_forward.defjvp
def _forward_jvp(here: RingKernel, primals, tangents):
    return jax.jvp(partial(_forward_packed_as, UNPACKED, here), primals, tangents)


def _forward_packed_as(packing: Packing, here: RingKernel, q, k, v, mask, mod, before) -> PartialAttention:
    return _as_far_as_seen(_Forward(here, packing, q, k, v, mask, mod, before).around, mask, here.axis)


class _Forward(NamedTuple):
    """A pass around the ring; the arrays are those of this device."""

    ring: RingKernel
    packing: Packing
    q: Float[Array, "B T N H"]
    k: Float[Array, "B S K H"]
    v: Float[Array, "B S K V"]
    mask: Mask
    mod: ScoreMod
    before: PartialAttention | None

    def around(self, hops: int) -> PartialAttention:
        """Returns attention over the keys of this device and of so many before it."""
        arriving = self.packing.sent(self.packing.load(self.home), self.ring.axis) if hops else None
        at_home, parts = (self.q, self.k, self.v, self.mask, self.mod), self.ring.parts()
        total = parts.begin.forward(*at_home, self.before)
        if hops:
            state = self.ring.transport.repeat(self.hop, hops - 1, in_turn((total, arriving)))
            total, _ = self.hop(state, is_last=True)
        return total if parts.end is None else parts.end.forward(*at_home, total)

    def hop(self, state, is_last: bool = False):
        """Returns attention over the keys that have arrived as well, and what arrives next."""
        (total, loaded), kernel = state, self.ring.parts().away
        arriving = None if is_last else self.packing.sent(loaded, self.ring.axis)
        shard = self.packing.unload(loaded, self.home)  # and sent on as it came
        mask = shard.mask(self.mask)

        def attend(total: PartialAttention) -> PartialAttention:
            return kernel.forward(self.q, *shard.keys(kernel), mask, self.mod, total)

        # Going on inside of the branch makes every hop wait for the one before: side by side each would hold its own
        # out.
        return in_turn((lax.cond(mask.shows_any(), attend, lambda total: total, total), arriving))

    @property
    def home(self) -> _KVShard:
        return _KVShard.of(self.k, self.v, self.mask, self.ring.kernel)


class _Backward(NamedTuple):
    """A pass around the ring with the gradients of keys and values; the arrays are those of this device."""

    ring: RingKernel
    q: Float[Array, "B T N H"]
    k: Float[Array, "B S K H"]
    v: Float[Array, "B S K V"]
    mask: Mask
    mod: ScoreMod
    inputs: BackwardInputs

    def around(self, hops: int) -> Gradients:
        """Returns the gradients of attention over the keys of this device and of so many before it."""
        _, kernel, transport = self.ring
        step, parts = (-1 if self.turns_back(hops) else 1), self.parts
        shift = partial(transport.shift, axis=self.ring.axis)
        home = _KVShard.of(self.k, self.v, self.mask, kernel)
        arriving = shift(home, step=step) if hops else None
        at_home = self.q, self.k, self.v, self.mask, self.mod, self.inputs
        here = parts.begin.backward(*at_home)
        if hops:
            # What is found at home travels as well: kept, it would be there beside what arrives in the end.
            here, arriving = in_turn((_travelling(here, kernel), arriving))
            hop = partial(self.hop, partial(shift, step=step))
            state = transport.repeat(hop, hops - 1, (_at_home(here), (here.dk, here.dv), arriving))
            rest, found, _ = hop(state, is_last=True)
            dk, dv = shift(found, step=-hops * step)
            here = _travelling(rest._replace(dk=dk, dv=dv), kernel)
        return here if parts.end is None else parts.end.backward(*at_home, here)

    def turns_back(self, hops: int) -> bool:
        """Returns whether it turns the other way round than the forward.

        A whole ring does: a compiler that sees both passes would else keep the keys of all devices since the forward.
        Where few hops are enough they are those of the forward.
        """
        if self.ring.is_in_order:  # on a ring of any size alike
            return turns_back(self.mask)
        return hops == lax.axis_size(self.ring.axis) - 1

    @property
    def parts(self) -> Parts:
        return self.ring.parts(rises=turns_back(self.mask))

    def hop(self, shift: Callable, state, is_last: bool = False):
        at_home, behind, shard = state  # behind: what the hops before this one found for the keys that were here then
        waits = self.ring.is_in_order or not self.ring.transport.overlaps
        onwards = None if is_last else shard
        if waits and self.ring.transport.overlaps:  # for what is behind, and then not for the keys of the next hop
            behind, onwards = in_turn((shift(behind), onwards))
            arriving = shift(onwards)
        else:
            # In one collective: two at a time are more than the compiler for TPUs hides behind one hop.
            arriving, behind = shift((onwards, behind))
        before = at_home._replace(dk=behind[0], dv=behind[1])
        differentiate = self.differentiate_in_place if waits else self.differentiate_beside
        after, arriving = differentiate(before, shard, arriving)
        return _at_home(after), (after.dk, after.dv), arriving

    def differentiate_beside(self, before: Gradients, shard: _KVShard, arriving):
        """Returns the gradients with those of the shard's keys, which need not wait for what is behind."""
        mask, kernel = shard.mask(self.mask), self.ring.kernel

        def add(at_home: Gradients) -> Gradients:
            here = kernel.backward(self.q, *shard.keys(kernel), mask, self.mod, self.inputs)
            more = jax.tree.map(jnp.add, at_home, _at_home(here))
            return _travelling(here, kernel)._replace(dq=more.dq, mod=more.mod)

        def skip(at_home: Gradients) -> Gradients:
            return no_gradients(self.q, shard.k, shard.v)._replace(dq=at_home.dq, mod=at_home.mod)

        here = lax.cond(mask.shows_any(), add, skip, _at_home(before))
        here, before, arriving = in_turn((here, before, arriving))
        return here._replace(dk=before.dk + here.dk, dv=before.dv + here.dv), arriving

    def differentiate_in_place(self, before: Gradients, shard: _KVShard, arriving):
        """The same, waiting for what is behind: no price where nothing is sent while it computes.

        The fixed order waits everywhere: each block adds to what those before it found.
        """
        mask, kernel = shard.mask(self.mask), self.parts.away

        def add(before: Gradients) -> Gradients:
            before = _travelling(before, kernel)
            found = kernel.backward(self.q, *shard.keys(kernel), mask, self.mod, self.inputs, before)
            return _travelling(found, kernel)

        results = lax.cond(mask.shows_any(), add, lambda same: same, before), arriving
        return in_turn(results) if self.ring.transport.overlaps else results


def _as_far_as_seen(ring: Callable, mask: Mask, axis: str):
    """Returns ring(hops): only as many hops as a window needs while the tokens stand in their order.

    Whether they do is known when it runs. If any device of the mesh sees farther, all of them go once around.
    """
    devices = lax.axis_size(axis)
    reach, _ = mask.reach
    if not mask.is_causal or reach is None:
        return ring(devices - 1)
    near = -(-(reach - 1) // mask.k_position.shape[1])
    if near >= devices - 1:
        return ring(devices - 1)
    # The same on every device, so that all of them enter the same collectives.
    is_seen_beyond = lax.pmax(_sees_beyond(mask, near, axis), jax.sharding.get_abstract_mesh().manual_axes)
    return lax.cond(is_seen_beyond, partial(ring, devices - 1), partial(ring, near))


def _sees_beyond(mask: Mask, hops: int, axis: str) -> Bool[Array, ""]:
    """Returns whether any query of this device may see any key from more than so many devices before it."""

    def size(length):
        return length // next(n for n in range(BLOCKS_COMPARED, 0, -1) if length % n == 0)

    devices, rows = lax.axis_size(axis), mask.rows
    k_bounds = lax.all_gather(mask.k_bounds(size(mask.k_position.shape[1])), axis)
    beyond = (lax.axis_index(axis) - jnp.arange(hops + 1, devices, dtype=jnp.int32)) % devices
    k_bounds = jax.tree.map(lambda x: jnp.moveaxis(x[beyond], 1, 0).reshape(rows, 1, -1), k_bounds)
    q_bounds = jax.tree.map(lambda x: x[:, :, None], mask.q_bounds(size(mask.q_position.shape[1])))
    return mask.maybe_visible(q_bounds, k_bounds).any()


def _turned(x: Array, kernel: Kernel) -> Array:
    """Returns keys as they go around, or as they are in between if they came so.

    Turned round at each hop they are more than the compiler for TPUs hides transfers behind (3b, 64 chips of a v4).
    """
    return jnp.swapaxes(x, 1, 2) if kernel.heads_first else x


def _at_home(gradients: Gradients) -> Gradients:
    """Returns those gradients that do not travel."""
    return gradients._replace(dk=None, dv=None)


def _travelling(gradients: Gradients, kernel: Kernel) -> Gradients:
    """Returns gradients with those of the keys turned as the keys are."""
    return gradients._replace(dk=_turned(gradients.dk, kernel), dv=_turned(gradients.dv, kernel))
