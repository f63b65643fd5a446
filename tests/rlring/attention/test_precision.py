"""Digits: no scheme loses more than dense attention does, whatever keys share and however large the scores are.

And numbers that nobody may see: NaN stays where it is.
"""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from rlring.attention import AttentionConfig, Mask, SparsePattern, attention, decode_attention
from rlring.attention.ring_transport import Transport
from rlring.mesh import make_mesh
from rlring.transformer import Transformer, TransformerConfig

PARTS = ("out", "dq", "dk", "dv")
CASES = {
    "blockwise": (AttentionConfig("blockwise"), {}),
    "ring of 8": (AttentionConfig("ring"), {"ring": 8}),
    "ring of 4, as on a GPU": (AttentionConfig("ring", transport=Transport.of("gpu")), {"ring": 4}),
    "all_gather": (AttentionConfig("all_gather"), {"ring": 8}),
    "ulysses": (AttentionConfig("ulysses"), {"ulysses": 2}),
    "hybrid": (AttentionConfig("hybrid"), {"ring": 2, "ulysses": 2}),
    "S2 that sees everything": (AttentionConfig("sparse", sparse=SparsePattern(local_blocks=2, stride=1)), {}),
}
QUICK = ("blockwise", "ring of 8")


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


SCHEMES = [case if case in QUICK else slow(case) for case in CASES]
LENGTH, HEADS, SIZE = 256, 2, 64
DENSE = AttentionConfig("dense")


def arrays(length: int = LENGTH, dtype=jnp.float32, seed: int = 0) -> list:
    """q, k, v and the gradient of the out."""
    return [
        jax.random.normal(key, (1, length, HEADS, SIZE)).astype(dtype)
        for key in jax.random.split(jax.random.key(seed), 4)
    ]


@cache
def compiled(config: AttentionConfig, mesh: tuple, length: int, is_causal: bool):
    """out, dq, dk, dv in the caller's own jit, with the mask closed over."""
    mask = replace(Mask.causal(jnp.arange(length, dtype=jnp.int32)[None]), is_causal=is_causal)
    mesh = make_mesh(**dict(mesh)) if mesh else None

    @jax.jit
    def run(q, k, v, d_out):
        out, pull = jax.vjp(lambda q, k, v: attention(q, k, v, mask, config=config, mesh=mesh), q, k, v)
        return (out, *pull(d_out))

    return run


def run(config: AttentionConfig, mesh: dict, inputs: list, is_causal: bool = True):
    return compiled(config, tuple(mesh.items()), inputs[0].shape[1], is_causal)(*inputs)


def exact(inputs: list, is_causal: bool = True):
    """The same in float64."""
    with jax.enable_x64(True):
        return run(DENSE, {}, [jnp.asarray(np.asarray(x, np.float64)) for x in inputs], is_causal)


def errors(got, expected) -> list[float]:
    """The greatest error of each part, of its greatest number; some are 0, as the dq of a single key."""
    pairs = [[np.asarray(x, np.float64) for x in pair] for pair in zip(got, expected, strict=True)]
    return [float(np.abs(a - b).max() / max(np.abs(b).max(), 0.1)) for a, b in pairs]


def check_half(config, mesh, inputs, is_causal=True):
    expected = exact(inputs, is_causal)
    got, dense = (errors(run(*how, inputs, is_causal), expected) for how in ((config, mesh), (DENSE, {})))
    rounding = float(jnp.finfo(inputs[0].dtype).eps) / 2  # of what is returned: dense may by chance do without
    for part, one, other in zip(PARTS, got, dense, strict=True):
        assert one <= 2 * max(other, rounding), part


@pytest.mark.parametrize(
    ("dtype", "case"),
    [
        ("bfloat16", "ring of 8"),
        ("float16", "blockwise"),
        slow("bfloat16", "blockwise"),
        *(slow("float16", case) for case in CASES if case != "blockwise"),
        *(slow("bfloat16", case) for case in CASES if case not in QUICK),
    ],
)
def test_what_keys_or_values_share_costs_no_digits(case, dtype):
    """A key bias changes no gradient of a query: it must not come back as an error (cudnn-frontend#744)."""
    for shared_by, offset in ((None, 0), ("k", 10), ("k", 100), ("k", 300), ("v", 30), ("v", 300), ("k and v", 300)):
        q, k, v, d_out = arrays(dtype=dtype)
        k = k.at[..., 5].add(offset) if shared_by in ("k", "k and v") else k
        v = v.at[..., 7].add(offset) if shared_by in ("v", "k and v") else v
        check_half(*CASES[case], [q, k, v, d_out], is_causal=offset != 100 or CASES[case][0].sparse is not None)


