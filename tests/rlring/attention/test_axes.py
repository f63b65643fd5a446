"""Any mesh: axes of other names, several of the batch, one of the heads, others left alone; and inside shard_map."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import rlring
from rlring.attention import AttentionConfig, Mask, MeshAxes, attention, decode_attention, sharded_attention
from rlring.errors import UsageError

ROWS, LENGTH, HEADS, KV_HEADS, SIZE = 4, 48, 8, 4, 8
BLOCKS = {"block_q": 6, "block_k": 5}
CASES = {  # scheme, mesh, axes
    "two batch axes": ("ring", {"dp": 2, "fsdp": 2, "seq": 2}, MeshAxes(("dp", "fsdp"), ring="seq")),
    "heads": ("ring", {"fsdp": 1, "tensor": 2, "seq": 4}, MeshAxes(("fsdp",), ring="seq", heads="tensor")),
    "heads of ulysses": ("ulysses", {"dp": 2, "tp": 2, "sp": 2}, MeshAxes(("dp",), ulysses="sp", heads="tp")),
    "hybrid": ("hybrid", {"x": 2, "y": 2, "z": 2}, MeshAxes((), ring="x", ulysses="y", heads="z")),
    "all_gather": ("all_gather", {"x": 2, "y": 4}, MeshAxes((), ring="y", ulysses=None)),
    "one axis": ("auto", {"sp": 8}, MeshAxes((), ulysses="sp")),
}
QUICK = ("hybrid",)
random = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return random.normal(size=shape).astype(np.float32)


def arrays() -> dict[str, np.ndarray]:
    return {
        "q": normal(ROWS, LENGTH, HEADS, SIZE),
        "k": normal(ROWS, LENGTH, KV_HEADS, SIZE),
        "v": normal(ROWS, LENGTH, KV_HEADS, SIZE),
        "sinks": normal(HEADS),
        "bias": normal(HEADS, LENGTH, LENGTH),
    }


def mask() -> Mask:
    position = jnp.tile(jnp.arange(LENGTH, dtype=jnp.int32), (ROWS, 1))
    return Mask.causal(position, position // 20)


SETTINGS = {"soft_cap": 2.0, "dropout": (0.2, jax.random.key(1)), "return_lse": True}


@partial(jax.jit, static_argnums=0)
def run(attend, x, gradients):
    results, pull = jax.vjp(attend, x)
    return results, pull(gradients)


def check(attend, x=None):
    x = arrays() if x is None else x
    gradients = normal(ROWS, LENGTH, HEADS, SIZE), normal(ROWS, LENGTH, HEADS)
    one = partial(attention, mask=mask(), config=AttentionConfig("dense"), **SETTINGS)
    expected = jax.tree.leaves(run(lambda x: one(**x), x, gradients))
    for a, b in zip(jax.tree.leaves(run(attend, x, gradients)), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(np.abs(b).max(), 1e-3))


def mesh_of(sizes: dict[str, int], kind: AxisType = AxisType.Auto):
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(kind,) * len(sizes))


def cases():
    return [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in CASES]


@pytest.mark.parametrize("name", cases())
def test_global_arrays(name):
    scheme, sizes, axes = CASES[name]
    config = AttentionConfig(scheme, **BLOCKS)
    check(lambda x: attention(mask=mask(), config=config, mesh=mesh_of(sizes), axes=axes, **x, **SETTINGS))


def in_shard_map(scheme: str, mesh, axes: MeshAxes, **settings):
    """The caller's own shard_map."""
    per_head, tokens = (
        P(axes.heads),
        P(axes.batch or None, tuple(n for n in axes.sequence if n in mesh.shape), axes.heads),
    )
    specs = {"q": tokens, "k": tokens, "v": tokens, "sinks": per_head, "bias": P(axes.heads, tokens[1])}
    config = AttentionConfig(scheme, **BLOCKS)

    def on_shard(x, mask):
        return sharded_attention(mask=mask, config=config, axes=axes, **x, **SETTINGS)

    of_mask = P(*tokens[:2])
    run = jax.shard_map(on_shard, mesh=mesh, in_specs=(specs, of_mask), out_specs=(tokens, tokens), **settings)
    return lambda x: run(x, mask())


@pytest.mark.parametrize("name", cases())
def test_inside_shard_map(name):
    scheme, sizes, axes = CASES[name]
    check(in_shard_map(scheme, mesh_of(sizes), axes, check_vma=False))


@pytest.mark.slow
@pytest.mark.parametrize("name", cases())
def test_inside_shard_map_with_checked_types(name):
    scheme, sizes, axes = CASES[name]
    check(in_shard_map(scheme, mesh_of(sizes), axes))


@pytest.mark.slow
def test_inside_shard_map_of_some_axes():
    """The others are left to the partitioner."""
    mesh, axes = mesh_of({"dp": 2, "seq": 4}), MeshAxes((), ring="seq")
    check(in_shard_map("ring", mesh, axes, check_vma=False, axis_names={"seq"}))


