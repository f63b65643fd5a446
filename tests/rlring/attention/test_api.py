"""api.py: what it refuses, and in which words."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlring.attention import AttentionConfig, Mask, attention
from rlring.errors import UsageError
from rlring.mesh import make_mesh


def inputs(batch=2, length=8, heads=4, kv_heads=4, size=4):
    q = jax.random.normal(jax.random.key(0), (batch, length, heads, size))
    k, v = (jax.random.normal(jax.random.key(n), (batch, length, kv_heads, size)) for n in (1, 2))
    return q, k, v, Mask.causal(jnp.tile(jnp.arange(length, dtype=jnp.int32), (batch, 1)))


def test_config_is_checked():
    with pytest.raises(UsageError, match=r"no attention scheme 'rink'. Choose one of auto, dense, blockwise, ring"):
        AttentionConfig("rink")
    with pytest.raises(UsageError, match=r"attention.block_k is a whole number of at least 1; got 0"):
        AttentionConfig(block_k=0)
    assert hash(AttentionConfig()) == hash(AttentionConfig("ring"))


@pytest.mark.parametrize(
    ("scheme", "mesh", "message"),
    [
        ("ring", {"ulysses": 2}, r"'ring' needs mesh.ulysses=1; got mesh.ulysses=2. Use scheme 'hybrid'"),
        ("ulysses", {"ring": 2}, r"'ulysses' needs mesh.ring=1; got mesh.ring=2"),
        ("blockwise", {"ring": 4}, r"'blockwise' needs mesh.ring=1; got mesh.ring=4"),
        ("dense", {"ulysses": 2}, r"'dense' needs mesh.ulysses=1; got mesh.ulysses=2"),
        ("ulysses", {"ulysses": 8}, r"over mesh.ulysses=8 devices; got 4 query heads and 4 .* in \[1, 2, 4\]"),
        ("ring", {"data": 4}, r"split over mesh.data=4 devices; got B=2. Use a multiple of 4"),
    ],
)
def test_scheme_that_does_not_fit_the_mesh(scheme, mesh, message):
    with pytest.raises(UsageError, match=message):
        attention(*inputs(), config=AttentionConfig(scheme), mesh=make_mesh(**mesh))


def test_heads_that_do_not_divide():
    q, k, v, mask = inputs(heads=6, kv_heads=3)
    with pytest.raises(UsageError, match=r"got 6 query heads and 3 key/value heads. Use mesh.ulysses in \[1, 3, 6\]"):
        attention(q, k, v, mask, config=AttentionConfig("hybrid"), mesh=make_mesh(ulysses=2))


def test_foreign_mesh():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    with pytest.raises(UsageError, match=r"the mesh has the axes \('x',\); got MeshAxes\(.*\). Name the"):
        attention(*inputs(), config=AttentionConfig(), mesh=mesh)


def test_shapes_that_do_not_fit():
    q, k, v, mask = inputs()
    config = AttentionConfig()
    with pytest.raises(UsageError, match=r"got q\(2, 8, 4, 4\), k\(2, 8, 4, 4\), v\(2, 8, 3, 4\)"):
        attention(q, k, v[:, :, :3], mask, config=config)
    with pytest.raises(UsageError, match="got 4 query heads over 3 key/value heads"):
        attention(q, k[:, :, :3], v[:, :, :3], mask, config=config)
    with pytest.raises(UsageError, match="share one type; got float32, bfloat16 and float32"):
        attention(q, k.astype(jnp.bfloat16), v, mask, config=config)
    with pytest.raises(UsageError, match=r"the mask needs q_position and q_segment \(2, 8\).* Broadcast positions"):
        attention(q, k, v, jax.tree.map(lambda x: x[:1], mask), config=config)


@pytest.mark.parametrize(("scheme", "mesh"), [("blockwise", None), ("ring", {"ring": 4}), ("all_gather", {"ring": 4})])
def test_queries_and_keys_of_different_lengths(scheme, mesh):
    q, k, v, mask = inputs(length=24)
    mask = replace(mask, q_position=mask.q_position[:, 13:], q_segment=mask.q_segment[:, 13:])
    expected = attention(q[:, 13:], k, v, mask, config=AttentionConfig("dense"))
    config = AttentionConfig(scheme, block_q=4, block_k=5)
    got = attention(q[:, 13:], k, v, mask, config=config, mesh=make_mesh(**mesh) if mesh else None)
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_every_scheme_runs_without_a_mesh():
    expected = attention(*inputs(), config=AttentionConfig("dense"))
    for scheme in ("blockwise", "ring", "all_gather", "ulysses", "hybrid"):
        np.testing.assert_allclose(attention(*inputs(), config=AttentionConfig(scheme)), expected, atol=1e-6)


def test_dense_is_the_definition():
    q, k, v, mask = inputs(batch=1, length=3, heads=1, kv_heads=1, size=1)
    q, k, v = (jnp.array(x, jnp.float32).reshape(1, 3, 1, 1) for x in ([1, 0, 2], [0, 1, 1], [1, 2, 4]))
    out = attention(q, k, v, mask, config=AttentionConfig("dense"))
    third = (1 + (2 + 4) * np.exp(2)) / (1 + 2 * np.exp(2))
    np.testing.assert_allclose(out[0, :, 0, 0], [1.0, 1.5, third], rtol=1e-6)


def test_a_kernel_that_cannot_run_here_says_so():
    q, mask = jnp.zeros((1, 8, 2, 4)), Mask.causal(jnp.arange(8, dtype=jnp.int32)[None])
    with pytest.raises(UsageError, match=r"no attention kernel 'flash'. Choose one of auto, jax, cudnn, splash"):
        AttentionConfig(kernel="flash")
    for mesh in (None, make_mesh(ring=2)):
        for kernel, missing in (("cudnn", "an NVIDIA GPU"), ("splash", "a TPU from v4 on")):
            with pytest.raises(UsageError, match=rf"'{kernel}' cannot run: it needs {missing}, and the mesh has cpu"):
                attention(q, q, q, mask, config=AttentionConfig(kernel=kernel), mesh=mesh)
        out = attention(q, q, q, mask, config=AttentionConfig(kernel="auto"), mesh=mesh)
        assert out.shape == q.shape
