"""splash.py: exact for every mask, and what it rounds. Off a TPU its kernels run in Pallas' interpreter."""

import os
import subprocess
import sys
import textwrap
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from rlring.attention import Mask, striped_order, zigzag_order
from rlring.attention.blocks import Blocks
from rlring.attention.dense import dense_attention
from rlring.attention.kernel import BackwardInputs, local_attention
from rlring.attention.kernels.splash import LONGEST, SplashKernel, _Tiles
from rlring.attention.ring import ring_attention
from rlring.attention.score_mod import ScoreMod
from rlring.mesh import make_mesh

LENGTH, HEADS, KV_HEADS, SIZE = 200, 4, 2, 16  # no multiple of 128
KERNEL = SplashKernel(Blocks(128, 128, 2**20), interpret=True)
POSITION = np.arange(LENGTH)


def tiled(x, rows: int = 2):
    return jnp.tile(jnp.asarray(x, jnp.int32), (rows, 1))


def masks() -> dict[str, Mask]:
    position, packed = tiled(POSITION), jnp.stack([tiled(POSITION // 60, 1)[0], tiled(POSITION < 130, 1)[0]])
    ragged = jnp.where(position < jnp.array([[150], [17]]), 0, -1)
    striped = striped_order(LENGTH, 4)
    return {
        "plain": Mask.causal(position),
        "block_causal": Mask.causal(position // 4),
        "packed": Mask.causal(position % 60, packed),  # positions start anew, and out of order in the second row
        "ragged": Mask.causal(position, ragged),
        "padding_first": Mask.causal(position, jnp.where(position < 30, -1, 0)),
        "empty": Mask.causal(position, jnp.full_like(position, -1)),
        "first_rows_see_nothing": replace(Mask.causal(position), k_position=position + 20),
        "negative": Mask.causal(position - 100),
        "zigzag": Mask.causal(position[:, zigzag_order(LENGTH, 4)], packed[:, zigzag_order(LENGTH, 4)]),
        "striped": Mask.causal(position[:, striped], packed[:, striped]),
        "shuffled": Mask.causal(jax.random.permutation(jax.random.key(1), position, axis=1, independent=True), packed),
    }


def arrays(rows=2, length=LENGTH, keys=None, heads=HEADS, kv_heads=KV_HEADS, size=SIZE, dtype=jnp.float32):
    """q, k, v and the gradient of the out."""
    keys = length if keys is None else keys
    shapes = [(rows, length, heads, size), *[(rows, keys, kv_heads, size)] * 2, (rows, length, heads, size)]
    numbers = jax.random.split(jax.random.key(0), 4)
    return [jax.random.normal(key, shape).astype(dtype) for key, shape in zip(numbers, shapes, strict=True)]


def splash(q, k, v, mask):
    return local_attention(q, k, v, mask, KERNEL)


@partial(jax.jit, static_argnums=0)
def run(attend, inputs, mask):
    """out, dq, dk, dv."""
    q, k, v, d_out = inputs
    out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, mask), q, k, v)
    return (out, *pull(d_out))


def relative_errors(got, expected) -> list[float]:
    pairs = [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in zip(got, expected, strict=True)]
    return [np.abs(a - b).max() / max(np.abs(b).max(), 1e-30) for a, b in pairs]


@pytest.mark.slow  # the interpreter of the TPU's kernels is slow
@pytest.mark.parametrize(("is_causal", "window"), [(True, None), (True, 9), (False, 9)])
def test_every_mask(is_causal, window):
    inputs = arrays()
    for name, mask in masks().items():
        mask = replace(mask, is_causal=is_causal, window=window)
        errors = relative_errors(run(splash, inputs, mask), run(dense_attention, inputs, mask))
        assert max(errors) < 1e-5, (name, errors)


@pytest.mark.slow
def test_other_queries_than_keys():
    """More keys than one call takes, several query blocks, one sequence, and a group of three query heads."""
    inputs = arrays(1, 130, LONGEST + 300, 3, 1, 8)
    k_position = tiled(np.arange(LONGEST + 300), 1)
    q_position = k_position[:, :: (LONGEST + 300) // 130][:, :130]
    segments = jnp.zeros_like(q_position), jnp.zeros_like(k_position)
    mask = Mask(q_position, k_position, *segments, window=LONGEST - 7)
    kernel = SplashKernel(Blocks(128, 4096, 2**20), interpret=True)

    def attend(q, k, v, mask):
        return local_attention(q, k, v, mask, kernel)

    errors = relative_errors(run(attend, inputs, mask), run(dense_attention, inputs, mask))
    assert max(errors) < 1e-5, errors


def test_out_and_lse():
    """The lse is the natural one, float32; where nothing is seen out is 0, lse -inf, and no gradient is made of it."""
    q, k, v, d_out = arrays()
    mask = Mask.causal(tiled(POSITION), jnp.where(tiled(POSITION) < 150, 0, -1))
    whole = KERNEL.forward(q, k, v, mask, ScoreMod.plain(SIZE)).whole()
    out, lse = whole.out, whole.lse
    assert (out.dtype, lse.dtype) == (jnp.float32, jnp.float32)
    keys = np.repeat(np.asarray(k, np.float64), HEADS // KV_HEADS, axis=2)
    scores = np.einsum("btnh,bsnh->bnts", np.asarray(q, np.float64), keys) / SIZE**0.5
    expected = np.log(np.where(np.tri(LENGTH), np.exp(scores), 0).sum(-1))
    np.testing.assert_allclose(lse[:, :, :150], expected[:, :, :150], rtol=0, atol=1e-5)
    assert np.isneginf(lse[:, :, 150:]).all()
    assert (np.asarray(out[:, 150:]) == 0).all()
    gradients = KERNEL.backward(q, k, v, mask, ScoreMod.plain(SIZE), BackwardInputs.of(whole, 1e3 * d_out))
    for x in gradients[:3]:
        assert x.dtype == jnp.float32
        assert (np.asarray(x[:, 150:]) == 0).all()
        assert np.isfinite(x).all()


@pytest.mark.slow  # the interpreter of the TPU's kernels is slow
@pytest.mark.parametrize("order", [zigzag_order, None])
def test_ring(order):
    """Two hops, each with its own out and the global lse in the backward."""
    shard, length = P("data", "ring"), 256
    order = np.arange(length) if order is None else order(length, 2)
    inputs = arrays(length=length)
    mask = Mask.causal(tiled(order), tiled(order) // 190 - (tiled(order) >= 240).astype(jnp.int32))
    mesh = make_mesh(ring=2)
    run_ring = jax.shard_map(
        lambda q, k, v, mask: ring_attention(q, k, v, mask, "ring", KERNEL),
        mesh=mesh,
        in_specs=(shard,) * 4,
        out_specs=shard,
        check_vma=False,
    )
    errors = relative_errors(run(run_ring, inputs, mask), run(dense_attention, inputs, mask))
    assert max(errors) < 1e-5, errors


def exact(q, k, v, d_out):
    """Causal attention and its gradients in float64, by the definition."""
    q, k, v, d_out = (np.asarray(x, np.float64) for x in (q, k, v, d_out))
    k, v = (np.repeat(x, HEADS // KV_HEADS, axis=2) for x in (k, v))
    scores = np.einsum("btnh,bsnh->bnts", q, k) / SIZE**0.5
    weights = np.where(np.tri(q.shape[1]), np.exp(scores), 0)
    weights /= weights.sum(-1, keepdims=True)
    d_weights = np.einsum("btnh,bsnh->bnts", d_out, v)
    d_scores = weights * (d_weights - (weights * d_weights).sum(-1, keepdims=True)) / SIZE**0.5
    dk, dv = np.einsum("bnts,btnh->bsnh", d_scores, q), np.einsum("bnts,btnh->bsnh", weights, d_out)
    dk, dv = (x.reshape(*x.shape[:2], KV_HEADS, -1, SIZE).sum(3) for x in (dk, dv))
    return np.einsum("bnts,bsnh->btnh", weights, v), np.einsum("bnts,bsnh->btnh", d_scores, k), dk, dv


@pytest.mark.slow
def test_bfloat16_is_as_good_as_dense():
    inputs, mask = arrays(dtype=jnp.bfloat16), masks()["plain"]
    expected = exact(*inputs)
    got = run(splash, inputs, mask)
    assert all(x.dtype == jnp.bfloat16 for x in got)
    for error, allowed in zip(
        relative_errors(got, expected), relative_errors(run(dense_attention, inputs, mask), expected), strict=True
    ):
        assert error < 2 * allowed


def test_blocks_that_see_nothing_are_not_visited():
    """With NaN in keys of blocks that no query sees, out and gradients are finite: they were not read."""
    q, k, v, d_out = arrays(1, 256, kv_heads=4)
    position = tiled(np.arange(256), 1)
    mask = Mask.causal(position, window=20)
    poisoned = [x.at[:, :128].set(jnp.nan) for x in (k, v)]
    out, dq, *_ = run(splash, (q, *poisoned, d_out), replace(mask, q_position=position + 200))
    assert np.isfinite(out).all()
    assert np.isfinite(dq).all()
    assert np.isnan(run(splash, (q, *poisoned, d_out), mask)[0]).any()


def test_tiles():
    def tiles(q_block, k_block, q_length, k_length):
        shapes = jnp.zeros((1, q_length, 1, 8)), jnp.zeros((1, k_length, 1, 8))
        return _Tiles.of(Blocks(q_block, k_block, 1), *shapes)

    assert tiles(512, 512, 1000, 130) == (512, 256, 1024, 256)
    assert tiles(100, 500, 128, 512) == (128, 512, 128, 512)
    assert tiles(512, 1024, 4096, 4096).computed == 512
    assert tiles(512, 1152, 4096, 4096).computed == 384  # divides the block


def test_lowers_for_a_tpu():
    """Without a TPU and its compiler: the program is made, kernels and all."""
    inputs = arrays(1, 256, size=128, dtype=jnp.bfloat16)
    kernel = SplashKernel(Blocks(128, 128, 2**20))
    q, k, v, _ = inputs
    every = q, k, v, Mask.causal(tiled(np.arange(256), 1)), ScoreMod.plain(128)
    forward = jax.jit(kernel.forward).trace(*every).lower(lowering_platforms=("tpu",)).as_text()
    whole = jax.eval_shape(lambda *x: kernel.forward(*x).whole(), *every)
    inputs = jax.eval_shape(BackwardInputs.of, whole, whole.out)
    backward = jax.jit(kernel.backward).trace(*every, inputs).lower(lowering_platforms=("tpu",)).as_text()
    assert (forward.count("@tpu_custom_call"), backward.count("@tpu_custom_call")) == (1, 2)


@pytest.mark.libtpu
def test_compiles_for_a_tpu():
    """In a ring of two, by the TPU's own compiler, which needs no TPU."""
    program = """
        import jax, jax.numpy as jnp, numpy as np
        from jax.experimental import topologies
        from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
        from rlring.attention import Mask
        from rlring.attention.blocks import Blocks
        from rlring.attention.kernels.splash import SplashKernel
        from rlring.attention.ring import ring_attention
        from rlring.mesh import AXES

        devices = topologies.get_topology_desc("v5e:4x4", platform="tpu").devices
        mesh = Mesh(np.array(devices[:2]).reshape(1, 2, 1), AXES)
        kernel = SplashKernel(Blocks(512, 512, 2**20))
        spec = P(None, "ring")

        def loss(q, k, v, mask):
            run = lambda *x: ring_attention(*x, "ring", kernel)
            run = jax.shard_map(run, mesh=mesh, in_specs=(spec,) * 4, out_specs=spec, check_vma=False)
            return run(q, k, v, mask).astype(jnp.float32).sum()

        def array(shape, dtype, spec):
            return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

        for size, dtype in ((128, jnp.bfloat16), (64, jnp.float32)):
            q, k = array((1, 2000, 4, size), dtype, spec), array((1, 2000, 2, size), dtype, spec)
            position = array((1, 2000), jnp.int32, spec)
            mask = Mask.causal(position, position, window=700)
            text = jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, k, k, mask).compile().as_text()
            print(text.count('custom_call_target="tpu_custom_call"'))
    """
    settings = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    settings["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # a machine's second process with libtpu is else refused
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], env=os.environ | settings, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    kernels = [int(line) for line in ran.stdout.split()]
    assert kernels == [6, 6]  # two hops: forward, dq, and dk with dv
