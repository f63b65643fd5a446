"""softmax.py and exponential.py: merging parts is adding sets of keys, in any order and at any scale."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlring.attention.exponential import power_of_two
from rlring.attention.softmax import PartialAttention, merge, nothing


def part(scores: np.ndarray, values: np.ndarray) -> PartialAttention:
    """Attention of one head over some keys in float64, by the definition."""
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    out = weights @ values / weights.sum(-1, keepdims=True)
    lse = np.log(weights.sum(-1)) + scores.max(-1)
    return PartialAttention.of(jnp.asarray(out, jnp.float32)[None, :, None], jnp.asarray(lse, jnp.float32)[None, None])


@settings(max_examples=50, deadline=None)
@given(st.permutations(range(4)), st.integers(0, 2**31), st.sampled_from([1.0, 30.0, 300.0]))
def test_merge_is_order_free_and_exact(order, seed, scale):
    rng = np.random.default_rng(seed)
    scores, values = scale * rng.normal(size=(5, 12)), rng.normal(size=(12, 3))
    parts = [part(scores[:, 3 * n : 3 * n + 3], values[3 * n : 3 * n + 3]) for n in range(4)]
    total = nothing(parts[0].out, parts[0].out)
    for n in order:
        total = merge(total, parts[n])
    found, expected = total.whole(), part(scores, values).whole()
    np.testing.assert_allclose(found.out, expected.out, atol=1e-5 * max(1.0, scale / 10))
    np.testing.assert_allclose(found.lse, expected.lse, rtol=1e-6, atol=1e-5)


def test_nothing_is_neutral():
    empty = nothing(jnp.ones((1, 2, 1, 3)), jnp.ones((1, 2, 1, 3)))
    np.testing.assert_array_equal(merge(empty, empty).whole().out, np.zeros((1, 2, 1, 3)))
    np.testing.assert_array_equal(merge(empty, empty).whole().lse, [[[-np.inf, -np.inf]]])
    some = PartialAttention.of(jnp.ones((1, 2, 1, 3)), jnp.array([[[0.5, -100.0]]]))
    for merged in (merge(some, empty), merge(empty, some)):
        for a, b in zip(merged, some, strict=True):
            np.testing.assert_array_equal(a, b)


def test_power_of_two():
    x = jnp.asarray(np.random.default_rng(0).uniform(-120.0, 120.0, 100_000), jnp.float32)
    exact = 2 ** np.asarray(x, np.float64)
    np.testing.assert_allclose(np.asarray(jax.jit(power_of_two)(x, jnp.zeros(())), np.float64), exact, rtol=1.3e-7)
    # Another reference gives the same bits, but for the exponent.
    small = jnp.asarray(np.random.default_rng(1).uniform(-20.0, 20.0, 1000), jnp.float32)
    for reference in (-60.0, 3.0, 60.0):
        expected = np.asarray(power_of_two(small, jnp.zeros(()))) * 2**-reference
        np.testing.assert_array_equal(power_of_two(small, jnp.full((), reference)), expected)


def test_power_of_two_at_the_ends_of_the_numbers():
    x = jnp.array([-jnp.inf, -1e30, -127.0, 0.0, 127.0, 128.0, 1e9, jnp.nan])
    expected = [0.0, 0.0, 0.0, 1.0, 2.0**127, np.inf, np.inf, np.nan]
    np.testing.assert_array_equal(power_of_two(x, jnp.zeros(8)), expected)
    np.testing.assert_array_equal(power_of_two(x + 50_000.0, jnp.full(8, 50_000.0))[2:5], expected[2:5])


@pytest.mark.parametrize("x64", [False, True])
def test_its_gradient(x64):
    with jax.enable_x64(x64):
        x = jnp.linspace(-3.0, 3.0, 7)
        got = jax.vmap(jax.grad(power_of_two), (0, None))(x, jnp.ones((), x.dtype))
        np.testing.assert_allclose(got, np.log(2) * 2 ** (np.asarray(x) - 1), rtol=1e-6)
