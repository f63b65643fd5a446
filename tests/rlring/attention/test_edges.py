"""Masks at their edges, in any scheme: single tokens, other types, the ends of int32, and what is no mask."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlring.attention import AttentionConfig, Mask, attention, decode_attention
from rlring.attention.blocks import Blocks
from rlring.attention.kernel import local_attention
from rlring.attention.kernels.splash import SplashKernel
from rlring.errors import UsageError
from rlring.mesh import make_mesh

MESHES = {
    "ring": {"ring": 2},
    "all_gather": {"ring": 4},
    "hybrid": {"ring": 2, "ulysses": 2},
    "ulysses": {"ulysses": 2},
}
LOW, HIGH = -(2**31), 2**31 - 1


def inputs(queries: int, keys: int):
    shapes = [(2, queries, 4, 8), (2, keys, 4, 8), (2, keys, 4, 8)]
    return [jax.random.normal(jax.random.key(n), shape) for n, shape in enumerate(shapes)]


def zeros(length: int):
    return jnp.zeros((2, length), jnp.int32)


def run(scheme, q, k, v, mask):
    """Attention as it is called inside of somebody's program, to which the mask is a constant."""
    if scheme == "splash":
        kernel = SplashKernel(Blocks(128, 128, 2**20), interpret=True)
        return jax.jit(lambda q, k, v: local_attention(q, k, v, jax.tree.map(jnp.asarray, mask), kernel))(q, k, v)
    config, mesh = AttentionConfig(scheme, 2, 2), make_mesh(**MESHES[scheme]) if scheme in MESHES else None
    return jax.jit(lambda q, k, v: attention(q, k, v, mask, config=config, mesh=mesh))(q, k, v)


@pytest.mark.parametrize("scheme", MESHES)
@pytest.mark.parametrize(("queries", "keys"), [(2, 1), (3, 3)])
def test_positions_and_segments_may_be_the_same_array(scheme, queries, keys):
    """Then XLA pads it once for both: a token that is not there was seen."""
    q, k, v = inputs(queries, keys)
    mask = Mask(zeros(queries), zeros(keys), zeros(queries), zeros(keys))
    np.testing.assert_allclose(run(scheme, q, k, v, mask), run("dense", q, k, v, mask), atol=1e-6)


@pytest.mark.parametrize("mesh", [{"ring": 2}, {"ring": 2, "ulysses": 2}], ids=str)
def test_decoding_over_a_single_key(mesh):
    q, k, v = inputs(2, 1)
    mask = Mask(zeros(2), zeros(1), zeros(2), zeros(1))
    got = jax.jit(lambda q, k, v: decode_attention(q, k, v, mask, mesh=make_mesh(**mesh)))(q, k, v)
    np.testing.assert_allclose(got, run("dense", q, k, v, mask), atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint8, jnp.int16, jnp.uint16, np.int64, np.uint64])
def test_whole_numbers_of_any_size(dtype):
    """Unsigned, a key ahead was far behind."""
    q, k, v = inputs(6, 6)
    position = np.tile(np.arange(6), (2, 1))
    segment = np.zeros_like(position, dtype)
    expected = run("dense", q, k, v, Mask.full(jnp.asarray(position, jnp.int32), window=2))
    mask = Mask.full(position.astype(dtype), segment, window=2)
    got = attention(q, k, v, mask, config=AttentionConfig("blockwise"))
    np.testing.assert_allclose(got, expected, atol=1e-6)
    np.testing.assert_allclose(decode_attention(q, k, v, mask), expected, atol=1e-6)


@pytest.mark.parametrize("dtype", ["uint32", "float32", "bool", "int64"])
@pytest.mark.parametrize("name", ["k_position", "q_segment"])
def test_other_types_are_refused(dtype, name):
    q, k, v = inputs(1, 1)
    wrong = np.full((2, 1), 2**31, dtype) if "int64" in dtype else jnp.zeros((2, 1), dtype)
    mask = replace(Mask.causal(zeros(1)), **{name: wrong})
    message = rf"the mask's {name} is an array of whole numbers that int32 holds; got {dtype}. Cast it with .astype"
    for attend in (decode_attention, lambda *x: attention(*x, config=AttentionConfig())):
        with pytest.raises(UsageError, match=message):
            attend(q, k, v, mask)


