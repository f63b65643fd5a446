"""Ring attention (Liu et al. 2310.01889): queries stay, keys and values go once around the ring of devices.

In each step of the ring, a "hop", every device sends its present keys and values to the next device and computes
attention over them. The transfer is issued before the computation, so that the two can overlap. Keys, values, positions
and segments are sent as one buffer, in one collective per hop. A device whose queries see none of the present keys
skips the computation, but never the collective. In the backward, the gradients of keys and values follow their keys one
hop later, in float32, in the same buffer as the next keys. A CPU cannot overlap transfers: there the backward sends
array by array, and continues from the gradients that have arrived, which takes a quarter of the memory.
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

BLOCKS_COMPARED = 16  # blocks per shard whose bounds are compared to find how far a window reaches


class _KVShard(NamedTuple):
    """The data that is sent around the ring: keys and values of a device, with their positions and segments."""

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

    Runs inside shard_map; q, k, v and mask are this device's shards. Exact for any order of the tokens on the ring.
    """
    return local_attention(q, k, v, mask, RingKernel(axis, kernel, transport))


class RingKernel(NamedTuple):
    """A kernel over the keys of all devices of the mesh axis, which are sent around the ring."""

    axis: str
    kernel: Kernel
    transport: Transport = OVERLAPPING
    heads_first = False

    def residual_dtype(self, dtype: jnp.dtype) -> jnp.dtype:
        return self.kernel.residual_dtype(dtype)

    @property
    def is_in_order(self) -> bool:
        """Whether the result has the same bits on a ring of any size."""
        return isinstance(self.kernel, FixedOrderKernel)

    def parts(self, *, rises: bool = False) -> Parts:
        """Returns the kernels for the own keys, for arriving keys, and at the end for the own keys again."""
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
    """The forward pass around the ring; the arrays are this device's shards."""

    ring: RingKernel
    packing: Packing
    q: Float[Array, "B T N H"]
    k: Float[Array, "B S K H"]
    v: Float[Array, "B S K V"]
    mask: Mask
    mod: ScoreMod
    before: PartialAttention | None

    def around(self, hops: int) -> PartialAttention:
        """Returns attention over the keys of this device and of the `hops` devices before it."""
        arriving = self.packing.sent(self.packing.load(self.home), self.ring.axis) if hops else None
        at_home, parts = (self.q, self.k, self.v, self.mask, self.mod), self.ring.parts()
        total = parts.begin.forward(*at_home, self.before)
        if hops:
            state = self.ring.transport.repeat(self.hop, hops - 1, in_turn((total, arriving)))
            total, _ = self.hop(state, is_last=True)
        return total if parts.end is None else parts.end.forward(*at_home, total)

    def hop(self, state, is_last: bool = False):
        """Returns the state after a hop: attention that includes the keys that have arrived, and the next keys."""
        (total, loaded), kernel = state, self.ring.parts().away
        arriving = None if is_last else self.packing.sent(loaded, self.ring.axis)
        shard = self.packing.unload(loaded, self.home)  # the packed form is what is sent on
        mask = shard.mask(self.mask)

        def attend(total: PartialAttention) -> PartialAttention:
            return kernel.forward(self.q, *shard.keys(kernel), mask, self.mod, total)

        # Merging inside of the branch makes every hop wait for the previous one. If hops ran in parallel, each would
        # hold an output.
        return in_turn((lax.cond(mask.shows_any(), attend, lambda total: total, total), arriving))

    @property
    def home(self) -> _KVShard:
        return _KVShard.of(self.k, self.v, self.mask, self.ring.kernel)