@pytest.mark.parametrize("mesh", [slow({"ring": 2}), {"ring": 4}, slow({"ring": 8})], ids=str)
@pytest.mark.parametrize("scale", [1.0, 50.0, 200.0])
def test_large_scores_on_any_ring(mesh, scale):
    """Scores to 2,500 and to 40,000."""
    q, k, v, d_out = arrays()
    # With all scores alike the weights are too: their digits are seen, not only which score is the greatest.
    even = [jnp.full_like(q, scale), jnp.full_like(k, scale / 8) + 1e-5 * k, v, d_out]
    for inputs in ([scale * q, scale * k, v, d_out], even):
        expected = exact(inputs)
        one = errors(run(AttentionConfig("blockwise"), {}, inputs), expected)
        for scheme in ("ring", "all_gather"):
            got = errors(run(AttentionConfig(scheme), mesh, inputs), expected)
            for part, a, b in zip(PARTS, got, one, strict=True):
                assert a <= 2 * max(b, 1e-6), (scheme, part)


def test_all_scores_are_40000():
    """One log-sum-exp in float32 would change every weight by 0.2 %."""
    _, _, v, d_out = arrays()
    inputs = [jnp.full((1, LENGTH, HEADS, SIZE), 200.0), jnp.full((1, LENGTH, HEADS, SIZE), 25.0), v, d_out]
    expected = exact(inputs)
    for config, mesh in (CASES["blockwise"], CASES["ring of 8"]):
        found = dict(zip(PARTS, errors(run(config, mesh, inputs), expected), strict=True))
        assert max(found[part] for part in ("out", "dk", "dv")) <= 2e-6  # dq is 0


@pytest.mark.slow
@settings(max_examples=30)
@given(
    length=st.sampled_from([1, 2, 3, 100, 1000]),
    dtype=st.sampled_from([jnp.bfloat16, jnp.float16]),
    case=st.sampled_from(QUICK),
    blocks=st.sampled_from([{}, {"block_q": 48, "block_k": 80}]),
    scale=st.sampled_from([0.1, 1.0, 3.0]),
    offset=st.integers(0, 300),
    channel=st.integers(0, SIZE - 1),
    seed=st.integers(0, 1000),
)
def test_digits(length, dtype, case, blocks, scale, offset, channel, seed):
    config, mesh = CASES[case]
    q, k, v, d_out = arrays(length, dtype, seed)
    check_half(replace(config, **blocks), mesh, [q * scale, k.at[..., channel].add(offset), v, d_out])


@pytest.mark.parametrize("score", [2e7, 1e8, 3e9, 1e30])
def test_scores_beyond_the_whole_numbers_of_float32(score):
    """Above 2**24 not every exponent is a number: what is relative to another still has to be."""
    _, _, v, d_out = arrays(64)
    q = jnp.full((1, 64, HEADS, SIZE), np.sqrt(score / SIZE**0.5), jnp.float32)
    inputs = [q, q, v, d_out]  # all scores alike
    expected = exact(inputs)
    for case in QUICK:
        config, mesh = CASES[case]
        found = dict(
            zip(PARTS, errors(run(replace(config, block_q=16, block_k=16), mesh, inputs), expected), strict=True)
        )
        assert max(found["out"], found["dv"]) <= 2e-6


@pytest.mark.slow
def test_half_precision_of_thousands():
    for dtype in (jnp.float16, jnp.bfloat16):
        _, _, v, d_out = arrays(64, dtype)
        q = jnp.full((1, 64, HEADS, SIZE), 6000.0, dtype)
        expected = exact([q, q, v, d_out])
        for case in QUICK:
            config, mesh = CASES[case]
            out = run(replace(config, block_q=16, block_k=16), mesh, [q, q, v, d_out])[0]
            assert errors([out], expected[:1])[0] <= 2 * float(jnp.finfo(dtype).eps)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32, jnp.bfloat16])
def test_with_64_bits_allowed(dtype):
    """float64 has all its digits, and other types are computed as ever."""
    with jax.enable_x64(True):
        inputs = [jnp.asarray(np.asarray(x, np.float64)).astype(dtype) for x in arrays()]
        expected, tolerance = run(DENSE, {}, inputs), {jnp.float64: 1e-13, jnp.float32: 1e-5}.get(dtype, 2e-2)
        for config, mesh in (CASES["blockwise"], CASES["ring of 8"]):
            got = run(replace(config, block_q=64, block_k=64), mesh, inputs)
            assert [x.dtype for x in got] == [dtype] * 4
            assert max(errors(got, expected)) <= tolerance

        def decode(q, k, v):
            mask = Mask.causal(jnp.arange(LENGTH, dtype=jnp.int32)[None])
            return (decode_attention(q, k, v, mask) * inputs[3]).sum()

        got = jax.grad(decode, (0, 1, 2))(*inputs[:3])
        assert max(errors(got, expected[1:])) <= tolerance


