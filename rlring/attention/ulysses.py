"""Ulysses attention (2309.14509): an all-to-all turns a split of the sequence into a split of the heads.

Each device then sees the whole sequence for its own heads, runs any local scheme on it, and the out goes back.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from rlring.attention.mask import Mask
from rlring.attention.softmax import accumulator_type
from rlring.errors import UsageError


def ulysses_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Mask,
    *,
    axis: str,
    local: Callable[[Array, Array, Array, Mask], Array],
) -> Float[Array, "B T N H"]:
    """Returns local(q, k, v, mask) computed with the whole of the mesh axis' sequence and a share of the heads; local
    computes in q's type, and k and v may come to it in a wider one.

    Runs inside shard_map. Where there are fewer key/value heads than devices each is copied for the devices that read
    it; check_heads() says whether that works out.
    """
    devices = lax.axis_size(axis)
    copies = max(1, devices // k.shape[2])
    q = _by_heads(q, axis)
    k, v = (_copied_by_heads(x, axis, copies) if copies > 1 else _by_heads(x, axis) for x in (k, v))
    whole = jax.tree.map(lambda x: lax.all_gather(x, axis, axis=1, tiled=True), mask)
    return lax.all_to_all(local(q, k, v, whole), axis, split_axis=1, concat_axis=2, tiled=True)


def _by_heads(x: Float[Array, "B T N H"], axis: str) -> Array:
    """Returns the whole sequence of this device's heads, of its part of the sequence of all heads."""
    return lax.all_to_all(x, axis, split_axis=2, concat_axis=1, tiled=True)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _copied_by_heads(x: Float[Array, "B S K H"], axis: str, copies: int) -> Array:
    """Returns _by_heads() of heads that are copied, in float32: they travel as they are, but the gradients of the
    copies, which are added up, come back unrounded."""
    return _by_heads(jnp.repeat(x, copies, axis=2), axis).astype(accumulator_type(x.dtype))


def _copied_forward(x, axis, copies):
    return _copied_by_heads(x, axis, copies), jnp.zeros(0, x.dtype)


def _copied_backward(axis, copies, like, gradient):
    home = lax.all_to_all(gradient, axis, split_axis=1, concat_axis=2, tiled=True)
    batch, length, heads, size = home.shape
    return (home.reshape(batch, length, heads // copies, copies, size).sum(3).astype(like.dtype),)


_copied_by_heads.defvjp(_copied_forward, _copied_backward)


def check_heads(scheme: str, heads: int, kv_heads: int, devices: int) -> None:
    """Raises UsageError when the heads cannot be split over `devices`."""
    if heads % devices or (kv_heads % devices and devices % kv_heads):
        fitting = [n for n in range(1, heads + 1) if heads % n == 0 and (kv_heads % n == 0 or n % kv_heads == 0)]
        raise UsageError(
            f"attention scheme {scheme!r} splits the heads over mesh.ulysses={devices} devices; got {heads} query "
            f"heads and {kv_heads} key/value heads. Use mesh.ulysses in {fitting}, or scheme 'ring', which splits no "
            "heads."
        )