def test_what_is_no_mask():
    q, k, v = inputs(2, 2)
    for mask, got in ((None, "None"), (jnp.ones((2, 2)), "ArrayImpl")):
        with pytest.raises(UsageError, match=rf"needs an rlring.Mask; got {got}. Where every token sees .* Mask.full"):
            attention(q, k, v, mask, config=AttentionConfig())
    with pytest.raises(UsageError, match=r"the mask's k_position is an array .*; got a list. Cast it"):
        attention(q, k, v, replace(Mask.causal(zeros(2)), k_position=[[0, 1]]), config=AttentionConfig())


def test_what_is_no_window():
    for window, got in ((2.0, "2.0"), (True, "True"), ("4", "'4'")):
        with pytest.raises(UsageError, match=rf"how many tokens a query looks back, .* one whole number.*; got {got}"):
            Mask.causal(zeros(2), window=window)
    for window, got in (((3, -1), "3, -1"), ((1, 2, 3), "1, 2, 3"), ((2.0, 1), "2.0, 1"), ((True, None), "True, None")):
        with pytest.raises(UsageError, match=rf"a window \(left, right\) is how many tokens .*; got \({got}\)"):
            Mask.full(zeros(2), window=window)
    with pytest.raises(UsageError, match=r"known when the program is compiled, or a pair .*; got a .*Tracer. Make it"):
        jax.jit(lambda window: Mask.causal(zeros(2), window=window))(3)
    with pytest.raises(UsageError, match=r"is_causal is True or False when the program is compiled; got a .*Tracer"):
        jax.jit(lambda x: Mask(*[zeros(2)] * 4, is_causal=x))(True)
    with pytest.raises(UsageError, match=r"at most 2\*\*31 - 1; got window=2147483648. Use None for no window"):
        Mask.causal(zeros(2), window=2**31)
    assert Mask.causal(zeros(2), window=np.int64(3)).window == 3


@pytest.mark.parametrize("scheme", ["blockwise", "splash"])
@pytest.mark.parametrize("is_causal", [True, False])
def test_positions_at_the_ends_of_int32(scheme, is_causal):
    """Two of them may be further apart than int32 counts."""
    position = np.array([[LOW, LOW + 1, LOW + 2, -5, 0, 3, HIGH - 1, HIGH], [LOW, HIGH, -1, 1, 0, 2, 3, 4]])
    segment = np.array([[HIGH] * 8, [0, 0, 0, 0, 0, 0, -1, HIGH]])
    back = position[:, :, None] - position[:, None, :]
    for window in (3, HIGH):
        visible = (back < window) & (segment[:, :, None] == segment[:, None, :]) & (segment[:, :, None] >= 0)
        visible &= (back >= 0) | (not is_causal)
        q, k, v = inputs(8, 8)
        scores = jnp.where(visible[:, None], jnp.einsum("btnh,bsnh->bnts", q, k) / 8**0.5, -jnp.inf)
        weights = jnp.where(visible[:, None], jax.nn.softmax(scores, -1), 0.0)
        mask = Mask(*(x.astype(np.int32) for x in (position, position, segment, segment)), is_causal, window)
        expected = jnp.einsum("bnts,bsnh->btnh", weights, v)
        np.testing.assert_allclose(run(scheme, q, k, v, mask), expected, atol=1e-6)


@pytest.mark.parametrize("scheme", ["dense", "blockwise", *MESHES])
@pytest.mark.parametrize(("batch", "queries", "keys"), [(0, 3, 3), (2, 0, 3), (2, 3, 0)])
def test_nothing_to_attend_to(scheme, batch, queries, keys):
    q, k, v = (x[:batch] for x in inputs(queries, keys))
    mask = Mask(zeros(queries)[:batch], zeros(keys)[:batch], zeros(queries)[:batch], zeros(keys)[:batch])
    mesh = make_mesh(**MESHES[scheme]) if scheme in MESHES else None
    for attend in (partial(attention, config=AttentionConfig(scheme)), decode_attention):

        def loss(q, k, v, attend=attend):
            out = attend(q, k, v, mask, mesh=mesh)
            return out.sum(), out

        gradients, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
        for got, like in zip((out, *gradients), (q, q, k, v), strict=True):
            np.testing.assert_array_equal(got, np.zeros(like.shape))
