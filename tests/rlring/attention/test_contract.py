"""The contract: every scheme equals dense attention, forward and all gradients, on every mesh."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlring.attention import AttentionConfig, Mask, attention, inverse_order, zigzag_order
from rlring.mesh import make_mesh

MESHES = {
    "blockwise": [{}],
    "ring": [{}, {"ring": 2}, {"ring": 4}, {"ring": 8}, {"data": 2, "ring": 4}],
    "all_gather": [{"ring": 2}, {"ring": 2, "ulysses": 2}, {"ring": 8}],
    "ulysses": [{"ulysses": 2}, {"ulysses": 4}, {"data": 2, "ulysses": 2}],
    "hybrid": [{"ring": 2, "ulysses": 2}, {"ring": 4, "ulysses": 2}, {"ring": 2, "ulysses": 4}],
}
CASES = [(scheme, mesh) for scheme, meshes in MESHES.items() for mesh in meshes]
LENGTH, HEADS, SIZE = 64, 4, 8
BLOCKS = {"block_q": 6, "block_k": 5}  # divide neither the length nor each other


def arrays(kv_heads: int = HEADS, length: int = LENGTH, dtype=jnp.float32, seed: int = 0):
    """q, k, v and the gradient of the out."""
    keys = jax.random.split(jax.random.key(seed), 4)
    shapes = [(2, length, heads, SIZE) for heads in (HEADS, kv_heads, kv_heads, HEADS)]
    return [jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes, strict=True)]


def masks(length: int = LENGTH) -> dict[str, Mask]:
    position = jnp.tile(jnp.arange(length, dtype=jnp.int32), (2, 1))
    packed = jnp.stack([position[0] // 23, jnp.where(position[0] < 40, 3, 1)])
    ragged = jnp.where(position < jnp.array([[length - 11], [17]]), 0, -1)
    zigzag = position[:, zigzag_order(length, 4)] if length % 8 == 0 else position
    shuffled = jnp.asarray(np.random.default_rng(0).permuted(np.asarray(position), axis=1))
    return {
        "causal": Mask.causal(position),
        "full": Mask.full(position),
        "window": Mask.causal(position, window=9),
        "full_window": Mask.full(position, window=9),
        "block_causal": Mask.causal(position // 4),
        "packed": Mask.causal(position, packed),
        "packed_full": Mask.full(position, packed),
        "packed_window": Mask.causal(position, packed, window=9),
        "ragged": Mask.causal(position, ragged),
        "empty": Mask.causal(position, jnp.full_like(position, -1)),
        "blind_rows": replace(Mask.causal(position), k_position=position + 20),
        "zigzag": Mask.causal(zigzag),
        "shuffled": Mask.causal(shuffled, packed, window=9),
    }


def run(inputs, mask, config, mesh=None):
    """out, dq, dk, dv."""
    q, k, v, d_out = inputs
    out, pull = jax.vjp(lambda q, k, v: attention(q, k, v, mask, config=config, mesh=mesh), q, k, v)
    return (out, *pull(d_out))


def relative_error(a, b) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30))


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize(("scheme", "mesh"), CASES, ids=str)
def test_equals_dense(scheme, mesh, kv_heads):
    inputs, config = arrays(kv_heads), AttentionConfig(scheme, **BLOCKS)
    for name, mask in masks().items():
        expected = run(inputs, mask, AttentionConfig("dense"))
        got = run(inputs, mask, config, make_mesh(**mesh) if mesh else None)
        for part, a, b in zip(("out", "dq", "dk", "dv"), got, expected, strict=True):
            assert np.isfinite(a).all(), (name, part)
            assert relative_error(a, b) <= 1e-5, (name, part)
