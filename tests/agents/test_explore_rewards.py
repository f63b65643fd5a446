"""Intrinsic rewards of the collectors: losses, their gradients and what is paid, against float64 NumPy."""

from functools import cache
from types import SimpleNamespace

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from scipy.special import softmax

from agents.explore.bonus import Sizes, Transitions
from agents.explore.config import BONUSES, make_config
from agents.explore.particles import Running

ROWS, OBSERVATION, ACTION, WIDTH = 32, 3, 2, 16


def bonus_of(algorithm: str, *overrides: str):
    config = make_config({"task": "walker-walk", "algorithm": algorithm}, "urlb", overrides)
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


def icm(w, b, memory):
    forward = norm(b.next_observation - mlp(w["forward"], np.concatenate([b.observation, b.action], 1)))
    both = np.concatenate([b.observation, b.next_observation], 1)
    backward = norm(b.action - np.tanh(mlp(w["backward"], both)))
    return forward.mean() + backward.mean(), np.log(1 + 2 * forward)


def disagreement(w, b, memory):
    said = np.stack([mlp(w["models"][i], np.concatenate([b.observation, b.action], 1)) for i in range(5)])
    return np.mean([norm(b.next_observation - x).mean() for x in said]), said.var(0, ddof=1).mean(-1)


def proto(w, b, memory):
    def unit(x):
        return x / norm(x)[:, None]

    def linear(w, x):
        return x @ w["kernel"] + w.get("bias", 0)

    c = w["prototypes"]["kernel"]
    p = softmax(unit(mlp(w["projector"], linear(w["predictor"], b.observation))) @ c / 0.1, 1)
    q = np.exp(unit(linear(w["target"], b.next_observation)) @ w["fixed"]["prototypes"]["kernel"] / 0.1)
    for _ in range(3):
        q *= (1 / 4) / q.sum(0)
        q *= (1 / ROWS) / q.sum(1, keepdims=True)
    q *= ROWS
    z = unit(linear(w["predictor"], b.next_observation))
    return -(q * np.log(p)).sum(1).mean(), nearest(z, memory.states, 3)[:, -1]


def diayn(w, b, memory):
    log_q = np.log(softmax(mlp(w, b.next_observation), 1)[np.arange(ROWS), b.skill.argmax(1)])
    return -log_q.mean(), 2 * (log_q - np.log(1 / 16))


def smm(w, b, memory, noise):
    v, x = w["autoencoder"], np.concatenate([b.observation, b.skill], 1)
    features = np.maximum(mlp(v["encoder"], x), 0)
    mean, log_variance = (features @ v[name]["kernel"] + v[name]["bias"] for name in ("mean", "log_variance"))
    divergence = ((np.exp(log_variance) + mean**2 - 1 - log_variance) / 2).sum(1)  # of N(mean, variance) from N(0, 1)
    error = (x - mlp(v["decoder"], mean + np.exp(log_variance / 2) * noise)) ** 2
    told = np.log(softmax(mlp(w["discriminator"], b.observation), 1)[np.arange(ROWS), b.skill.argmax(1)])
    loss = error.mean() + 0.5 * divergence.mean() - told.mean()
    return loss, 0.5 * error.sum(1) + np.log(4) + 2 * told


def aps(w, b, memory):
    features = mlp(w, b.next_observation)
    along = (features / norm(features)[:, None] * b.skill).sum(1)
    distances = nearest(features, features, 12)
    mean = distances.mean() * (ROWS * 12) / (ROWS * 12 + 1e-4)
    return -along.mean(), np.log(1 + np.maximum(distances / mean - 1e-4, 0).mean(1)) + along


def td3(w, b, memory):
    return 0.0, b.reward


REFERENCES = {
    algorithm.__name__: algorithm for algorithm in (rnd, icm, disagreement, icm_apt, proto, diayn, smm, aps, td3)
}
SETTINGS = {  # other than 1, and small
    "icm": ("icm.scale=2.0",),
    "proto": ("proto.representation=5", "proto.projection=6", "proto.prototypes=4", "proto.queue=8"),
    "diayn": ("diayn.scale=2.0",),
    "smm": ("smm.code=5", "smm.units=6", "smm.state=0.5", "smm.told=2.0"),
}


@cache
def learnt(algorithm: str):
    """The state of a bonus before an update, that after it and what it paid and told, the batch and the key."""
    bonus = bonus_of(algorithm, *SETTINGS.get(algorithm, ()))
    batch, key, before = batch_of(bonus), jax.random.key(3), bonus.init(jax.random.key(0))
    update = jax.jit(bonus.update)
    return SimpleNamespace(batch=batch, key=key, before=before, update=update, done=update(before, batch, key))


