"""Intrinsic rewards of the collectors: losses, their gradients and what is paid, against float64 NumPy."""

import jax
import numpy as np
import pytest
from flax import nnx

from agents.explore.bonus import Sizes, Transitions
from agents.explore.config import BONUSES, made
from agents.explore.particles import Running

ROWS, OBSERVATION, ACTION, WIDTH = 32, 3, 2, 16


def bonus_of(algorithm: str, *overrides: str):
    config = made({"task": "walker-walk", "algorithm": algorithm}, "urlb", overrides)
    return BONUSES[algorithm](config.algorithm_settings, Sizes(OBSERVATION, ACTION, WIDTH), 1e-2)


def batch_of(bonus, seed: int = 0) -> Transitions:
    rng = np.random.default_rng(seed)
    skill = np.stack([bonus.draw_skill(rng) for _ in range(ROWS)])
    observation, action = rng.normal(size=(ROWS, OBSERVATION)), np.tanh(rng.normal(size=(ROWS, ACTION)))
    following = observation + 0.3 * rng.normal(size=observation.shape)
    fields = observation, action, rng.normal(size=ROWS), np.full(ROWS, 0.97), following, skill
    return Transitions(*(x.astype(np.float32) for x in fields))


def wide(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


# The reference: the equations of the modules, in NumPy. `w` are the weights of a bonus by name.


def mlp(w, x):
    for i in range(len(w["layers"])):
        x = (np.maximum(x, 0) if i else x) @ w["layers"][i]["kernel"] + w["layers"][i]["bias"]
    return x


def trunk(w, x):
    x = x @ w["linear"]["kernel"] + w["linear"]["bias"]
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return np.tanh(x * w["norm"]["scale"] + w["norm"]["bias"])


def norm(x):
    return np.sqrt((x**2).sum(-1))


def nearest(x, others, k):
    return np.sort(norm(x[:, None] - others[None]), axis=1)[:, :k]


def rnd(w, b, memory):
    x = np.clip((b.observation - b.observation.mean(0)) / np.sqrt(b.observation.var(0) + 1e-5), -5, 5)
    error = ((mlp(w["target"], x) - mlp(w["predictor"], x)) ** 2).mean(-1)
    # One batch after a mean of 0 and a variance of 1 that count as 1e-4 numbers.
    n, total = 1e-4, ROWS + 1e-4
    variance = (n + error.var(ddof=1) * ROWS + error.mean() ** 2 * n * ROWS / total) / total
    return error.mean(), error / (np.sqrt(variance) + 1e-8)


def icm_apt(w, b, memory):
    z, following = trunk(w["trunk"], b.observation), trunk(w["trunk"], b.next_observation)
    forward = norm(following - mlp(w["forward"], np.concatenate([z, b.action], 1)))
    backward = norm(b.action - np.tanh(mlp(w["backward"], np.concatenate([z, following], 1))))
    return forward.mean() + backward.mean(), np.log(1 + nearest(z, z, 12).mean(1))


def td3(w, b, memory):
    return 0.0, b.reward


REFERENCES = {"rnd": rnd, "icm_apt": icm_apt, "td3": td3}


@pytest.mark.parametrize("algorithm", REFERENCES)
def test_loss_gradient_and_reward_equal_the_equations(algorithm):
    bonus = bonus_of(algorithm)
    batch, key = batch_of(bonus), jax.random.key(3)
    before = jax.jit(bonus.init)(jax.random.key(0))
    after, reward, metrics = jax.jit(bonus.update)(before, batch, key)
    exact = Transitions(*wide(batch))

    def reference(state):
        return REFERENCES[algorithm](wide(nnx.to_pure_dict(state.learnt.weights)), exact, wide(before.memory))

    np.testing.assert_allclose(metrics["loss/intrinsic"], reference(before)[0], rtol=1e-5)
    # Paid after the update, with the weights that it left.
    np.testing.assert_allclose(reward, reference(after)[1], rtol=2e-5, atol=1e-6)
    weights = before.learnt.weights
    if not jax.tree.leaves(weights):
        return
    # The gradient, along a random direction, by the difference of the reference.
    gradients = jax.jit(jax.grad(lambda w: bonus.loss(nnx.merge(bonus.graph, w), batch, key)))(weights)
    rng = np.random.default_rng(1)
    direction = jax.tree.map(lambda x: rng.normal(size=x.shape), wide(weights))
    if algorithm == "rnd":
        direction["target"] = jax.tree.map(np.zeros_like, direction["target"])  # it does not learn

    def loss_at(place: float) -> float:
        moved = jax.tree.map(lambda x, d: x + place * d, wide(weights), direction)
        return reference(before._replace(learnt=before.learnt._replace(weights=moved)))[0]

    slope = (loss_at(1e-6) - loss_at(-1e-6)) / 2e-6
    along = sum(map(np.vdot, jax.tree.leaves(wide(gradients)), jax.tree.leaves(direction)))
    np.testing.assert_allclose(along, slope, rtol=1e-4)


def test_the_random_network_stays_and_the_other_one_learns_it():
    bonus = bonus_of("rnd")
    state, batch = bonus.init(jax.random.key(0)), batch_of(bonus)
    update, losses = jax.jit(bonus.update), []
    target = jax.tree.map(np.asarray, nnx.to_pure_dict(state.learnt.weights)["target"])
    for step in range(30):
        state, _, metrics = update(state, batch, jax.random.key(step))
        losses.append(float(metrics["loss/intrinsic"]))
    assert losses[-1] < 0.2 * losses[0]
    jax.tree.map(np.testing.assert_array_equal, target, nnx.to_pure_dict(state.learnt.weights)["target"])


def test_running_statistics_are_those_of_all_numbers():
    rng, running, batches = np.random.default_rng(0), Running.new(), []
    for size in (1000, 7, 100):
        batches.append(rng.normal(3.0, 2.0, size).astype(np.float32))
        running = jax.jit(Running.seen)(running, batches[-1])
    numbers = np.concatenate(batches).astype(np.float64)
    assert float(running.mean) == pytest.approx(numbers.mean(), rel=1e-5)
    assert float(running.variance) == pytest.approx(numbers.var(), rel=1e-2)  # batches' own are unbiased
