"""make_kernel: the rule by which a kernel is chosen, and that nothing named is replaced."""

import jax.numpy as jnp
import pytest

from rlring import UsageError
from rlring.attention import kernels
from rlring.attention.blocks import Blocks
from rlring.attention.blockwise import BlockwiseKernel
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
