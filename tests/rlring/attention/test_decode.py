"""decode.py: a few queries against a cache equal the last rows of the whole, however the cache is split."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlring.attention import AttentionConfig, Mask, attention, decode_attention
from rlring.errors import UsageError
from rlring.mesh import make_mesh

MESHES = [None, {"ring": 4}, {"ulysses": 2}, {"data": 2, "ring": 2, "ulysses": 2}, {"ring": 8}]


def cache(kv_heads=2, length=20, window=None):
    """A cache of 26 places of which `length` are written, in an order of its own."""
    q = jax.random.normal(jax.random.key(0), (2, 26, 4, 8))
    k, v = (jax.random.normal(jax.random.key(n), (2, 26, kv_heads, 8)) for n in (1, 2))
    position = jnp.stack([jnp.arange(26), jax.random.permutation(jax.random.key(3), 26)]).astype(jnp.int32)
    return q, k, v, Mask.causal(position, jnp.where(position < length, 0, -1), window)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize(("kv_heads", "window"), [(4, None), (2, None), (1, 5)])
def test_equals_the_whole(mesh, kv_heads, window):
    q, k, v, mask = cache(kv_heads, window=window)
    expected = attention(q, k, v, mask, config=AttentionConfig("dense"))
    few = slice(7, 10)
    now = replace(mask, q_position=mask.q_position[:, few], q_segment=mask.q_segment[:, few])
    got = decode_attention(q[:, few], k, v, now, mesh=make_mesh(**mesh) if mesh else None)
    np.testing.assert_allclose(got, expected[:, few], atol=1e-6)


@pytest.mark.parametrize("mesh", MESHES[:3], ids=str)
def test_empty_cache_gives_zero(mesh):
    q, k, v, mask = cache(length=0)
    now = replace(mask, q_position=mask.q_position[:, :1], q_segment=mask.q_segment[:, :1] * 0)
    out = decode_attention(q[:, :1], k, v, now, mesh=make_mesh(**mesh) if mesh else None)
    np.testing.assert_array_equal(out, np.zeros((2, 1, 4, 8)))


@pytest.mark.parametrize("mesh", MESHES[1:4], ids=str)
def test_gradients_on_a_mesh(mesh):
    """Also of a row that sees nothing."""
    q, k, v, mask = cache(window=9)
    few = slice(7, 10)
    segment = mask.q_segment[:, few].at[0, 1].set(-1)
    now = replace(mask, q_position=mask.q_position[:, few], q_segment=segment)

    def gradients(attend):
        return jax.jit(jax.grad(lambda q, k, v: (attend(q, k, v, now) ** 2).sum(), argnums=(0, 1, 2)))(q[:, few], k, v)

    expected = gradients(partial(attention, config=AttentionConfig("dense")))
    for got, want in zip(gradients(partial(decode_attention, mesh=make_mesh(**mesh))), expected, strict=True):
        np.testing.assert_allclose(got, want, atol=5e-6)


def test_refusals():
    q, k, v, mask = cache()
    with pytest.raises(UsageError, match=r"the mask needs q_position and q_segment \(2, 1\)"):
        decode_attention(q[:, :1], k, v, mask)
    with pytest.raises(UsageError, match=r"split over mesh.data=4 devices; got B=2"):
        decode_attention(q, k, v, mask, mesh=make_mesh(data=4))
    with pytest.raises(UsageError, match=r"mesh is an instance of Mesh; got a list"):
        decode_attention(q, k, v, mask, mesh=jax.devices())
    with pytest.raises(UsageError, match=r"axes is an instance of MeshAxes; got a tuple"):
        decode_attention(q, k, v, mask, axes=("data",))
