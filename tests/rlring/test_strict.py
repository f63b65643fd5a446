"""The checks that tests run under (conftest.py) are on, and JAX's own of NaN and infinity find nothing either."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rlring import AttentionConfig, Mask, SparsePattern, Transformer, TransformerConfig, decode_attention, make_mesh
from rlring.attention import attention
from rlring.attention.rows import RowGroups
from rlring.attention.softmax import nothing
from rlring.language_model import LanguageModelConfig, Training, laid_out

SCHEMES = {
    "dense": {},
    "blockwise": {},
    "sparse": {"ulysses": 4},
    "ring": {"ring": 4},
    "all_gather": {"ring": 2, "ulysses": 2},
    "ulysses": {"ulysses": 4},
    "hybrid": {"ring": 2, "ulysses": 2},
}


@pytest.fixture(autouse=True)
def strictly():
    with jax.debug_nans(True), jax.debug_infs(True):
        yield


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: jnp.ones(2) + jnp.ones(2, jnp.bfloat16), "no available implicit dtype promotion path"),
        (lambda: jnp.ones(2) + jnp.ones((2, 2)), "jax_numpy_rank_promotion='raise'"),
        (lambda: RowGroups.of(4.0, 2, 3), "violates type hint"),
        (lambda: nothing(jnp.ones((1, 2, 1, 3)), jnp.ones((2, 2, 1, 3))), "violates type hint"),
    ],
    ids=["type", "rank", "annotated type", "annotated shape"],
)
def test_what_is_refused_in_tests(call, message):
    with pytest.raises(Exception, match=message):
        call()


def test_what_tests_start_is_strict_too():
    assert os.environ["JAX_NUMPY_DTYPE_PROMOTION"] == "strict"
    assert os.environ["JAX_NUMPY_RANK_PROMOTION"] == "raise"


def config(scheme: str) -> AttentionConfig:
    return AttentionConfig(scheme, 8, 8, sparse=SparsePattern(4, 1, 2) if scheme == "sparse" else None)


def gradients(scheme: str, dtype):
    """Of attention with a window, padding and rows that see nothing, as a function of arrays, and these."""
    mesh = make_mesh(**SCHEMES[scheme])
    arrays = [jax.random.normal(jax.random.key(n), (2, 21, heads, 8), dtype) for n, heads in enumerate((4, 2, 2))]
    position = jnp.tile(jnp.arange(21, dtype=jnp.int32), (2, 1))
    mask = Mask.causal(
        position, jnp.where(position < 3, jnp.int32(-1), jnp.int32(0)), None if scheme == "sparse" else 5
    )

    def loss(q, k, v):
        out = attention(q, k, v, mask, config=config(scheme), mesh=mesh)
        return (out.astype(jnp.float32) ** 2).sum() + decode_attention(q, k, v, mask, mesh=mesh).sum(dtype=jnp.float32)

    return jax.grad(loss, argnums=(0, 1, 2)), arrays


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_nothing_is_promoted(scheme, dtype):
    """float64: where JAX counts in 64 bits too."""
    with jax.enable_x64(dtype == "float64"):
        function, arrays = gradients(scheme, dtype)
        jax.eval_shape(function, *arrays)


@pytest.mark.parametrize("scheme", ["blockwise", "ring"])
def test_nothing_comes_out_that_is_no_number(scheme):
    function, arrays = gradients(scheme, jnp.bfloat16)
    assert all(jnp.isfinite(x).all() for x in function(*arrays))


@pytest.mark.parametrize(
    ("scheme", "remat"),
    [
        ("blockwise", "none"),
        ("sparse", "attention"),
        ("hybrid", "attention"),
        pytest.param("blockwise", "attention", marks=pytest.mark.slow),
        pytest.param("sparse", "none", marks=pytest.mark.slow),
        pytest.param("hybrid", "none", marks=pytest.mark.slow),
    ],
)
def test_nothing_is_promoted_in_a_model(scheme, remat):
    mesh = make_mesh(**SCHEMES[scheme])
    shape = TransformerConfig(
        width=16,
        layers=2,
        heads=4,
        kv_heads=2,
        attention=config(scheme),
        compute_type="bfloat16",
        feed_forward_tile=4,
        remat=remat,
        fsdp=remat == "attention",
    )
    training = Training(LanguageModelConfig(16, shape, loss_tile=4), mesh=mesh, accumulate=2)
    tokens, targets = laid_out(np.zeros((4, 25), np.int32), mesh=mesh)
    jax.eval_shape(training.step, jax.eval_shape(training.init), tokens, targets)
    model = Transformer(shape, rngs=nnx.Rngs(0))

    def decode(x):
        position = jnp.tile(jnp.arange(24, dtype=jnp.int32), (2, 1))
        _, cache = model.prefill(x[:, :20], Mask.causal(position[:, :20]), capacity=24, mesh=mesh)
        return model.decode(x[:, 20:], position[:, 20:], jnp.zeros_like(position[:, 20:]), cache, mesh=mesh)

    jax.eval_shape(decode, jnp.ones((2, 24, 16)))
