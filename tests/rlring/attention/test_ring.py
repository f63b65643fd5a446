"""ring.py: what goes over the wires."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from rlring.attention import AttentionConfig, Mask, attention, ring
from rlring.mesh import make_mesh


def permutes(function, *arrays) -> int:
    """Returns how many collective permutes the compiled program has."""
    text = jax.jit(function).lower(*arrays).compile().as_text()
    return text.count(" collective-permute(") + text.count(" collective-permute-start(")


@pytest.mark.parametrize("devices", [4, 8])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_one_permute_a_hop(devices, dtype):
    x = jnp.zeros((1, 32, 2, 4), dtype)
    mask = Mask.causal(jnp.arange(32, dtype=jnp.int32)[None])
    run = partial(attention, config=AttentionConfig("ring"), mesh=make_mesh(ring=devices))

    def loss(q, k, v, mask):
        return run(q, k, v, mask).astype(jnp.float32).sum()

    assert permutes(run, x, x, x, mask) == devices - 1
    # Forward; in the backward keys and values once more, and their gradients, which end at home, in one parcel a hop.
    assert permutes(jax.grad(loss, (0, 1, 2)), x, x, x, mask) == 3 * (devices - 1)


def test_a_long_ring_is_a_loop(monkeypatch):
    monkeypatch.setattr(ring, "UNROLLED_HOPS", 2)
    x = jax.random.normal(jax.random.key(0), (1, 32, 2, 4))
    mask = Mask.causal(jnp.arange(32, dtype=jnp.int32)[None])
    looped = partial(attention, config=AttentionConfig("ring", block_q=7), mesh=make_mesh(ring=8))

    def loss(x, run):
        return (run(x, x, x, mask) ** 2).sum()

    assert permutes(looped, x, x, x, mask) == 2  # the first, and the one in the loop
    dense = partial(attention, config=AttentionConfig("dense"))
    expected, got = (jax.grad(loss)(x, run) for run in (dense, looped))
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_bits_survive_the_journey():
    """NaN payloads, denormals and integers arrive as they left, whatever they travel with."""
    tree = {
        "half": jnp.array([1e-40, -0.0, jnp.nan, 3.0], jnp.bfloat16).reshape(4, 1),
        "int": jnp.array([[-1], [2**31 - 1], [0x7FC00001], [0x00000001]], jnp.int32),
        "single": jnp.array([1e-45, -0.0, jnp.inf, 1.5], jnp.float32).reshape(4, 1),
    }
    shift = jax.shard_map(
        partial(ring._shift, axis="ring"), mesh=make_mesh(ring=4), in_specs=P("ring"), out_specs=P("ring")
    )
    arrived = jax.jit(shift)(tree)
    for name, x in tree.items():
        sent = np.roll(np.asarray(x), 1, axis=0)
        assert np.asarray(arrived[name]).tobytes() == sent.tobytes(), name
