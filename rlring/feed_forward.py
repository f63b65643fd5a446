"""The gated feed-forward of a Transformer's block, a tile of tokens at a time, and the norm before it."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from rlring.mesh import SEQUENCE_AXES

ACTIVATIONS = P("data", SEQUENCE_AXES, None)  # of [B, T, D]


def rms_norm(x: Array, scale: Array) -> Array:
    """Returns `x` scaled to unit root mean square (Zhang and Sennrich 2019); float32, because bfloat16 squares lose
    the tail."""
    x32 = x.astype(jnp.float32)
    normal = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + 1e-6)
    return (normal * scale.reshape(*[1] * (x.ndim - 1), -1)).astype(x.dtype)


def feed_forward(x: Float[Array, "B T D"], weights: tuple[Array, ...], *, tile: int, mesh: Mesh | None) -> Array:
    """Returns the gated feed-forward (SwiGLU, Shazeer 2020) of `x`, `tile` tokens a device at a time, so that the
    inner activations are never kept for more than one tile (Blockwise Parallel Transformer, Liu and Abbeel 2023).
    """

    def whole(x: Array, weights: tuple[Array, ...]) -> Array:
        norm, gate, up, down = weights
        normal = rms_norm(x, norm)
        inner = jax.nn.silu(normal @ gate.astype(x.dtype)) * (normal @ up.astype(x.dtype))
        return inner @ down.astype(x.dtype)

    def tiled(x: Array, weights: tuple[Array, ...]) -> Array:
        B, T, D = x.shape
        tiles = -(-T // tile)
        padded = jnp.pad(x, [(0, 0), (0, tiles * tile - T), (0, 0)])  # rows of zeros stay rows of their own
        pieces = padded.reshape(B, tiles, tile, D).swapaxes(0, 1)
        pieces = jax.lax.map(jax.checkpoint(lambda piece: whole(piece, weights)), pieces)
        return pieces.swapaxes(0, 1).reshape(B, tiles * tile, D)[:, :T]

    shards = 1 if mesh is None else mesh.shape["ring"] * mesh.shape["ulysses"]
    if x.shape[1] <= tile * shards:
        return whole(x, weights)
    if mesh is None:
        return tiled(x, weights)
    return jax.shard_map(tiled, mesh=mesh, in_specs=(ACTIVATIONS, P()), out_specs=ACTIVATIONS)(x, weights)