def test_explicit_sharding():
    mesh, axes = mesh_of({"dp": 2, "seq": 4}, AxisType.Explicit), MeshAxes(("dp",), ring="seq")
    config = AttentionConfig("ring", **BLOCKS)
    with jax.set_mesh(mesh):
        x = arrays()
        x |= {name: jax.device_put(x[name], NamedSharding(mesh, P("dp", "seq"))) for name in "qkv"}
        out = jax.jit(lambda x: attention(mask=mask(), config=config, mesh=mesh, axes=axes, **x))(x)
    one = attention(mask=mask(), config=AttentionConfig("dense"), **arrays_like(x))
    np.testing.assert_allclose(out, one, atol=1e-5)


@pytest.mark.parametrize("kinds", [(AxisType.Explicit,) * 2, (AxisType.Auto, AxisType.Explicit)], ids=str)
def test_explicit_sharding_of_a_length_that_does_not_divide(kinds):
    mesh, axes = jax.make_mesh((2, 4), ("dp", "seq"), axis_types=kinds), MeshAxes(("dp",), ring="seq")
    q, k, v = (normal(2, 11, 4, SIZE) for _ in range(3))
    position = jnp.tile(jnp.arange(11, dtype=jnp.int32), (2, 1))
    with jax.set_mesh(mesh):
        of = partial(attention, q, k, v, Mask.causal(position), mesh=mesh, axes=axes)
        out = of(config=AttentionConfig("ring", **BLOCKS))
        decoded = decode_attention(q, k, v, Mask.causal(position), mesh=mesh, axes=axes)
    one = attention(q, k, v, Mask.causal(position), config=AttentionConfig("dense"))
    np.testing.assert_allclose(out, one, atol=1e-5)
    np.testing.assert_allclose(decoded, one, atol=1e-5)


def arrays_like(x):
    return jax.tree.map(np.asarray, x)


def test_a_mesh_inside_shard_map_is_refused():
    mesh, axes, q = mesh_of({"dp": 2, "seq": 4}), MeshAxes(("dp",), ring="seq"), jnp.zeros((4, 8, 2, 4))
    ours, tokens = partial(attention, config=AttentionConfig()), P("dp", "seq")
    for attend, instead in ((ours, "rlring.sharded_attention there"), (decode_attention, "decode_attention outside")):
        of = partial(attend, mask=Mask.causal(jnp.zeros((2, 2), jnp.int32)), mesh=mesh, axes=axes)
        run = jax.shard_map(lambda q, of=of: of(q, q, q), mesh=mesh, in_specs=tokens, out_specs=tokens)
        with pytest.raises(UsageError, match=rf"inside jax.shard_map over \('dp', 'seq'\). Call {instead}"):
            run(q)


def test_explicit_sharding_without_a_mesh_is_refused():
    mesh, mask = mesh_of({"dp": 2, "seq": 4}, AxisType.Explicit), Mask.causal(jnp.zeros((4, 8), jnp.int32))
    q = jnp.zeros((4, 8, 2, 4))
    k = jax.device_put(q, NamedSharding(mesh, P("dp", "seq")))
    for attend in (partial(attention, config=AttentionConfig()), decode_attention):
        with pytest.raises(UsageError, match=r"k is split explicitly over the mesh axes \('dp', 'seq'\); got no mesh"):
            jax.jit(attend)(q, k, q, mask)


def test_axes_of_no_mesh_are_refused():
    q = jnp.zeros((2, 8, 2, 4))
    of_all = partial(attention, q, q, q, Mask.causal(jnp.zeros((2, 8), jnp.int32)), config=AttentionConfig())
    mesh = mesh_of({"dp": 2, "seq": 4})
    with pytest.raises(UsageError, match=r"the mesh has the axes \('dp', 'seq'\); got MeshAxes\(.*'sqe'.*\). Name the"):
        of_all(mesh=mesh, axes=MeshAxes(("dp",), ring="sqe"))
    with pytest.raises(UsageError, match=r"the heads are split over mesh.seq=4 devices; got 2 query heads and 2 key"):
        of_all(mesh=mesh, axes=MeshAxes(("dp",), heads="seq"))
    with pytest.raises(UsageError, match=r"each mesh axis has one part in attention; got .* Name each axis once"):
        MeshAxes(("dp",), ring="dp")
    with pytest.raises(UsageError, match=r"MeshAxes.batch is a tuple of names; got 'dp'. Use \('dp',\)"):
        MeshAxes("dp")
    with pytest.raises(UsageError, match=r"called inside jax.shard_map; got no mesh axis. Use attention instead"):
        rlring.sharded_attention(q, q, q, Mask.causal(jnp.zeros((2, 8), jnp.int32)), config=AttentionConfig())
