"""Beyond the gradient: Hessian-vector products and forward mode, through every scheme."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlring.attention import AttentionConfig, Mask, SparsePattern, attention
from rlring.attention.ring_transport import Transport
from rlring.errors import UsageError
from rlring.mesh import make_mesh

BLOCKS = {"block_q": 6, "block_k": 5}
SPARSE = {"sparse": SparsePattern(block=4, local_blocks=2, stride=1)}  # sees all
CASES = {
    "blockwise": ("blockwise", {}, {}),
    "ring": ("ring", {"ring": 4}, {}),
    "ring of a GPU": ("ring", {"ring": 4}, {"transport": Transport.of("gpu")}),
    "short ring of a GPU": ("ring", {"ring": 2}, {"transport": Transport.of("gpu")}),
    "ring of a TPU": ("ring", {"ring": 4}, {"transport": Transport.of("tpu")}),
    "all_gather": ("all_gather", {"ring": 4}, {}),
    "hybrid": ("hybrid", {"ring": 2, "ulysses": 2}, {}),
    "sparse": ("sparse", {}, SPARSE),
}
QUICK = ("short ring of a GPU", "blockwise")
random = np.random.default_rng(0)


def inputs(kind: str) -> dict[str, np.ndarray]:
    shapes = {"q": (2, 30, 4, 8), "k": (2, 30, 2, 8), "v": (2, 30, 2, 8), "sinks": (4,)}
    return {name: random.normal(size=shape).astype(kind) for name, shape in shapes.items()}


def loss(x, config, mesh=None, window=9):
    position = jnp.tile(jnp.arange(30, dtype=jnp.int32), (2, 1))
    mask = Mask.causal(position, position // 13, window)
    out, lse = attention(mask=mask, config=config, mesh=mesh, soft_cap=2.0, return_lse=True, **x)
    return (jnp.sin(out) * out).sum() + jnp.cos(lse).sum()


def expected(of, x, tangents, window):
    """In float64, by the definition."""
    with jax.enable_x64(True):
        exact = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), (x, tangents))
        return jax.tree.map(np.asarray, of(AttentionConfig("dense"), None, window)(*exact))


def check(of, name: str, **settings):
    scheme, mesh, more = CASES[name]
    config = AttentionConfig(scheme, **BLOCKS, **more, **settings)
    x, tangents = inputs("float32"), inputs("float32")
    window = 9 if config.sparse is None else None  # a pattern takes none
    got = of(config, make_mesh(**mesh), window)(x, tangents)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected(of, x, tangents, window)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * np.abs(b).max())


def cases(quick=QUICK):
    return [pytest.param(name, marks=[] if name in quick else pytest.mark.slow) for name in CASES]


@pytest.mark.parametrize("name", cases())
def test_hessian_vector_products(name):
    def product(config, mesh, window):
        gradient = jax.grad(partial(loss, config=config, mesh=mesh, window=window))
        return jax.jit(lambda x, tangents: jax.jvp(gradient, (x,), (tangents,))[1])

    check(product, name)


@pytest.mark.parametrize("name", cases(quick=("blockwise",)))
def test_forward_mode(name):
    def derivative(config, mesh, window):
        of = partial(loss, config=config, mesh=mesh, window=window)
        return jax.jit(lambda x, tangents: jax.jvp(of, (x,), (tangents,)))

    check(derivative, name, forward_mode=True)


@pytest.mark.parametrize("length", [4, 30], ids=["one block", "many blocks"])
def test_forward_mode_has_no_reverse_pass(length):
    """Neither of one block nor of many; a column of a Jacobian by vmap has none."""
    q, position = jnp.ones((1, length, 1, 2)), jnp.arange(length, dtype=jnp.int32)[None]
    config = AttentionConfig("blockwise", forward_mode=True, **BLOCKS)

    def of(q):
        return attention(q, q, q, Mask.causal(position), config=config).sum()

    with pytest.raises(UsageError, match=r"forward_mode=True is differentiated by jax.jvp .*; got jax.grad or"):
        jax.jit(jax.grad(of))(q)
    if length == 4:
        reverse = jax.grad(lambda q: attention(q, q, q, Mask.causal(position), config=AttentionConfig()).sum())(q)
        np.testing.assert_allclose(jax.jit(jax.jacfwd(of))(q), reverse, atol=1e-6)
