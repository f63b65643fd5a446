"""Ulysses attention (2309.14509): an all-to-all turns a split of the sequence into a split of the heads.

Each device then has the whole sequence for its own heads and runs a local scheme on it. A second all-to-all splits the
output by sequence again.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from rlring.attention.mask import Mask
from rlring.attention.score_mod import ScoreMod
from rlring.attention.softmax import accumulator_type


def ulysses_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    mask: Mask,
    mod: ScoreMod,
    *,
    axis: str,
    local: Callable[[Array, Array, Array, Mask, ScoreMod], tuple[Array, Array]],
) -> tuple[Float[Array, "B T N V"], Float[Array, "B N T"]]:
    """Returns out and lse of local(q, k, v, mask, mod), called with the whole sequence of the mesh axis and a share of
    the heads.

    `local` must compute in q's type; k and v may be passed to it in a wider type. Runs inside shard_map. If there are
    fewer key/value heads than devices, each is copied to the devices that read it; checks.check_scheme() checks that
    the numbers fit.
    """
    devices = lax.axis_size(axis)
    copies = max(1, devices // k.shape[2])
    q = _by_heads(q, axis)
    k, v = (_copied_by_heads(x, axis, copies) if copies > 1 else _by_heads(x, axis) for x in (k, v))
    gather = partial(lax.all_gather, axis_name=axis, axis=1, tiled=True)
    whole = mask.map_queries(gather).map_keys(gather)
    out, lse = local(q, k, v, whole, mod.of_heads(axis))
    # Cast to q's type before sending: half of the bytes for bfloat16.
    out = lax.all_to_all(out.astype(q.dtype), axis, split_axis=1, concat_axis=2, tiled=True)
    return out, lax.all_to_all(lse, axis, split_axis=2, concat_axis=1, tiled=True)


def _by_heads(x: Float[Array, "B T N H"], axis: str) -> Array:
    """Returns the whole sequence for this device's share of the heads, from its part of the sequence for all heads."""
    return lax.all_to_all(x, axis, split_axis=2, concat_axis=1, tiled=True)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _copied_by_heads(x: Float[Array, "B S K H"], axis: str, copies: int) -> Array:
    """Returns _by_heads() of x with every head repeated `copies` times, in at least float32.

    The heads are sent in the type of x. The float32 result makes the gradients of the copies float32 until they are
    summed.
    """
    return _by_heads(jnp.repeat(x, copies, axis=2), axis).astype(accumulator_type(x.dtype))


def _copied_forward(x, axis, copies):
    return _copied_by_heads(x, axis, copies), jnp.zeros(0, x.dtype)


def _copied_backward(axis, copies, like, gradient):
    home = lax.all_to_all(gradient, axis, split_axis=1, concat_axis=2, tiled=True)
    batch, length, heads, size = home.shape
    return (home.reshape(batch, length, heads // copies, copies, size).sum(3).astype(like.dtype),)


_copied_by_heads.defvjp(_copied_forward, _copied_backward)
