"""What a token's place does to its queries and keys: rotary embedding, and log scaling."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def rotate(x_BTNH: Array, position: Int[Array, "B T"], base: float, fraction: float = 1.0) -> Array:
    """Returns `x` with rotary position embedding (Su et al. 2021, equation 34). Positions travel with the tokens: any
    order is exact."""
    half = int(x_BTNH.shape[-1] * fraction) // 2
    if not half:
        return x_BTNH
    frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = (
        position[..., None, None].astype(jnp.float32) * frequency[None, None, None]
    )  # B T 1 H/2, float32: positions reach millions
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second, rest = jnp.split(x_BTNH.astype(jnp.float32), [half, 2 * half], axis=-1)
    rotated = [first * cos - second * sin, second * cos + first * sin, rest]
    return jnp.concatenate(rotated, axis=-1).astype(x_BTNH.dtype)


LEARNT_AT = 256  # keys, of which a query starts out as it would be without log_scaling


def log_keys(position: Int[Array, "B T"], window: int | None) -> Float[Array, "B T 1 1"]:
    """Returns the logarithm of how many keys a query may see that stands so far from the start: 1 at the first."""
    keys = jnp.maximum(position, 0).astype(jnp.float32) + 1
    return jnp.log(keys if window is None else jnp.minimum(keys, window))[..., None, None]
