"""make_kernel: the rule by which a kernel is chosen, and that nothing named is replaced."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlring import Mask, UsageError
from rlring.attention import kernels
from rlring.attention.blocks import Blocks
from rlring.attention.blockwise import BlockwiseKernel
from rlring.attention.kernel import local_attention
from rlring.attention.kernels import KERNELS, make_kernel
from rlring.attention.kernels.rectangles import RectangleKernel
from rlring.attention.kernels.splash import SplashKernel

BLOCKS = Blocks(512, 512, 2**20)


def make(name, platform, dtype=jnp.bfloat16):
    return make_kernel(name, BLOCKS, platform=platform, dtype=jnp.dtype(dtype), head_size=64)


@pytest.mark.parametrize(
    ("platform", "dtype", "expected"),
    [
        ("tpu", jnp.bfloat16, SplashKernel),
        ("tpu", jnp.float32, SplashKernel),
        ("tpu", jnp.float16, BlockwiseKernel),
        ("old tpu", jnp.bfloat16, BlockwiseKernel),
        ("gpu", jnp.bfloat16, RectangleKernel),
        ("gpu", jnp.float32, BlockwiseKernel),
        ("cpu", jnp.bfloat16, BlockwiseKernel),
    ],
)
def test_auto(monkeypatch, platform, dtype, expected):
    monkeypatch.setattr(kernels, "unavailable", lambda dtype, size: "no" if dtype == jnp.float32 else None)
    assert isinstance(make("auto", platform, dtype), expected)


def test_every_name_makes_a_kernel_that_can_be_hashed(monkeypatch):
    monkeypatch.setattr(kernels, "unavailable", lambda dtype, size: None)
    made = [make(name, platform) for name, platform in zip(KERNELS, ("cpu", "cpu", "gpu", "tpu"), strict=True)]
    assert [type(kernel) for kernel in made] == [BlockwiseKernel, BlockwiseKernel, RectangleKernel, SplashKernel]
    assert len({hash(kernel) for kernel in made}) == 3
    assert make("jax", "tpu") == BlockwiseKernel(BLOCKS)


@pytest.mark.parametrize(
    ("name", "platform", "dtype", "message"),
    [
        ("flash", "gpu", jnp.bfloat16, "no attention kernel 'flash'. Choose one of auto, jax, cudnn, splash"),
        ("splash", "cpu", jnp.bfloat16, "'splash' cannot run: it needs a TPU from v4 on, and the mesh has cpu devices"),
        ("splash", "tpu", jnp.float16, "float32 and bfloat16; got float16. Cast"),
        ("cudnn", "cpu", jnp.bfloat16, "'cudnn' cannot run: it needs an NVIDIA GPU"),
        ("cudnn", "gpu", jnp.float32, "not in float32: cast q, k and v. Or use kernel 'auto' or 'jax'."),
    ],
)
def test_a_named_kernel_that_cannot_run(name, platform, dtype, message):
    with pytest.raises(UsageError, match=message):
        make(name, platform, dtype)


class Uncalled(NamedTuple):
    """A tile that compiles on a CPU, for a mask that has no shape of a tile's."""

    def forward(self, q, k, v, *, scale, is_causal):
        return jnp.zeros_like(q), jnp.zeros((q.shape[0], q.shape[2], q.shape[1]))

    def backward(self, q, k, v, out, lse, d_out, *, scale, is_causal):
        return jnp.zeros_like(q), jnp.zeros_like(k), jnp.zeros_like(v)


def test_only_auto_computes_in_plain_jax_what_cudnn_lacks(monkeypatch):
    """A window is refused; another mask is known when it runs, and then nothing passes for the kernel's work."""
    monkeypatch.setattr(kernels, "unavailable", lambda dtype, size: None)
    make = partial(make_kernel, blocks=BLOCKS, platform="gpu", dtype=jnp.dtype(jnp.bfloat16), head_size=64)
    with pytest.raises(UsageError, match=r"'cudnn' cannot run: it knows no window; got window=8. .* use kernel 'auto'"):
        make("cudnn", wanted={"window": 8})
    q, k, v = (jax.random.normal(jax.random.key(n), (1, 64, 2, 64), jnp.bfloat16) for n in range(3))
    position = jnp.arange(64, dtype=jnp.int32)[None]
    packed = Mask.causal(position % 32, position // 32)

    def loss(q, k, v, kernel):
        out = local_attention(q, k, v, packed, kernel).astype(jnp.float32)
        return (out**2).sum(), out

    def run(kernel):
        of_kernel = partial(loss, kernel=kernel._replace(tile=Uncalled()))
        return jax.tree.leaves(jax.jit(jax.grad(of_kernel, argnums=(0, 1, 2), has_aux=True))(q, k, v))

    assert all(np.isfinite(x).all() for x in run(make("auto", wanted={"window": 8})))
    assert all(np.isnan(x).all() for x in run(make("cudnn")))