@pytest.mark.parametrize("algorithm", REFERENCES)
def test_loss_gradient_and_reward_equal_the_equations(algorithm):
    one = learnt(algorithm)
    before, (after, reward, metrics) = one.before, one.done
    first = wide(nnx.to_pure_dict(before.learnt.weights))

    def reference(weights, memory, key=one.key):
        w = {**wide(nnx.to_pure_dict(weights)), "fixed": first}  # through which no gradient goes
        noise = [wide(jax.random.normal(key, (ROWS, 5)))] * (algorithm == "smm")
        return REFERENCES[algorithm](w, Transitions(*wide(one.batch)), wide(memory), *noise)

    weights = before.learnt.weights
    np.testing.assert_allclose(metrics["loss/intrinsic"], reference(weights, before.memory)[0], rtol=1e-5)
    # Paid after the update, with the weights that it left.
    paid = reference(after.learnt.weights, after.memory, jax.random.fold_in(one.key, 1))[1]
    np.testing.assert_allclose(reward, paid, rtol=2e-5, atol=1e-5)
    # The gradient, along a random direction, by the difference of the reference. Adam's first moment is a tenth of it.
    moments = (moment for _, moment in optax.tree.get_all_with_path(after.learnt.optimizer, "mu"))
    gradients = [10 * np.asarray(leaf, np.float64) for moment in moments for leaf in jax.tree.leaves(moment)]
    rng = np.random.default_rng(1)
    direction = jax.tree.map(lambda x: rng.normal(size=x.shape), wide(weights))
    if "target" in direction:
        direction["target"] = jax.tree.map(np.zeros_like, direction["target"])  # it does not learn

    def loss_at(place: float) -> float:
        return reference(jax.tree.map(lambda x, d: x + place * d, wide(weights), direction), before.memory)[0]

    slope = (loss_at(1e-6) - loss_at(-1e-6)) / 2e-6
    along = sum(map(np.vdot, gradients, jax.tree.leaves(direction)))
    np.testing.assert_allclose(along, slope, rtol=1e-4)


def test_the_random_network_stays():
    before, after = (nnx.to_pure_dict(state.learnt.weights) for state in (learnt("rnd").before, learnt("rnd").done[0]))
    jax.tree.map(np.testing.assert_array_equal, before["target"], after["target"])
    assert not np.array_equal(before["predictor"]["layers"][0]["kernel"], after["predictor"]["layers"][0]["kernel"])


def test_prototypes_stay_on_the_sphere_their_target_follows_and_the_queue_turns():
    state, batch, update = learnt("proto").before, learnt("proto").batch, learnt("proto").update
    for step in range(3):
        old, before = state.memory, nnx.to_pure_dict(state.learnt.weights)
        state, _, _ = update(state, batch, jax.random.key(step))
        weights = wide(nnx.to_pure_dict(state.learnt.weights))
        np.testing.assert_allclose(norm(weights["prototypes"]["kernel"].T), 1, rtol=1e-5)
        followed = jax.tree.map(lambda t, f: t + 0.05 * (f - t), wide(before["target"]), weights["predictor"])
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), weights["target"], followed)
        z = batch.next_observation @ weights["predictor"]["kernel"] + weights["predictor"]["bias"]
        distances = nearest(wide(state.memory.states), z / norm(z)[:, None], 1)[:, 0]
        kept = np.roll(np.arange(8) < 4, 4 * step)  # half of the queue is of this batch
        np.testing.assert_allclose(distances[kept], 0, atol=1e-5)
        np.testing.assert_array_equal(state.memory.states[~kept], old.states[~kept])


def test_skills_are_drawn_as_their_papers_say():
    rng = np.random.default_rng(0)
    for algorithm, name, size, every in (("diayn", "skill", 16, 50), ("smm", "z", 4, None), ("aps", "task", 10, 5)):
        bonus = bonus_of(algorithm)
        assert (bonus.skill_name, bonus.skill_size, bonus.skill_every) == (name, size, every)
        skills = np.stack([bonus.draw_skill(rng) for _ in range(1000)])
        np.testing.assert_allclose(norm(skills), 1, rtol=1e-5)
        np.testing.assert_allclose(skills.mean(0), 0 if algorithm == "aps" else 1 / size, atol=0.05)


def test_running_statistics_are_those_of_all_numbers():
    rng, running, batches = np.random.default_rng(0), Running.new(), []
    for size in (1000, 7, 100):
        batches.append(rng.normal(3.0, 2.0, size).astype(np.float32))
        running = jax.jit(Running.seen)(running, batches[-1])
    numbers = np.concatenate(batches).astype(np.float64)
    assert float(running.mean) == pytest.approx(numbers.mean(), rel=1e-5)
    assert float(running.variance) == pytest.approx(numbers.var(), rel=1e-2)  # batches' own are unbiased
