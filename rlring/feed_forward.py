"""The gated feed-forward layer of a Transformer block, computed in tiles of tokens, and RMS normalisation."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from rlring.mesh import SEQUENCE_AXES

ACTIVATIONS = P("data", SEQUENCE_AXES, None)  # the partition of activations [B, T, D]


def rms_norm(x: Array, scale: Array) -> Array:
    """Returns `x` scaled to unit root mean square over the last axis, times `scale` (Zhang and Sennrich 2019).

    Computed in float32, because sums of squares in bfloat16 lose small terms. The result has the type of `x`.
    """
    x32 = x.astype(jnp.float32)
    normal = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + 1e-6)
    return (normal * scale.reshape(*[1] * (x.ndim - 1), -1)).astype(x.dtype)


def feed_forward(x: Float[Array, "B T D"], weights: tuple[Array, ...], *, tile: int, mesh: Mesh | None) -> Array:
    """Returns the gated feed-forward (SwiGLU, Shazeer 2020) of the normalised `x`; the caller adds the residual.

    Each device computes `tile` tokens at a time, so that the inner activations are only kept for one tile (Blockwise
    Parallel Transformer, Liu and Abbeel 2023). `weights` are norm [D], gate [D, F], up [D, F] and down [F, D].
    """

    def whole(x: Array, weights: tuple[Array, ...]) -> Array:
        norm, gate, up, down = weights
        normal = rms_norm(x, norm)
        inner = jax.nn.silu(normal @ gate.astype(x.dtype)) * (normal @ up.astype(x.dtype))
        return inner @ down.astype(x.dtype)

    def tiled(x: Array, weights: tuple[Array, ...]) -> Array:
        B, T, D = x.shape
        tiles = -(-T // tile)
        padded = jnp.pad(x, [(0, 0), (0, tiles * tile - T), (0, 0)])  # padding does not affect other tokens
        pieces = padded.reshape(B, tiles, tile, D).swapaxes(0, 1)
        pieces = jax.lax.map(jax.checkpoint(lambda piece: whole(piece, weights)), pieces)
        return pieces.swapaxes(0, 1).reshape(B, tiles * tile, D)[:, :T]

    shards = 1 if mesh is None else mesh.shape["ring"] * mesh.shape["ulysses"]
    if x.shape[1] <= tile * shards:
        return whole(x, weights)
    if mesh is None:
        return tiled(x, weights)
    return jax.shard_map(tiled, mesh=mesh, in_specs=(ACTIVATIONS, P()), out_specs=ACTIVATIONS)(x, weights)