class _Backward(NamedTuple):
    """The backward pass around the ring, which also sends gradients; the arrays are this device's shards."""

    ring: RingKernel
    q: Float[Array, "B T N H"]
    k: Float[Array, "B S K H"]
    v: Float[Array, "B S K V"]
    mask: Mask
    mod: ScoreMod
    inputs: BackwardInputs

    def around(self, hops: int) -> Gradients:
        """Returns the gradients of attention over the keys of this device and of the `hops` devices before it."""
        _, kernel, transport = self.ring
        step, parts = (-1 if self.turns_back(hops) else 1), self.parts
        shift = partial(transport.shift, axis=self.ring.axis)
        home = _KVShard.of(self.k, self.v, self.mask, kernel)
        arriving = shift(home, step=step) if hops else None
        at_home = self.q, self.k, self.v, self.mask, self.mod, self.inputs
        here = parts.begin.backward(*at_home)
        if hops:
            # The gradients of the own keys are sent around too. If kept, they would need memory beside those arriving.
            here, arriving = in_turn((_travelling(here, kernel), arriving))
            hop = partial(self.hop, partial(shift, step=step))
            state = transport.repeat(hop, hops - 1, (_at_home(here), (here.dk, here.dv), arriving))
            rest, found, _ = hop(state, is_last=True)
            dk, dv = shift(found, step=-hops * step)
            here = _travelling(rest._replace(dk=dk, dv=dv), kernel)
        return here if parts.end is None else parts.end.backward(*at_home, here)

    def turns_back(self, hops: int) -> bool:
        """Returns whether the ring turns in the other direction than in the forward.

        A whole ring does. In the same direction, a compiler that sees both passes would keep the keys of all devices
        from the forward. If a window needs only a few hops, they are in the direction of the forward.
        """
        if self.ring.is_in_order:  # must not depend on the size of the ring
            return turns_back(self.mask)
        return hops == lax.axis_size(self.ring.axis) - 1

    @property
    def parts(self) -> Parts:
        return self.ring.parts(rises=turns_back(self.mask))

    def hop(self, shift: Callable, state, is_last: bool = False):
        at_home, behind, shard = state  # behind: gradients from earlier hops, of the keys of the previous hop
        waits = self.ring.is_in_order or not self.ring.transport.overlaps
        onwards = None if is_last else shard
        if waits and self.ring.transport.overlaps:  # the gradients are sent first; the next keys overlap with compute
            behind, onwards = in_turn((shift(behind), onwards))
            arriving = shift(onwards)
        else:
            # In one collective, because the TPU compiler does not hide two of them behind the compute of one hop.
            arriving, behind = shift((onwards, behind))
        before = at_home._replace(dk=behind[0], dv=behind[1])
        differentiate = self.differentiate_in_place if waits else self.differentiate_beside
        after, arriving = differentiate(before, shard, arriving)
        return _at_home(after), (after.dk, after.dv), arriving

    def differentiate_beside(self, before: Gradients, shard: _KVShard, arriving):
        """Returns the gradients with those of the shard's keys added, computed before the gradients `behind` arrive."""
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
        """Like differentiate_beside(), but waits for the gradients `behind` and adds to them.

        Waiting costs nothing if transfers do not overlap. The fixed order always waits, because each block adds to the
        sum of the blocks before it.
        """
        mask, kernel = shard.mask(self.mask), self.parts.away

        def add(before: Gradients) -> Gradients:
            before = _travelling(before, kernel)
            found = kernel.backward(self.q, *shard.keys(kernel), mask, self.mod, self.inputs, before)
            return _travelling(found, kernel)

        results = lax.cond(mask.shows_any(), add, lambda same: same, before), arriving
        return in_turn(results) if self.ring.transport.overlaps else results


def _as_far_as_seen(ring: Callable, mask: Mask, axis: str):
    """Returns ring(hops) with only as many hops as a causal window needs, if the tokens are in their order.

    Whether they are is checked at run time. If any device of the mesh sees farther, all of them go once around.
    """
    devices = lax.axis_size(axis)
    reach, _ = mask.reach
    if not mask.is_causal or reach is None:
        return ring(devices - 1)
    near = -(-(reach - 1) // mask.k_position.shape[1])
    if near >= devices - 1:
        return ring(devices - 1)
    # pmax makes the decision the same on every device, so that all of them run the same collectives.
    is_seen_beyond = lax.pmax(_sees_beyond(mask, near, axis), jax.sharding.get_abstract_mesh().manual_axes)
    return lax.cond(is_seen_beyond, partial(ring, devices - 1), partial(ring, near))


def _sees_beyond(mask: Mask, hops: int, axis: str) -> Bool[Array, ""]:
    """Returns whether any query of this device may see a key of a device more than `hops` before it."""

    def size(length):
        return length // next(n for n in range(BLOCKS_COMPARED, 0, -1) if length % n == 0)

    devices, rows = lax.axis_size(axis), mask.rows
    k_bounds = lax.all_gather(mask.k_bounds(size(mask.k_position.shape[1])), axis)
    beyond = (lax.axis_index(axis) - jnp.arange(hops + 1, devices, dtype=jnp.int32)) % devices
    k_bounds = jax.tree.map(lambda x: jnp.moveaxis(x[beyond], 1, 0).reshape(rows, 1, -1), k_bounds)
    q_bounds = jax.tree.map(lambda x: x[:, :, None], mask.q_bounds(size(mask.q_position.shape[1])))
    return mask.maybe_visible(q_bounds, k_bounds).any()


def _turned(x: Array, kernel: Kernel) -> Array:
    """Returns keys with tokens and heads swapped if the kernel wants heads first; the function is its own inverse.

    They are sent in the kernel's layout: if they were transposed at each hop, the TPU compiler would not hide the
    transfers (3b, 64 chips of a v4).
    """
    return jnp.swapaxes(x, 1, 2) if kernel.heads_first else x


def _at_home(gradients: Gradients) -> Gradients:
    """Returns the gradients without dk and dv: those that are not sent around."""
    return gradients._replace(dk=None, dv=None)


def _travelling(gradients: Gradients, kernel: Kernel) -> Gradients:
    """Returns the gradients with dk and dv in the layout in which keys are sent, or back."""
    return gradients._replace(dk=_turned(gradients.dk, kernel), dv=_turned(gradients.dv, kernel))