HIDDEN = np.arange(40, 44)  # places of tokens that are not numbers


@pytest.mark.parametrize("blocks", [{"block_q": 6, "block_k": 5}, slow({})], ids=str)
@pytest.mark.parametrize("case", ["dense", "blockwise", *(slow(case) for case in CASES if case != "blockwise")])
def test_nan_stays_where_it_is(case, blocks):
    """What a query may not see does not reach it, whatever it is; nor does it reach the gradients of what it sees."""
    config, mesh = CASES.get(case, (DENSE, {}))
    config, mesh = replace(config, **blocks), make_mesh(**mesh) if mesh else None

    @jax.jit
    def run(mask, q, k, v, d_out):
        out, pull = jax.vjp(lambda q, k, v: attention(q, k, v, mask, config=config, mesh=mesh), q, k, v)
        return (out, *pull(d_out))

    for why in ("padding", "later", "another segment"):
        check_nan_stays(run, why)


def check_nan_stays(run, why):
    length = 64
    position = jnp.arange(length, dtype=jnp.int32)[None]
    is_hidden = np.isin(np.arange(length), HIDDEN)
    segment = {"padding": np.where(is_hidden, -1, 0), "later": np.zeros(length), "another segment": is_hidden}[why]
    mask = Mask.causal(position, jnp.asarray(segment, jnp.int32)[None])
    visible = np.asarray(mask.visible()[0])
    sees = visible[:, HIDDEN].any(1)
    is_seen = visible[sees | is_hidden].any(0)  # keys that queries see which are NaN
    inputs = arrays(length)
    inputs[3] = inputs[3].at[:, sees].set(0.0)
    clean = run(mask, *(x.at[:, HIDDEN].set(0.0) for x in inputs))
    for wrong in (jnp.nan, jnp.inf):
        got = run(mask, *(x.at[:, HIDDEN].set(wrong) for x in inputs[:3]), inputs[3])
        for part, a, b in zip(PARTS, got, clean, strict=True):
            unaffected = ~(sees if part in ("out", "dq") else is_seen | is_hidden)
            np.testing.assert_allclose(a[:, unaffected], b[:, unaffected], rtol=0, atol=1e-5, err_msg=f"{part}, {why}")
        assert np.isnan(got[0][:, sees]).all(), why


@pytest.mark.parametrize("mesh", [None, {"ring": 4}], ids=str)
def test_nan_in_a_cache_stays_where_it_is(mesh):
    q, k, v, _ = arrays(64)
    mask = Mask.causal(jnp.arange(64, dtype=jnp.int32)[None])
    now = replace(mask, q_position=mask.q_position[:, 30:50], q_segment=mask.q_segment[:, 30:50])
    mesh = make_mesh(**mesh) if mesh else None
    clean, got = (
        decode_attention(q[:, 30:50], *(x.at[:, HIDDEN].set(wrong) for x in (k, v)), now, mesh=mesh)
        for wrong in (0.0, jnp.nan)
    )
    np.testing.assert_allclose(got[:, :10], clean[:, :10], atol=1e-6)
    assert np.isnan(got[:, 10:]).all()

    def loss(q, k, v):
        return decode_attention(q, k, v, now, mesh=mesh)[:, :10].sum()

    clean, got = (
        jax.grad(loss)(q[:, 30:50], *(x.at[:, HIDDEN].set(wrong) for x in (k, v)))[:, :10] for wrong in (0.0, jnp.nan)
    )
    np.testing.assert_allclose(got, clean, atol=1e-6)


@pytest.mark.parametrize("block", [8, 64])
def test_nan_in_the_gradient_of_the_out_is_seen(block):
    """It reaches the gradients of all keys that its query sees, and of no others."""
    q, k, v, d_out = arrays(64)
    got = run(AttentionConfig("blockwise", block_q=block, block_k=block), {}, [q, k, v, d_out.at[:, 9].set(jnp.nan)])
    for part in got[2:]:
        assert np.isnan(part[:, :10]).all()
        assert np.isfinite(part[:, 10:]).all()


def test_nan_in_the_padding_of_a_prompt_stays_there():
    model = Transformer(TransformerConfig(width=8, layers=2, heads=2), rngs=nnx.Rngs(0))
    position = jnp.arange(6, dtype=jnp.int32)[None]
    mask = Mask.causal(position, jnp.array([[0, 0, 0, 0, -1, -1]]))
    x, token = jnp.ones((1, 6, 8)), jnp.ones((1, 1, 8))
    zero = jnp.zeros((1, 1), jnp.int32)

    @jax.jit
    def after(wrong):
        return model.decode(token, zero + 4, zero, model.prefill(x.at[:, 4:].set(wrong), mask, capacity=10)[1])[0]

    np.testing.assert_allclose(after(jnp.nan), after(0.0), atol=1e-6)
