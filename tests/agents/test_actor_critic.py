"""The agents with a critic: losses and their gradients against float64 NumPy, learning, resuming, refusing."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from scipy.special import logsumexp
from scipy.stats import norm

from agents.actor_critic import ANY, NEXT, NOW, normal, uniform
from agents.agent import Scales, Timesteps
from agents.agent_config import VALUE_KINDS
from agents.checkpoint import Checkpoints, read_metrics
from agents.cli import ConfigError
from agents.config import Config, validate
from agents.evaluate import evaluate
from agents.optimizer import with_target
from agents.registry import make_agent
from agents.results import read_results
from agents.train import train
from agents.update import first_state, make_update, new_state
from data import Trajectory, TrajectoryStore, TransitionBatch
from data.store_writer import write_store
from rlring import make_mesh
from rlring.language_model import TrainState
from rlring.sharding import BatchPart

ROWS, A = 64, 2
MEAN, STD = np.array([0.5, -1.0, 0.0]), np.array([2.0, 0.5, 0.01])
EDGE = 1.0 - 1e-6


def made(kind: str, *, store="s.h5", task="point_mass-easy", **sections) -> Config:
    settings = {
        "name": "tiny",
        "data": {"tasks": [task], "episodes": "e", "stores": [str(store)], "held_out": 0.0},
        "model": {"width": 16, "layers": 3},
        "agent": {"kind": kind},
        "optimizer": {"learning_rate": 3e-3, "warmup": 0, "schedule": "constant", "weight_decay": 0.0, "beta2": 0.999},
        "train": {"updates": 6, "batch": 8, "log_every": 1, "checkpoint_every": 3},
        "evaluate": {"contexts": [0], "groups": 2, "episode_steps": 5},
    }
    for name, values in sections.items():
        settings[name] = settings.get(name, {}) | values
    return validate(Config, settings, source="test")


# The reference: the equations of the modules, in NumPy.


def layers(w, x):
    x = x @ w["first"]["kernel"] + w["first"]["bias"]
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    x = np.tanh(x * w["norm"]["scale"] + w["norm"]["bias"])
    for i in range(len(w["hidden"])):
        x = np.maximum(x @ w["hidden"][i]["kernel"] + w["hidden"][i]["bias"], 0)
    return x @ w["last"]["kernel"] + w["last"]["bias"]


def seen(o):
    return np.clip((o - MEAN) / STD, -10, 10)


def q(w, o, a):
    x = np.concatenate([seen(o), a], -1)
    return np.stack([layers(w["pair"][i], x)[..., 0] for i in range(2)])


def mean_of(w, o):
    return np.tanh(layers(w["layers"], seen(o)))


def near(mean, fixed_mean, noise):
    """An action near the mean, clipped; its gradient is that of the mean."""
    return mean + np.clip(fixed_mean + np.clip(0.2 * noise, -0.3, 0.3), -EDGE, EDGE) - fixed_mean


def td3_critic(new, old, b, e):
    following = mean_of(old["actor"], b.next_observation)
    a = near(following, following, e.next[:, 0])
    y = b.reward + 0.9 * b.discount * q(old["target"], b.next_observation, a).min(0)
    return sum(((q(new["critic"], b.observation, b.action)[i] - y) ** 2).mean() for i in range(2))


def td3(new, old, b, e, alpha=None):
    mean, was = (mean_of(w["actor"], b.observation) for w in (new, old))
    value, old_value = (q(old["critic"], b.observation, near(m, was, e.now[:, 0])).min(0) for m in (mean, was))
    actor = -value.mean()
    if alpha is not None:
        actor = ((mean - b.action) ** 2).mean() - alpha / np.abs(old_value).mean() * value.mean()
    return {"action": actor, "critic": td3_critic(new, old, b, e)}


def crr(new, old, b, e, weight="indicator"):
    mean, was = (mean_of(w["actor"], b.observation) for w in (new, old))
    tried = [q(old["critic"], b.observation, near(was, was, e.any[:, j])).min(0) for j in range(10)]
    advantage = q(old["critic"], b.observation, b.action).min(0) - np.mean(tried, 0)
    f = (advantage > 0) * 1.0 if weight == "indicator" else np.minimum(np.exp(advantage / 0.1), 20)
    log_probability = norm.logpdf(b.action, mean, 0.2).sum(-1)
    return {"action": -(f * log_probability).mean(), "critic": td3_critic(new, old, b, e)}


def iql(new, old, b, e):
    def v(w, o):
        return layers(w["value"]["layers"], seen(o))[:, 0]

    best = q(old["target"], b.observation, b.action).min(0)
    u, old_u = best - v(new, b.observation), best - v(old, b.observation)
    y = b.reward + 0.9 * b.discount * v(old, b.next_observation)
    values = q(new["critic"], b.observation, b.action)
    actor = new["actor"]
    mean = np.tanh(layers(actor["mean"]["layers"], seen(b.observation)))
    log_probability = norm.logpdf(b.action, mean, np.exp(actor["log_std"])).sum(-1)
    return {
        "value": (np.abs(0.8 - (u < 0)) * u**2).mean(),
        "critic": ((values - y) ** 2).mean(1).sum(),
        "action": -(np.minimum(np.exp(3 * old_u), 100) * log_probability).mean(),
    }


def cql(new, old, b, e):
    def pi(w, o, noise):
        mean, log_std = np.split(layers(w["actor"]["layers"], seen(o)), 2, -1)
        std = np.exp(np.clip(log_std, -10, 2))
        x = mean + std * noise
        # The density of tanh(x), by its derivative.
        return np.tanh(x), (norm.logpdf(x, mean, std) - np.log(1 - np.tanh(x) ** 2)).sum(-1)

    following, _ = pi(old, b.next_observation, e.next[:, 0])
    y = b.reward + 0.9 * b.discount * q(old["target"], b.next_observation, following).min(0)
    values = q(new["critic"], b.observation, b.action)
    others = [e.uniform[:, j] for j in range(3)]
    others += [pi(old, b.observation, e.now[:, j])[0] for j in range(1, 4)]
    others += [pi(old, b.next_observation, e.next[:, j])[0] for j in range(1, 4)]
    every = np.stack([q(new["critic"], b.observation, a) for a in others] + [values])
    gap = (logsumexp(every, axis=0) - values).mean(1).sum()
    action, log_probability = pi(new, b.observation, e.now[:, 0])
    surplus = pi(old, b.observation, e.now[:, 0])[1] - A
    worth = q(old["critic"], b.observation, action).min(0)
    return {
        "critic": ((values - y) ** 2).mean(1).sum() + 0.5 * gap,
        "action": (np.exp(old["temperature"]["log"]) * log_probability - worth).mean(),
        "temperature": -(new["temperature"]["log"] * surplus).mean(),
    }


REFERENCES = {
    "td3": (td3, {}),
    "td3_bc": (partial(td3, alpha=2.5), {}),
    "crr": (crr, {}),
    "crr exp": (partial(crr, weight="exp"), {"weight": "exp", "temperature": 0.1}),
    "iql": (iql, {"expectile": 0.8}),
    "cql": (cql, {"alpha": 0.5}),
}


def transitions(rng) -> TransitionBatch:
    return TransitionBatch(
        observation=rng.normal(MEAN, STD, (ROWS, 1, 3)),
        action=rng.uniform(-1, 1, (ROWS, 1, A)),
        reward=rng.normal(size=(ROWS, 1)),
        discount=rng.integers(0, 2, (ROWS, 1)).astype(float),
        next_observation=rng.normal(MEAN, STD, (ROWS, 1, 3)),
        key=rng.integers(0, 2**32, (ROWS, 1, 2), dtype=np.uint32),
    )


@pytest.mark.parametrize("name", REFERENCES)
def test_losses_and_gradients_against_float64(name):
    """Gradients along random directions, network by network: what a loss holds fixed has none."""
    kind, (reference, settings) = name.split()[0], REFERENCES[name]
    rng = np.random.default_rng(1)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):  # flax promotes in its norm of float64
        config = made(kind, agent={kind: settings | {"discount": 0.9}})
        agent = make_agent(config, Scales(MEAN, STD, 1.0), A, 10, None)
        params = agent.init(jax.random.key(0))
        # Weights that the first ones are not: biases and scales too, and another target.
        params = jax.tree.map(lambda w: jnp.asarray(w + 0.1 * rng.standard_normal(w.shape)), params)
        batch = transitions(rng)
        key = jnp.asarray(batch.key[:, 0])
        draws = SimpleNamespace(
            now=np.asarray(normal(key, NOW, (4 if kind == "cql" else 1, A))),
            next=np.asarray(normal(key, NEXT, (4 if kind == "cql" else 1, A))),
            any=np.asarray(normal(key, ANY, (10, A))),
            uniform=np.asarray(uniform(key, ANY, (3, A))),
        )
        if kind not in ("cql", "crr"):
            draws.now, draws.next = (np.asarray(normal(key, use, (A,)))[:, None] for use in (NOW, NEXT))
        if kind == "crr":
            draws.next = np.asarray(normal(key, NEXT, (A,)))[:, None]
        (loss, metrics), gradient = jax.jit(jax.value_and_grad(agent.loss, has_aux=True))(params, batch)

    plain = {part: nnx.to_pure_dict(weights) for part, weights in params.items()}
    plain = jax.tree.map(np.asarray, plain)
    flat = TransitionBatch(*(x[:, 0] for x in batch))
    want = reference(plain, plain, flat, draws)
    for part, value in want.items():
        np.testing.assert_allclose(metrics[f"loss/{part}"], value, rtol=1e-9, err_msg=part)
    np.testing.assert_allclose(loss, sum(want.values()), rtol=1e-9)
    for part, weights in plain.items():
        direction = jax.tree.map(lambda w: rng.standard_normal(w.shape), weights)
        ends = []
        for sign in (1, -1):
            there = jax.tree.map(lambda w, d, s=sign: w + s * 1e-6 * d, weights, direction)
            ends.append(reference(plain | {part: there}, plain, flat, draws))
        slope = (sum(ends[0].values()) - sum(ends[1].values())) / 2e-6
        own = jax.tree.map(np.asarray, nnx.to_pure_dict(gradient[part]))
        got = sum(jax.tree.leaves(jax.tree.map(lambda g, d: float((g * d).sum()), own, direction)))
        np.testing.assert_allclose(got, slope, rtol=1e-5, atol=1e-7, err_msg=part)
        assert (part == "target") == (got == 0.0)


def test_the_target_follows_the_critic_and_has_no_optimizer():
    params = {"actor": jnp.ones(2), "critic": jnp.array([1.0, 2.0]), "target": jnp.array([0.0, 4.0])}
    optimizer = with_target({"actor": optax.sgd(1.0), "critic": optax.adam(0.5)}, 0.25)
    state = optimizer.init(params)
    assert set(state) == {"actor", "critic"}
    update = jax.jit(lambda state: state.updated(optimizer, jax.tree.map(jnp.ones_like, params)))
    after = update(TrainState(params, state)).weights
    np.testing.assert_allclose(after["actor"], [0, 0], atol=1e-6)
    np.testing.assert_allclose(after["critic"], [0.5, 1.5], atol=1e-5)  # the first step of Adam is its rate
    np.testing.assert_allclose(after["target"], [0.25 * 0.5, 4 + 0.25 * (1.5 - 4)], atol=1e-5)


def moved(x, action):
    """A point on a line that an action moves, and what it is paid: being in the middle."""
    after = np.clip(x + 0.3 * np.clip(action, -1, 1), -1, 1)
    return after, 1 - np.abs(after)


@pytest.fixture(scope="module")
def line(tmp_path_factory):
    """A store of random actions on the line, no better than standing still."""
    path, rng = tmp_path_factory.mktemp("line") / "s.h5", np.random.default_rng(0)

    def episodes():
        for _ in range(50):
            x, action = [rng.uniform(-1, 1)], rng.uniform(-1, 1, 20)
            reward = []
            for a in action:
                after, paid = moved(x[-1], a)
                x.append(after)
                reward.append(paid)
            yield Trajectory(np.array(x)[:, None], action[:, None], np.array(reward), np.ones(20))

    write_store(path, episodes(), task="cartpole-swingup", source="a test")
    return TrajectoryStore.open(path)


QUICK = ("td3_bc", "iql")


@pytest.mark.parametrize("kind", [pytest.param(k, marks=[pytest.mark.slow] * (k not in QUICK)) for k in VALUE_KINDS])
def test_it_learns_from_random_actions(line, kind):
    """Imitation of this data would be paid as much as standing still: 0.5 a step. The best is 0.94."""
    prefers = {"td3_bc": {"alpha": 10.0}, "iql": {"temperature": 20.0}}
    table = {"discount": 0.9, "target_rate": 0.05} | prefers.get(kind, {})
    config = made(kind, agent={kind: table}, model={"width": 32, "layers": 2}, optimizer={"gradient_clip": 1e30})
    agent = make_agent(config, Scales(np.zeros(1), np.ones(1), 1.0), 1, 20, None)
    optimizer, sampler = agent.optimizer(), agent.sampler([line])
    state, update = new_state(agent, optimizer, jax.random.key(0)), make_update(agent, optimizer)
    for step in range(300):
        state, _ = update(state, sampler.sample(step, 64))
    act = jax.jit(lambda now, key: agent.act(state.weights, None, now, key)[0])
    for key in (None, jax.random.key(1)):
        x, total = np.linspace(-1, 1, 64), 0.0
        for _ in range(10):
            nothing = np.zeros(64, np.float32)
            now = Timesteps(np.float32(x)[:, None], nothing[:, None], nothing, nothing, np.zeros(64, np.int32))
            action = np.asarray(act(now, key))
            assert np.abs(action).max() <= 1
            x, reward = moved(x, action[:, 0])
            total += reward.mean() / 10
        assert total > (0.8 if key is None else 0.55), total  # samples of CQL are wide at first


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A store of numbers in the shape of point_mass-easy; runs land beside it."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    drawn = [
        Trajectory(rng.normal(size=(9, 4)), rng.uniform(-1, 1, (8, 2)), rng.random(8), np.ones(8)) for _ in range(6)
    ]
    write_store(tmp_path / "s.h5", drawn, task="point_mass-easy", source="a test")
    return tmp_path / "s.h5"


def losses(folder):
    return [
        {name: value for name, value in line.items() if name.startswith(("loss", "gradient", "weights"))}
        for line in read_metrics(folder / "metrics.jsonl")
    ]


@pytest.mark.parametrize("kind", [pytest.param(k, marks=[pytest.mark.slow] * (k != "td3")) for k in VALUE_KINDS])
def test_it_is_trained_resumed_and_evaluated_like_any_other(store, kind):
    whole = losses(train(made(kind, store=store), progress=False))
    assert len(whole) == 6
    folder = train(made(kind, store=store).model_copy(update={"name": "part"}), progress=False)
    with Checkpoints(folder) as checkpoints:
        checkpoints.manager.delete(6)
    train(made(kind, store=store).model_copy(update={"name": "part"}), resume=True, progress=False)
    assert losses(folder) == whole
    assert evaluate(folder, progress=False) == 2
    assert {(r.agent, r.context_trajectories, r.steps) for r in read_results(folder)} == {(kind, 0, 5)}


@pytest.mark.slow
@pytest.mark.parametrize("kind", VALUE_KINDS)
def test_the_same_updates_on_a_mesh(store, kind):
    """What a loss draws too: each transition has bits of its own."""
    after = []
    for mesh in (None, make_mesh(data=2)):
        config = made(kind, store=store)
        agent = make_agent(config, Scales(np.zeros(4), np.ones(4), 1.0), 2, 8, mesh)
        sampler, optimizer = agent.sampler([TrajectoryStore.open(store)]), agent.optimizer()
        state, sharding = first_state(config, agent, optimizer, mesh)
        update, part = make_update(agent, optimizer, mesh, sharding), BatchPart.of((8, 1), mesh)
        for step in range(3):
            state, metrics = update(state, part.on_devices(sampler.sample(step, part.rows, part.places)))
        after.append(jax.tree.map(np.asarray, (metrics, state.weights)))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), *after)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"task": "point_mass-dark"},
            r"what observations are worth, and point_mass-dark hides the goal that",
        ),
        (
            {"mesh": {"ring": 2}},
            r"'td3' reads transitions, and no mesh splits that; got mesh.ring=2, .* use",
        ),
        ({"train": {"accumulate": 2}}, r"takes its batch whole; got train.accumulate=2; leave it out"),
        ({"agent": {"window": 3}}, r"'td3' takes fused tokens and has no window; .*agent.window=3; leave them out"),
        ({"agent": {"iql": {}}}, r"the table iql goes with kind 'iql'; got kind 'td3'; leave it out"),
        ({"agent": {"td3": {"alpha": 1.0}}}, r"unknown key 'agent.td3.alpha'; known here: discount, noise, noise_clip"),
    ],
    ids=str,
)
def test_what_it_cannot_do_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        made("td3", **settings)
