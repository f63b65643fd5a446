"""softmax.py: merging parts is adding sets of keys, in any order and at any scale."""

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from rlring.attention.softmax import Partial, merge, nothing


def part(scores: np.ndarray, values: np.ndarray) -> Partial:
    """Attention of one head over some keys in float64, by the definition."""
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    out = weights @ values / weights.sum(-1, keepdims=True)
    lse = np.log(weights.sum(-1)) + scores.max(-1)
    return Partial(jnp.asarray(out, jnp.float32)[None, :, None], jnp.asarray(lse, jnp.float32)[None, None])


@settings(max_examples=50, deadline=None)
@given(st.permutations(range(4)), st.integers(0, 2**31), st.sampled_from([1.0, 30.0, 300.0]))
def test_merge_is_order_free_and_exact(order, seed, scale):
    rng = np.random.default_rng(seed)
    scores, values = scale * rng.normal(size=(5, 12)), rng.normal(size=(12, 3))
    parts = [part(scores[:, 3 * n : 3 * n + 3], values[3 * n : 3 * n + 3]) for n in range(4)]
    total = nothing(parts[0].out)
    for n in order:
        total = merge(total, parts[n])
    expected = part(scores, values)
    np.testing.assert_allclose(total.out, expected.out, atol=1e-5 * max(1.0, scale / 10))
    np.testing.assert_allclose(total.lse, expected.lse, rtol=1e-6, atol=1e-5)


def test_nothing_is_neutral():
    empty = nothing(jnp.ones((1, 2, 1, 3)))
    np.testing.assert_array_equal(merge(empty, empty).out, np.zeros((1, 2, 1, 3)))
    np.testing.assert_array_equal(merge(empty, empty).lse, [[[-np.inf, -np.inf]]])
    some = Partial(jnp.ones((1, 2, 1, 3)), jnp.array([[[0.5, -100.0]]]))
    for merged in (merge(some, empty), merge(empty, some)):
        np.testing.assert_array_equal(merged.out, some.out)
        np.testing.assert_array_equal(merged.lse, some.lse)
