"""Rotary positions against float64, as far as int32 reaches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlring.positions import rotate

PLACES = [0, 1, 17, 4_095, 524_287, 67_108_863, 2**31 - 6, -1, -524_288]


def rotated(x: np.ndarray, position: np.ndarray, base: float, half: int) -> np.ndarray:
    """Su et al. 2021, equation 34, in float64."""
    angle = position[..., None, None] * base ** (-np.arange(half) / half)
    first, second, rest = np.split(x.astype(np.float64), [half, 2 * half], axis=-1)
    turn = np.cos(angle), np.sin(angle)
    return np.concatenate([first * turn[0] - second * turn[1], second * turn[0] + first * turn[1], rest], axis=-1)


@pytest.mark.parametrize("base", [100.0, 10_000.0, 5e6])
@pytest.mark.parametrize("fraction", [1.0, 0.5])
@pytest.mark.parametrize("length", [1, 9, 1_000])
def test_rotary_positions_equal_float64_at_every_distance(base, fraction, length):
    position = np.resize(np.array(PLACES, np.int32), (2, length))
    x = np.random.default_rng(0).normal(size=(2, length, 3, 32)).astype(np.float32)
    weight = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)

    @jax.jit
    def out_and_gradient(x):
        out, pull = jax.vjp(lambda x: rotate(x, jnp.asarray(position), base, fraction), x)
        return out, pull(jnp.asarray(weight))[0]

    out, gradient = out_and_gradient(jnp.asarray(x))
    half = int(16 * fraction)
    np.testing.assert_allclose(out, rotated(x, position, base, half), atol=1e-5)
    np.testing.assert_allclose(gradient, rotated(weight, -position.astype(np.int64), base, half), atol=1e-5)


def test_scores_depend_on_the_distance_alone():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 9, 1, 64))
    first = jnp.array([PLACES])

    def scores(ahead):
        return jnp.sum(rotate(q, first + ahead, 1e4) * rotate(k, first, 1e4), -1)

    there = jnp.sum(rotate(q, jnp.full_like(first, 5), 1e4) * rotate(k, jnp.zeros_like(first), 1e4), -1)
    np.testing.assert_allclose(scores(5), there, atol=1e-4)
