"""ring.py: what goes over the wires."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from rlring.attention import AttentionConfig, Mask, attention, ring_transport
from rlring.attention.ring_transport import Transport
from rlring.mesh import make_mesh


def permutes(function, *arrays) -> int:
    """Returns how many collective permutes the compiled program has."""
    text = jax.jit(function).lower(*arrays).compile().as_text()
    return text.count(" collective-permute(") + text.count(" collective-permute-start(")


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("dtype", "devices"), [(jnp.float32, 4), slow(jnp.float32, 8), (jnp.bfloat16, 4), slow(jnp.bfloat16, 8)]
)
def test_one_permute_a_hop(devices, dtype):
    x = jnp.zeros((1, 32, 2, 4), dtype)
    mask = Mask.causal(jnp.arange(32, dtype=jnp.int32)[None])
    run = partial(attention, config=AttentionConfig("ring"), mesh=make_mesh(ring=devices))

    def loss(run, q, k, v, mask):
        return run(q, k, v, mask).astype(jnp.float32).sum()

    assert permutes(run, x, x, x, mask) == devices - 1
    assert permutes(jax.grad(partial(loss, run), (0, 1, 2)), x, x, x, mask) == (devices - 1) + backward_on_cpu(
        devices - 1, dtype
    )
    # Forward; in the backward keys and values once more, their gradients one permute behind them, and home at last.
    run = partial(
        attention, config=AttentionConfig("ring", transport=Transport.of("gpu")), mesh=make_mesh(ring=devices)
    )
    assert permutes(jax.grad(partial(loss, run), (0, 1, 2)), x, x, x, mask) == (devices - 1) + (devices + 1)


def backward_on_cpu(hops: int, dtype=jnp.float32) -> int:
    """Keys, values and what is known of them, then the keys' two gradients, which go one farther: home.

    Each by itself, but keys and values of half precision in one piece: as numbers they would be sent as float32.
    """
    return (3 if dtype == jnp.float32 else 1) * hops + 2 * (hops + 1) if hops else 0


@pytest.mark.parametrize(("window", "hops"), [slow(1, 0), (9, 1), slow(10, 2)])
def test_a_window_takes_as_many_hops_as_it_reaches(window, hops):
    """Tokens in their order, 8 a device: ceil((window - 1) / 8) hops; in any other order the ring goes once around."""
    position = jnp.arange(64, dtype=jnp.int32)[None]
    mask = Mask.causal(position, window=window)
    x = jax.random.normal(jax.random.key(0), (1, 64, 2, 4))
    run = partial(attention, config=AttentionConfig("ring"), mesh=make_mesh(ring=8))

    def loss(x, mask, run):
        return (run(x, x, x, mask) ** 2).sum()

    def branches(function) -> list[int]:
        """Permutes in each branch that is not taken hop by hop."""
        text = jax.jit(function).lower(x, mask).compile().as_text()
        found = [part.count(" collective-permute(") for part in text.split("\n\n")]
        return sorted(n for n in found if n)

    assert branches(lambda x, mask: run(x, x, x, mask)) == sorted(n for n in (hops, 7) if n)
    backward = branches(jax.grad(partial(loss, run=run)))
    assert backward == sorted(n for n in (hops, 7, backward_on_cpu(hops), backward_on_cpu(7)) if n)

    dense = partial(attention, config=AttentionConfig("dense"))
    shuffled = Mask.causal(jax.random.permutation(jax.random.key(1), position, axis=1), window=window)
    for seen in (mask, shuffled):
        expected, got = (np.asarray(jax.grad(partial(loss, run=how))(x, seen)) for how in (dense, run))
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_how_far_a_window_reaches_is_known_when_it_runs():
    """The short ring is taken where it is enough: with NaN in what it must not read, the out is finite."""
    x = jax.random.normal(jax.random.key(0), (1, 64, 2, 4))
    run = partial(attention, config=AttentionConfig("ring"), mesh=make_mesh(ring=8))
    position = jnp.arange(64, dtype=jnp.int32)[None]
    far_apart = jnp.where(position < 8, position, position + 100)  # nobody sees the first shard

    def sees(position, window):
        poisoned = x.at[:, :8].set(jnp.nan)
        return np.isfinite(run(x, poisoned, poisoned, Mask.causal(position, window=window))[0, 8:]).all()

    assert sees(far_apart, 9)
    assert sees(far_apart, 30)
    assert not sees(position, 9)


def test_a_long_ring_is_a_loop(monkeypatch):
    monkeypatch.setattr(ring_transport, "UNROLLED_HOPS", 2)
    x = jax.random.normal(jax.random.key(0), (1, 32, 2, 4))
    mask = Mask.causal(jnp.arange(32, dtype=jnp.int32)[None])
    looped = partial(attention, config=AttentionConfig("ring", block_q=7), mesh=make_mesh(ring=8))

    def loss(x, run):
        return (run(x, x, x, mask) ** 2).sum()

    assert permutes(looped, x, x, x, mask) == 2  # the first, and the one in the loop
    dense = partial(attention, config=AttentionConfig("dense"))
    expected, got = (jax.grad(loss)(x, run) for run in (dense, looped))
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("transport", [Transport.of("cpu"), Transport.of("tpu")])
def test_bits_survive_the_journey(transport):
    """NaN payloads, denormals and integers arrive as they left, whatever they travel with."""
    tree = {
        "half": jnp.array([1e-40, -0.0, jnp.nan, 3.0], jnp.bfloat16).reshape(4, 1),
        "int": jnp.array([[-1], [2**31 - 1], [0x7FC00001], [0x00000001]], jnp.int32),
        "single": jnp.array([1e-45, -0.0, jnp.inf, 1.5], jnp.float32).reshape(4, 1),
    }
    shift = jax.shard_map(
        partial(transport.shift, axis="ring", step=1), mesh=make_mesh(ring=4), in_specs=P("ring"), out_specs=P("ring")
    )
    arrived = jax.jit(shift)(tree)
    for name, x in tree.items():
        sent = np.roll(np.asarray(x), 1, axis=0)
        assert np.asarray(arrived[name]).tobytes() == sent.tobytes(), name
