"""FSDP: every device keeps its part of every weight, whatever divides by what."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from rlring import make_mesh, sharding
from rlring.sharding import gathered, state_sharding, weight_sharding


@pytest.fixture(autouse=True)
def everything_is_split(monkeypatch):
    """Small weights too."""
    monkeypatch.setattr(sharding, "SMALLEST_SPLIT", 0)


@pytest.mark.parametrize(
    ("shape", "is_stacked", "part"),
    [
        ((24, 16), False, (3, 16)),  # one dimension that divides by all devices, if there is one: the longest
        ((16, 24), True, (16, 3)),
        ((12, 6), False, (3, 3)),  # 4 x 2 parts
        ((3, 12, 6), True, (3, 3, 3)),
        ((8, 3, 5), True, (8, 3, 5)),  # nothing divides: whole everywhere
        ((20,), False, (5,)),  # as many parts as it divides by
    ],
)
def test_parts(shape, is_stacked, part):
    mesh = make_mesh(data=2, ring=2, ulysses=2)
    home = weight_sharding(shape, mesh, is_stacked=is_stacked)
    assert home.shard_shape(shape) == part
    x = jax.device_put(np.arange(np.prod(shape), dtype=np.float32).reshape(shape), home)
    if np.prod(shape) / np.prod(part) == 8:
        starts = {tuple(s.start or 0 for s in shard.index) for shard in x.addressable_shards}
        assert len(starts) == 8  # no part is kept twice


def test_a_small_weight_is_split_over_all_devices_or_none(monkeypatch):
    monkeypatch.setattr(sharding, "SMALLEST_SPLIT", 21)
    mesh = make_mesh(data=2, ring=2, ulysses=2)
    for shape, part in (((20,), (20,)), ((16,), (2,)), ((44,), (11,))):
        assert weight_sharding(shape, mesh).shard_shape(shape) == part
        stacked = weight_sharding((100, *shape), mesh, is_stacked=True)
        assert stacked.shard_shape((100, *shape)) == (100, *part)


@pytest.mark.parametrize("devices", [1, 6, 7, 8])
def test_any_number_of_devices(devices):
    mesh = make_mesh(ring=devices)
    home = weight_sharding((5, 84, 10), mesh, is_stacked=True)
    assert np.prod(home.shard_shape((5, 84, 10))) == 5 * 84 * 10 / devices


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gathered_weights_and_their_gradients(dtype):
    mesh = make_mesh(data=2, ring=4)
    weights = {"matrix": jax.random.normal(jax.random.key(0), (16, 6)), "scale": jnp.linspace(0.5, 1.5, 6)}
    home = state_sharding(weights, mesh, fsdp=True)
    x = jax.random.normal(jax.random.key(1), (8, 16)).astype(dtype)
    tokens = jax.device_put(x, NamedSharding(mesh, P(("data", "ring"))))

    def loss(weights, x):
        return jnp.sin((x @ weights["matrix"].astype(x.dtype)).astype(jnp.float32) * weights["scale"][None]).sum()

    def seen(weights, x):
        whole = gathered(weights, mesh, x.dtype)
        assert (whole["matrix"].dtype, whole["scale"].dtype) == (x.dtype, jnp.float32)  # norms stay in float32
        return loss(whole, x)

    want = jax.grad(loss)(weights, x)
    got = jax.jit(jax.grad(seen), out_shardings=home)(jax.device_put(weights, home), tokens)
    assert got["matrix"].sharding == home["matrix"]
    for name, gradient in got.items():
        assert gradient.dtype == jnp.float32
        error = np.abs(gradient - want[name]).max() / np.abs(want[name]).max()
        assert error <= (1e-5 if dtype == "float32" else 2e-2), name


def test_states():
    mesh = make_mesh(ring=8)
    state = {"count": jnp.zeros((), jnp.int32), "blocks": {"w": jnp.zeros((8, 16))}, "head": jnp.zeros((8, 3))}
    parts = jax.tree.map(lambda x, home: home.shard_shape(x.shape), state, state_sharding(state, mesh, fsdp=True))
    assert parts == {"count": (), "blocks": {"w": (8, 2)}, "head": (1, 3)}  # layers are not split
    whole = state_sharding(state, mesh, fsdp=False)
    assert all(home.is_fully_replicated for home in jax.tree.leaves(whole))


def test_small_weights_stay_whole_but_those_of_blocks(monkeypatch):
    monkeypatch.setattr(sharding, "SMALLEST_SPLIT", 1000)
    state = {"blocks": jnp.ones((2, 8, 8)), "norm": jnp.ones(8), "head": jnp.ones((8, 125))}
    home = state_sharding(state, make_mesh(ring=8), fsdp=True)
    assert {name: home[name].shard_shape(x.shape) for name, x in state.items()} == {
        "blocks": (2, 1, 8),
        "norm": (8,),
        "head": (1, 125),
    }
