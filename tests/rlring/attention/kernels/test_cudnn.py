"""cudnn.py: what can be known of it without a GPU, that its calls are made; and where it is refused."""

import re
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from rlring.attention import Mask
from rlring.attention.blocks import Blocks
from rlring.attention.blockwise import BlockwiseKernel
from rlring.attention.kernels.cudnn import CudnnTile, _has_route, unavailable
from rlring.attention.kernels.rectangles import RectangleKernel
from rlring.attention.ring import ring_attention
from rlring.mesh import make_mesh

FORWARD, BACKWARD = "@__cudnn$fmhaSoftmax(", "@__cudnn$fmhaSoftmaxBackward("


def cuda(function, *arrays) -> str:
    return jax.jit(function).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()


def arrays(length=64):
    q, k = jnp.zeros((2, length, 6, 64), jnp.bfloat16), jnp.zeros((2, length, 2, 64), jnp.bfloat16)
    return q, k, k, Mask.causal(jnp.tile(jnp.arange(length, dtype=jnp.int32), (2, 1)))


def test_this_jax_has_the_route():
    assert _has_route()


@pytest.mark.parametrize("is_causal", [True, False])
def test_the_tile_is_one_call(is_causal):
    q, k, v, _ = arrays()
    lse = jnp.zeros((2, 6, 64))
    forward, backward = partial(CudnnTile().forward, scale=0.125, is_causal=is_causal), CudnnTile().backward
    mask = r"\22mask_type\22: \22CAUSAL" if is_causal else r"\22mask_type\22: \22NO_MASK"
    for text, call in (
        (cuda(forward, q, k, v), FORWARD),
        (cuda(partial(backward, scale=0.125, is_causal=is_causal), q, k, v, q, lse, q), BACKWARD),
    ):
        assert text.count(call) == 1
        assert mask in text
        assert r"\22fmha_scale\22: 0.125" in text
    # Of the backward's arguments q, k, v, out, lse, d_out: cuDNN takes the lse, the d_out, and last the out.
    assert re.search(re.escape(BACKWARD) + r"%arg0, %\w+, %\w+, %arg4, %arg5, %arg3\)", text)
    out, lse = jax.eval_shape(forward, q, k, v)
    assert (out.shape, out.dtype, lse.shape, lse.dtype) == (q.shape, q.dtype, (2, 6, 64), jnp.float32)
    dq, dk, dv = jax.eval_shape(partial(backward, scale=0.125, is_causal=is_causal), q, k, v, q, lse, q)
    assert (dq.shape, dk.shape, dv.shape) == (q.shape, k.shape, v.shape)


def test_a_ring_of_it():
    """Each hop has the shapes of the tile to choose from: all but nothing are a call."""
    kernel = RectangleKernel(CudnnTile(), BlockwiseKernel(Blocks(32, 32, 2**20)))
    spec = P(None, "ring")
    run = jax.shard_map(
        lambda *x: ring_attention(*x, "ring", kernel),
        mesh=make_mesh(ring=2),
        in_specs=(spec,) * 4,
        out_specs=spec,
        check_vma=False,
    )
    text = cuda(jax.grad(lambda *x: run(*x).astype(jnp.float32).sum(), (0, 1, 2)), *arrays(128))
    assert (text.count(FORWARD), text.count(BACKWARD)) == (2 * 4, 2 * 4)


def gpu(capability="9.0", version="cuda 13000"):
    client = SimpleNamespace(platform_version=version)
    return SimpleNamespace(platform="gpu", compute_capability=capability, client=client, device_kind="a GPU")


@pytest.mark.parametrize(
    ("dtype", "head_size", "device", "reason"),
    [
        (jnp.bfloat16, 128, gpu(), None),
        (jnp.float16, 256, gpu(), None),
        (jnp.bfloat16, 128, gpu("10.0"), None),
        (jnp.float32, 128, gpu(), "bfloat16 and float16, not in float32"),
        (jnp.bfloat16, 100, gpu(), "multiple of 8 up to 256, not 100"),
        (jnp.bfloat16, 256, gpu("8.0"), "up to 128, not 256"),
        (jnp.bfloat16, 64, gpu("7.5"), "compute capability 8.0, and a GPU has 7.5"),
        (jnp.bfloat16, 64, gpu(version="rocm 6"), "needs an NVIDIA GPU"),
        (jnp.bfloat16, 64, SimpleNamespace(platform="cpu"), "needs an NVIDIA GPU, and JAX sees cpu"),
    ],
)
def test_where_it_is_available(monkeypatch, dtype, head_size, device, reason):
    monkeypatch.setattr(jax, "devices", lambda: [device])
    found = unavailable(dtype, head_size)
    assert found is None if reason is None else reason in found


def test_another_jax(monkeypatch):
    from jax._src.cudnn import fused_attention_stablehlo as private

    monkeypatch.delattr(private, "_dot_product_attention_bwd_p_wrapper")
    assert "no route" in unavailable(jnp.bfloat16, 64)
