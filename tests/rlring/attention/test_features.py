"""What attention() can do beside its definition, in every scheme: against an independent reference in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlring.attention import AttentionConfig, Mask, SparsePattern, attention, decode_attention
from rlring.errors import UsageError
from rlring.mesh import make_mesh
from tests.rlring.attention.test_contract import UNLISTED

ROWS, LENGTH, HEADS, KV_HEADS, SIZE = 2, 48, 4, 2, 8
BLOCKS = {"block_q": 6, "block_k": 5, "scores": 130}  # divide no length; two sequences do not fit at once
RATE = 0.3
random = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return random.normal(size=shape).astype(np.float32)


SINKS, BIAS, SLOPES = normal(HEADS), normal(HEADS, LENGTH, LENGTH), np.abs(normal(HEADS)) / 10
FEATURES = {
    "scale": {"scale": 0.7},
    "no scale": {"scale": 0.0},
    "negative scale": {"scale": -0.5},
    "soft cap": {"soft_cap": 1.5},
    "sinks": {"sinks": SINKS},
    "slopes": {"bias": SLOPES},
    "bias": {"bias": BIAS},
    "dropout": {"dropout": RATE},
    "size of values": {"size": 5},
    "two-sided window": {"window": (7, 3)},
    "all, bias": {"scale": 0.6, "soft_cap": 2.0, "sinks": SINKS, "bias": BIAS, "dropout": RATE, "size": 12},
    "all, slopes": {"scale": 0.6, "soft_cap": 2.0, "sinks": SINKS, "bias": SLOPES, "dropout": RATE, "window": (7, 3)},
}
SCHEMES = {
    "dense": ("dense", {}),
    "blockwise": ("blockwise", {}),
    "ring of 4": ("ring", {"ring": 4}),
    "data and ring": ("ring", {"data": 2, "ring": 2}),
    "all_gather": ("all_gather", {"ring": 2, "ulysses": 2}),
    "ulysses of 4": ("ulysses", {"ulysses": 4}),
    "hybrid": ("hybrid", {"data": 2, "ring": 2, "ulysses": 2}),
    "sparse": ("sparse", {}),
    "sparse, ulysses": ("sparse", {"ulysses": 2}),
    **{name: (name, mesh) for name, mesh in UNLISTED.items()},
}
QUICK = [("all, bias", "blockwise"), ("all, bias", "data and ring")]
QUICK += [("all, slopes", "blockwise"), ("negative scale", "blockwise"), ("no scale", "blockwise")]
KEY = jax.random.key(3)


def positions(rows: int = ROWS, length: int = LENGTH):
    return jnp.tile(jnp.arange(length, dtype=jnp.int32), (rows, 1))


def mask_of(window) -> Mask:
    """Packed sequences, and one with padding; causal where there is no window."""
    position = positions()
    segment = jnp.stack([position[0] // 20, jnp.where(position[1] < 40, 0, -1)])
    return Mask(position, position, segment, segment, window is None, window)


def reference(q, k, v, mask: Mask, kept, *, scale=None, soft_cap=None, sinks=None, bias=None, window=None):
    """out and lse, written down from the definitions."""
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], 2) for x in (k, v))
    logits = jnp.einsum("btnh,bsnh->bnts", q, k) * (q.shape[3] ** -0.5 if scale is None else scale)
    logits = logits if soft_cap is None else soft_cap * jnp.tanh(logits / soft_cap)
    ahead = (mask.k_position[:, None] - mask.q_position[:, :, None])[:, None]
    if bias is not None:
        logits += bias[None] if bias.ndim == 3 else -bias[None, :, None, None] * abs(ahead).astype(bias.dtype)
    segments = mask.q_segment[:, None, :, None], mask.k_segment[:, None, None]
    seen = (segments[0] == segments[1]) & (segments[0] >= 0)
    seen &= (ahead <= 0) if window is None else (ahead >= -window[0]) & (ahead <= window[1])
    weights = jnp.where(seen, jnp.exp(logits), 0.0)
    total = weights.sum(-1) + (0.0 if sinks is None else jnp.exp(sinks)[None, :, None])
    weights /= jnp.where(total == 0, 1.0, total)[..., None]
    if kept is not None:
        weights = jnp.where(kept, weights / (1 - RATE), 0.0)
    lse = jnp.log(jnp.where(total == 0, 1.0, total))
    return jnp.einsum("bnts,bsnh->btnh", weights, v), jnp.swapaxes(lse, 1, 2)


@partial(jax.jit, static_argnames="attend")
def run(attend, arrays, gradients):
    results, pull = jax.vjp(attend, arrays)
    return results, pull(gradients)[0]


def kept_by(key, mesh=None, scheme="dense", rows: int = ROWS) -> np.ndarray:
    """[B, N, T, S]: which weights dropout leaves, seen in values that are the unit vectors."""
    q, k = jnp.zeros((rows, LENGTH, HEADS, SIZE)), jnp.zeros((rows, LENGTH, KV_HEADS, SIZE))
    units = jnp.broadcast_to(jnp.eye(LENGTH)[None, :, None], (rows, LENGTH, KV_HEADS, LENGTH))
    config, mask = AttentionConfig(scheme, **BLOCKS), Mask.full(positions(rows))
    out = attention(q, k, units, mask, config=config, mesh=mesh, dropout=(RATE, key))
    return np.asarray(jnp.swapaxes(out, 1, 2) > 0)


def check(feature: str, scheme: str):
    settings = dict(FEATURES[feature])
    size, window, rate = (settings.pop(name, None) for name in ("size", "window", "dropout"))
    learnt = {name: settings.pop(name) for name in ("sinks", "bias") if name in settings}
    shapes = {"q": (HEADS, SIZE), "k": (KV_HEADS, SIZE), "v": (KV_HEADS, size or SIZE)}
    arrays = {name: normal(ROWS, LENGTH, *shape) for name, shape in shapes.items()} | learnt
    mask, kept = mask_of(window), kept_by(KEY) if rate else None
    d_out, d_lse = normal(ROWS, LENGTH, HEADS, size or SIZE), normal(ROWS, LENGTH, HEADS)
    d_lse = np.where((np.asarray(mask.q_segment) >= 0)[..., None], d_lse, 0)
    with jax.enable_x64(True):
        exact = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), arrays)
        of = partial(reference, mask=mask, kept=kept, window=window, **settings)
        (out, lse), expected = run(lambda x: of(**x), exact, (jnp.float64(d_out), jnp.float64(d_lse)))
    name, mesh = SCHEMES[scheme]
    pattern = SparsePattern(block=4, local_blocks=2, stride=1) if name == "sparse" else None  # sees all
    config = AttentionConfig(name, sparse=pattern, **BLOCKS)
    settings |= {"config": config, "mesh": make_mesh(**mesh), "return_lse": True}
    settings |= {"dropout": (RATE, KEY)} if rate else {}
    got, gradients = run(lambda x: attention(mask=mask, **x, **settings), arrays, (d_out, d_lse))
    pairs = {"out": (got[0], out), "lse": (jnp.where(jnp.isfinite(got[1]), got[1], 0), lse)}
    pairs |= {f"d_{name}": (gradients[name], expected[name]) for name in arrays}
    for part, (a, b) in pairs.items():
        assert np.isfinite(a).all(), part
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(np.abs(b).max(), 1e-3), err_msg=part)


def lacks(feature: str, scheme: str) -> bool:
    return scheme.startswith("sparse") and (
        "window" in FEATURES[feature] or np.ndim(FEATURES[feature].get("bias")) == 3
    )


@pytest.mark.parametrize(
    ("feature", "scheme"),
    [
        pytest.param(feature, scheme, marks=[] if (feature, scheme) in QUICK else pytest.mark.slow)
        for feature in FEATURES
        for scheme in SCHEMES
        if not lacks(feature, scheme)
    ],
)
def test_every_feature(feature, scheme):
    check(feature, scheme)


@pytest.mark.parametrize(
    ("scheme", "mesh"),
    [
        pytest.param("ring", {"ring": 4}, marks=pytest.mark.slow),
        ("hybrid", {"data": 2, "ring": 2, "ulysses": 2}),
        ("all_gather", {"ring": 4}),
    ],
    ids=str,
)
def test_dropout_is_the_same_on_every_mesh(scheme, mesh):
    one = kept_by(KEY, scheme="blockwise")
    np.testing.assert_array_equal(one, kept_by(KEY, make_mesh(**mesh), scheme))
    # 18,432 weights: five standard deviations; and no two heads, sequences or keys drop the same.
    assert abs(one.mean() - (1 - RATE)) < 5 * (RATE * (1 - RATE) / one.size) ** 0.5
    flat = one.reshape(ROWS * HEADS, -1)
    assert len(np.unique(flat, axis=0)) == len(flat)
    assert (one != kept_by(jax.random.key(4), scheme="blockwise")).any()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_as_good_as_dense(dtype):
    """Sinks and a soft cap, keys with a component in common: 2x of what dense attention itself is off."""
    arrays = {name: jnp.asarray(normal(ROWS, LENGTH, n, SIZE), dtype) for name, n in zip("qkv", (4, 2, 2), strict=True)}
    arrays["k"] = arrays["k"].at[..., 0].add(30)
    arrays["sinks"] = jnp.asarray(SINKS)
    d_out, mask = normal(ROWS, LENGTH, HEADS, SIZE), mask_of(None)
    settings = {"mask": mask, "soft_cap": 20.0}

    def results(config, arrays, d_out, mesh=None):
        attend = partial(attention, config=config, mesh=mesh, **settings)
        out, gradients = run(lambda x: attend(**x), arrays, d_out)
        return {"out": out, **gradients}

    with jax.enable_x64(True):
        exact = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), arrays)
        expected = results(AttentionConfig("dense"), exact, jnp.float64(d_out.astype(dtype)))
        expected = jax.tree.map(np.asarray, expected)
    dense = results(AttentionConfig("dense"), arrays, jnp.asarray(d_out, dtype))
    got = results(AttentionConfig("ring", **BLOCKS), arrays, jnp.asarray(d_out, dtype), make_mesh(ring=4))
    for part, exact_part in expected.items():
        error, own = (np.abs(np.asarray(x[part], np.float64) - exact_part).max() for x in (got, dense))
        assert error <= 2 * own + 1e-7, part


@pytest.mark.parametrize("mesh", [None, {"ring": 4}, {"data": 2, "ring": 2, "ulysses": 2}], ids=str)
def test_decode(mesh):
    settings = {"scale": 0.6, "soft_cap": 2.0, "sinks": jnp.asarray(SINKS), "bias": jnp.asarray(BIAS[:, -5:])}
    q, k, v = normal(ROWS, 5, HEADS, SIZE), normal(ROWS, LENGTH, KV_HEADS, SIZE), normal(ROWS, LENGTH, KV_HEADS, 12)
    position = positions()
    zeros = jnp.zeros_like(position)
    mask = Mask(position[:, -5:], position, zeros[:, -5:], zeros)
    expected = reference(q, k, v, mask, None, **settings)
    decode = partial(decode_attention, mesh=make_mesh(**mesh) if mesh else None, return_lse=True, **settings)
    for a, b in zip(jax.jit(decode)(q, k, v, mask), expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale": float("nan")}, r"scale is one finite number, .*; got nan"),
        ({"soft_cap": 0.0}, r"soft_cap is greater than 0; got 0.0. Use None"),
        ({"sinks": jnp.zeros(3)}, r"sinks has one logit for each of the 4 query heads; got shape \(3,\)"),
        (
            {"bias": jnp.zeros((4, 48, 3))},
            r"bias is \[N, T, S\] = \(4, 48, 48\), or .*; got shape \(4, 48, 3\)",
        ),
        ({"dropout": 0.1}, r"dropout is a pair \(rate, key\): .*; got 0.1. Use None"),
        ({"dropout": (1.0, KEY)}, r"dropout is a pair .*; got 1.0. Use None"),
        ({"dropout": (0.1, None)}, r"dropout is a pair .*; got 0.1. Use None"),
        ({"dropout": (0.1, jax.random.split(KEY))}, r"dropout is a pair .* a key of jax.random"),
        ({"scale": True}, r"scale is one finite number, .*; got True"),
        ({"bias": jnp.ones((4, 48, 48), bool)}, r"bias is an array of real numbers; got bool. .* a Mask says"),
        ({"sinks": [0.0] * 4}, r"sinks is an array of real numbers; got a list"),
        ({"config": "ring"}, r"config is an instance of AttentionConfig; got 'ring'"),
        ({"axes": ("data", "ring")}, r"axes is an instance of MeshAxes; got a tuple"),
        ({"mesh": jax.devices()}, r"mesh is an instance of Mesh; got a list"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message):
    q = jnp.zeros((1, LENGTH, HEADS, SIZE))
    with pytest.raises(UsageError, match=message):
        attention(q, q, q, Mask.causal(positions(1)), **({"config": AttentionConfig()} | arguments))


@pytest.mark.parametrize(("shape", "message"), [((1, LENGTH, 2, 8), "got int32. Cast"), ((1, LENGTH, 2, 0), "size of")])
def test_arrays_that_are_no_heads(shape, message):
    q = jnp.zeros(shape, jnp.int32 if shape[3] else jnp.float32)
    with pytest.raises(UsageError, match=message):
        attention(q, q, q, Mask.causal(positions(1)), config=AttentionConfig())


@pytest.mark.parametrize("scheme", ["blockwise", "dense"])
def test_no_sink_where_nothing_is_seen(scheme):
    """A sink of -inf is none."""
    q, nowhere = jnp.ones((1, 4, 2, 8)), Mask.causal(positions(1, 4), jnp.array([[-1, 0, 0, 0]], jnp.int32))
    config, sinks = AttentionConfig(scheme), jnp.full(2, -jnp.inf)
    out, lse = attention(q, q, q, nowhere, config=config, sinks=sinks, return_lse=True)
    without = attention(q, q, q, nowhere, config=config)
    np.testing.assert_array_equal(out, without)
    assert np.isneginf(lse[:, 0]).all()
    gradient = jax.grad(lambda sinks: attention(q, q, q, nowhere, config=config, sinks=sinks).sum())(jnp.zeros(2))
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("mesh", [None, {"ring": 2}], ids=str)
def test_a_bias_in_float64(mesh):
    with jax.enable_x64(True):
        q, bias = jnp.ones((1, 6, 2, 8)), jnp.asarray(BIAS[:2, :6, :6], jnp.float64)
        of = partial(attention, q, q, q, Mask.causal(positions(1, 6)), bias=bias)
        got = of(config=AttentionConfig("ring"), mesh=make_mesh(**mesh) if mesh else None)
        np.testing.assert_allclose(got, of(config=AttentionConfig("dense")), atol=1e-12)


def test_a_bias_does_not_go_with_a_pattern():
    q, config = jnp.zeros((1, LENGTH, HEADS, SIZE)), AttentionConfig("sparse", sparse=SparsePattern())
    with pytest.raises(UsageError, match=r"'sparse' takes no bias \[N, T, S\]"):
        attention(q, q, q, Mask.causal(positions(1)), config=config, bias=jnp.asarray(BIAS))


@pytest.mark.parametrize("scheme", ["dense", "blockwise"])
def test_slopes_of_positions_that_are_far_apart(scheme):
    """Farther than float32 counts one by one, and than int32 does: a query and a key whose logit is the bias alone."""
    distance = np.array([2**24 + 1, 2**32 - 1])
    q_position, k_position = np.array([[2**24 + 1], [2**31 - 1]], np.int32), np.array([[0], [-(2**31)]], np.int32)
    segment = np.zeros_like(q_position)
    mask = Mask(q_position, k_position, segment, segment)

    def lse(slopes):
        nothing = jnp.zeros((2, 1, 1, 2))
        return attention(nothing, nothing, nothing, mask, config=AttentionConfig(scheme), bias=slopes, return_lse=True)[
            1
        ]

    with jax.enable_x64(True):
        found, back = jax.vjp(lse, jnp.array([0.25]))
        np.testing.assert_allclose(found[:, 0, 0], -0.25 * distance, rtol=1e-15)
        np.testing.assert_allclose(back(jnp.ones_like(found))[0], -distance.sum(), rtol=1e-15)


def test_the_lse_of_no_keys_has_the_type_of_any_other():
    with jax.enable_x64(True):
        for dtype in (jnp.float64, jnp.float32, jnp.bfloat16):
            for keys in (0, 1):
                q, k = jnp.zeros((1, 2, 1, 2), dtype), jnp.zeros((1, keys, 1, 2), dtype)
                mask = Mask(*(jnp.zeros((1, length), jnp.int32) for length in (2, keys, 2, keys)))
                _, lse = attention(q, k, k, mask, config=AttentionConfig("dense"), return_lse=True)
                assert lse.dtype == (jnp.float64 if dtype == jnp.float64 else jnp.float32)
