"""Position-dependent transformations of queries and keys: rotary embedding and log scaling."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def rotate(x_BTNH: Array, position: Int[Array, "B T"], base: float, fraction: float = 1.0) -> Array:
    """Returns `x` with rotary position embedding (Su et al. 2021, equation 34) of the first `fraction` of each head.

    The tokens may be in any order, because `position` gives the position of each. The error of an angle is below
    1e-6 rad for every int32 position.
    """
    half = int(x_BTNH.shape[-1] * fraction) // 2
    if not half:
        return x_BTNH
    angle = _angles(position, base ** (-np.arange(half, dtype=np.float64) / half))[:, :, None]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second, rest = jnp.split(x_BTNH.astype(jnp.float32), [half, 2 * half], axis=-1)
    rotated = [first * cos - second * sin, second * cos + first * sin, rest]
    return jnp.concatenate(rotated, axis=-1).astype(x_BTNH.dtype)


def _angles(position: Int[Array, "B T"], frequency: np.ndarray) -> Float[Array, "B T F"]:
    """Returns position * frequency in radians, modulo whole turns, float32.

    In float32 the product would be off by 0.03 rad at half a million tokens. In units of 2**-32 turns an integer
    product is exact, and its overflow drops the whole turns. The part of a frequency that is lost by rounding to these
    units is small, and its product is added in float32.
    """
    units = frequency / (2 * np.pi) * 2.0**32
    whole = np.round(units)
    turned = position[..., None].astype(jnp.uint32) * (whole.astype(np.int64) % 2**32).astype(np.uint32)[None, None]
    rest = position[..., None].astype(jnp.float32) * (units - whole).astype(np.float32)[None, None]
    return (turned.astype(jnp.int32).astype(jnp.float32) + rest) * np.float32(2 * np.pi / 2**32)


LEARNT_AT = 256  # with this many keys, log_scaling has no effect at initialisation


def log_keys(position: Int[Array, "B T"], window: int | None) -> Float[Array, "B T 1 1"]:
    """Returns the logarithm of the number of keys that a causal query at each position may see (1 key at position 0, at
    most `window`); float32 [B, T, 1, 1]."""
    keys = jnp.maximum(position, 0).astype(jnp.float32) + 1
    return jnp.log(keys if window is None else jnp.minimum(keys, window))[..., None, None]
