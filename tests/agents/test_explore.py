"""agents.explore: what is learnt from, what is written, and that an interruption changes nothing."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from agents.cli import ConfigError, Diverged
from agents.explore import exploration
from agents.explore.__main__ import main
from agents.explore.bonus import Sizes, Transitions
from agents.explore.config import BONUSES, make_config
from agents.explore.coverage import make_coverage
from agents.explore.exploration import explore
from agents.explore.explorers import Learning
from agents.explore.learner import Learner
from agents.explore.replay import Replay
from data import DataError, Trajectory, TrajectoryStore
from data.build import build
from data.collect import collect
from data.dmc import make
from data.exorl import list_episodes, read_episode
from data.info import describe
from tests.agents.test_explore_rewards import mlp, trunk, wide

ROOT = Path(__file__).parents[2]
TASK = "point_mass_maze-reach_top_left"
TINY = (
    *("learner.width=8", "learner.batch=16", "learner.seed_steps=40", "learner.replay=60", "learner.update_every=2"),
    *("learner.updates_per_call=3", "learner.learning_rate=1e-2", "rnd.representation=4", "checkpoint_every=2"),
)


def tiny(algorithm: str = "aps", task: str = TASK, *overrides: str):
    settings = {"task": task, "algorithm": algorithm, "seed": 3, "episode_steps": 20}
    return make_config(settings, "urlb", [*TINY, *overrides])


def content(folder: Path) -> dict[str, list[bytes]]:
    episodes = {path.name: read_episode(path) for path in list_episodes(folder)}
    return {
        name: [array.tobytes() for array in (t.observation, t.action, t.reward, t.physics, *t.extras.values())]
        for name, t in episodes.items()
    }


def metrics(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "explore/metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if "per_second" not in name} for line in lines]


# What is learnt from.


def numbered(steps: int, ends: bool = False) -> Trajectory:
    """Observation t is t, action t is t, reward t is 10 ** -t."""
    t = np.arange(steps + 1.0)[:, None]
    discount = np.ones(steps)
    discount[-1] = 1 - ends
    return Trajectory(t, t[:-1], 10.0 ** -t[:-1, 0], discount)


def test_a_transition_is_n_steps_of_one_episode():
    replay = Replay(Sizes(1, 1, 0), 1, 6, capacity=6, nstep=3, discount=0.5)
    replay.add(0, numbered(6, ends=True), 100 + np.arange(6.0)[:, None])
    drawn = Transitions(*(x.reshape(60, -1) for x in replay.sample(np.random.default_rng(0), 3, 20)))
    first = drawn.observation[:, 0]
    assert set(first) == {0, 1, 2, 3}
    np.testing.assert_array_equal(drawn.action[:, 0], first)
    np.testing.assert_array_equal(drawn.skill[:, 0], 100 + first)
    np.testing.assert_array_equal(drawn.next_observation[:, 0], first + 3)
    np.testing.assert_allclose(drawn.reward[:, 0], 10.0**-first * (1 + 0.5 / 10 + 0.25 / 100), rtol=1e-6)
    np.testing.assert_allclose(drawn.discount[:, 0], np.where(first == 3, 0, 0.125))


def test_a_replay_forgets_the_oldest_and_passes_over_episodes_without_a_transition():
    replay = Replay(Sizes(1, 1, 0), 0, 6, capacity=17, nstep=3, discount=0.5)
    none = np.zeros((6, 0))
    replay.add(0, numbered(2), none[:2])
    assert replay.is_empty
    for index in range(1, 4):
        observation, action = np.full((7, 1), 100.0 * index), np.zeros((6, 1))
        replay.add(index, Trajectory(observation, action, *np.ones((2, 6))), none)
    assert not replay.is_empty
    assert set(replay.sample(np.random.default_rng(0), 1, 100).observation.ravel()) == {200, 300}


def weights(state) -> dict[str, dict]:
    networks = {"actor": state.actor.weights, "critic": state.critic.weights, "target": state.target}
    return {name: wide(nnx.to_pure_dict(network)) for name, network in networks.items()}


def test_an_update_is_that_of_the_equations():
    """The critic learns first, the policy from what that has learnt, and the target follows."""
    config = make_config({"task": TASK, "algorithm": "td3"}, "urlb", ["learner.width=8", "learner.noise=1e-20"])
    bonus = BONUSES["td3"](config.algorithm_settings, Sizes(3, 2, 8), 1e-2)
    learner = Learner(config.learner, bonus)
    before = learner.init(jax.random.key(0))
    before = before._replace(target=jax.tree.map(lambda x: x + 0.1, before.target))
    old = weights(before)
    rng = np.random.default_rng(0)
    shapes = (32, 3), (32, 2), (32,), (32,), (32, 3), (32, 0)
    batch = Transitions(*(np.tanh(rng.normal(size=shape)).astype(np.float32) for shape in shapes))
    after, told = learner.update(before, Transitions(*(x[None] for x in batch)), jax.random.key(1))
    new = weights(after)

    def q(w, o, a):
        x = trunk(w["trunk"], np.concatenate([o, a], 1))
        return np.stack([mlp(w["heads"][i], x)[:, 0] for i in range(2)])

    def pi(w, o):
        return np.tanh(mlp(w["head"], trunk(w["trunk"], o)))

    b = Transitions(*wide(batch))
    y = b.reward + b.discount * q(old["target"], b.next_observation, pi(old["actor"], b.next_observation)).min(0)
    loss = ((q(old["critic"], b.observation, b.action) - y) ** 2).mean(1).sum()
    np.testing.assert_allclose(told["loss/critic"], loss, rtol=1e-5)
    worth = q(new["critic"], b.observation, pi(old["actor"], b.observation)).min(0).mean()
    np.testing.assert_allclose(told["loss/action"], -worth, rtol=1e-5, atol=1e-6)
    followed = jax.tree.map(lambda t, c: t + 0.01 * (c - t), old["target"], new["critic"])
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), new["target"], followed)
    better = q(new["critic"], b.observation, pi(new["actor"], b.observation)).min(0).mean()
    assert better > worth


# What is counted.


def test_cells_of_the_square_and_of_the_maze():
    def at(*places):
        physics, steps = np.array([[*place, 0, 0] for place in places], float), len(places) - 1
        return Trajectory(physics, np.zeros((steps, 2)), *np.zeros((2, steps)), physics)

    open_, maze = make_coverage("point_mass-easy", 4), make_coverage(TASK, 4)
    for coverage, cells in ((open_, 1600), (maze, 1408)):
        assert coverage.share == 0
        coverage.add(at((-0.29, 0.29), (-0.2899, 0.2899), (0.0, 0.2), (0.31, -5.0)))
        assert coverage.share == pytest.approx(3 / cells)
        coverage.add(at((-0.29, 0.29), (0.0, 0.0)))  # within the cross
        assert coverage.share == pytest.approx((4 if coverage is open_ else 3) / cells)


def test_cells_of_other_bodies_are_codes_of_16_bits():
    coverage, observation = make_coverage("walker-walk", 24), np.random.default_rng(0).normal(size=(1001, 24))
    for scale in (1, 2):  # signs alone count
        episode = Trajectory(scale * observation, np.zeros((1000, 6)), *np.zeros((2, 1000)))
        coverage.add(episode)
        cells = coverage.cell(episode)
        assert 0 <= cells.min() <= cells.max() < 2**16
        assert coverage.share == len(set(cells.tolist())) / 2**16
    assert coverage.share > 900 / 2**16


# What is written.


def test_random_is_data_collects_uniform(tmp_path):
    explore(tiny("random"), 60, tmp_path / "explored", progress=False)
    collect(TASK, "uniform", 3, 3, tmp_path / "collected", progress=False, episode_steps=20)
    assert content(tmp_path / "explored") == content(tmp_path / "collected")
    shares = [line["coverage"] for line in metrics(tmp_path / "explored")]
    assert 0 < shares[0] <= shares[1] <= shares[2]


def test_interrupted_and_resumed_it_writes_what_one_run_writes(tmp_path, monkeypatch):
    config = tiny()
    assert explore(config, 140, tmp_path / "one", progress=False) == 140
    expected = content(tmp_path / "one")
    assert list(expected) == [f"episode_{index:06d}_20.npz" for index in range(7)]
    lines = metrics(tmp_path / "one")
    assert [line["step"] for line in lines] == list(range(20, 160, 20))
    assert "reward/paid" not in lines[1]
    assert all(np.isfinite(line["reward/paid"]) for line in lines[2:])

    write, count = exploration.write_episode, 0

    def killed(*arguments):
        nonlocal count
        count += 1
        if count == 6:
            raise KeyboardInterrupt
        return write(*arguments)

    monkeypatch.setattr(exploration, "write_episode", killed)
    with pytest.raises(KeyboardInterrupt):
        explore(config, 140, tmp_path / "two", progress=False)
    monkeypatch.undo()
    assert len(list_episodes(tmp_path / "two")) == 5  # and a checkpoint after 4
    (tmp_path / "two/episode_000004_20.npz").write_bytes(b"torn")
    explore(config, 100, tmp_path / "two", resume=True, progress=False)
    explore(config, 140, tmp_path / "two", resume=True, progress=False)  # and on from its own end
    assert content(tmp_path / "two") == expected
    assert metrics(tmp_path / "two") == lines


@pytest.mark.parametrize(
    ("algorithm", "size", "every"),
    [("aps", 10, 5), *(pytest.param(*one, marks=pytest.mark.slow) for one in (("diayn", 16, 3), ("smm", 4, 20)))],
)
def test_skills_are_in_the_files(tmp_path, algorithm, size, every):
    explore(tiny(algorithm, TASK, "diayn.every=3"), 60, tmp_path / "one", progress=False)
    for path in list_episodes(tmp_path / "one"):
        (skill,) = (values for name, values in read_episode(path).extras.items() if name in ("task", "skill", "z"))
        assert skill.shape == (21, size)
        np.testing.assert_array_equal(skill[0], skill[1])  # row 0 of an action is a dummy
        changes = np.flatnonzero((skill[2:] != skill[1:-1]).any(1)) + 1
        assert set(changes) <= set(range(every, 20, every))  # one of few may be drawn again
        assert len(changes) or every == 20
    build(tmp_path / "one", TASK, tmp_path / "s.h5", workers=1, progress=False)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", [name for name in BONUSES if name != "aps"])
def test_every_algorithm_goes_on_where_it_was(tmp_path, algorithm):
    config = tiny(algorithm, "cartpole-swingup", "proto.prototypes=8", "proto.queue=16")
    explore(config, 100, tmp_path / "one", progress=False)
    explore(config, 60, tmp_path / "two", progress=False)
    explore(config, 100, tmp_path / "two", resume=True, progress=False)
    assert content(tmp_path / "one") == content(tmp_path / "two")
    assert metrics(tmp_path / "one") == metrics(tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize("signal_", [signal.SIGINT, signal.SIGKILL])
def test_the_command_killed_and_resumed(tmp_path, signal_):
    out = tmp_path / "walker"
    words = f"--task walker --algorithm rnd --steps 400 --episode-steps 20 --seed 3 --out {out}".split()
    command = [sys.executable, "-m", "agents.explore", *words, *TINY]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while len(list(out.glob("*.npz"))) < 6:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal_)
    _, error = process.communicate(timeout=120)
    assert "Traceback" not in error
    if signal_ == signal.SIGINT:
        assert process.returncode == 130
        assert error.splitlines()[-1].startswith("interrupted; ")
    assert len(list_episodes(out)) < 20
    assert subprocess.run([*command, "--resume"], cwd=ROOT, capture_output=True).returncode == 0
    explore(tiny("rnd", "walker-stand"), 400, tmp_path / "one", progress=False)
    assert content(out) == content(tmp_path / "one")


def test_the_data_commands_read_it(tmp_path):
    explore(tiny(), 60, tmp_path / "aps", progress=False)
    assert f"a folder of episodes of {TASK}, 3 episodes" in describe(tmp_path / "aps")
    assert "policy    aps, seed 3" in describe(tmp_path / "aps")
    build(tmp_path / "aps", "point_mass_maze-reach_bottom_right", tmp_path / "s.h5", workers=1, progress=False)
    assert TrajectoryStore.open(tmp_path / "s.h5").steps == 60


# What is refused.


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--task walkr --algorithm rnd", r"task 'walkr' does not exist; did you mean 'walker-"),
        ("--task fish --algorithm rnd", r"--task fish names a body only. Choose one of its tasks: fish-swim, fish-upr"),
        ("--task walker --algorithm rnb", r"algorithm 'rnb' does not exist; did you mean 'rnd'\?"),
        ("--task walker --algorithm rnd --preset gpu", r"preset 'gpu' does not exist. Choose one of urlb, cpu"),
        ("--task walker --algorithm rnd rnd.scal=3", r"unknown key 'rnd.scal'; did you mean 'scale'\?"),
        ("--task walker --algorithm rnd learner.width=0", r"'learner.width': Input should be greater than 0; got 0"),
        (
            "--task walker --algorithm rnd learner.batch=1",
            r"'learner.batch': Input should be greater than or equal",
        ),
        ("--task walker --algorithm icm_apt learner.batch=8", r"icm_apt.neighbours=12 of a batch of learner.batch=8;"),
        ("--task walker --algorithm rnd --seed -1", r"'seed': Input should be greater than or equal to 0; got -1"),
        (
            "--task walker --algorithm rnd --episode-steps 2",
            r"an episode of walker-stand has 2 steps, and a transition",
        ),
        ("--task walker --algorithm proto proto.queue=100", r"multiple of the prototypes, .*queue=100, prototypes=512"),
        ("--task walker --algorithm rnd rnd", r"'rnd' is no override; write it as section.key=value"),
    ],
)
def test_bad_input_is_one_line_and_status_2(tmp_path, capsys, words, message):
    assert main([*words.split(), "--steps", "9", "--out", str(tmp_path / "x")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    with pytest.raises(ConfigError, match=message):
        raise ConfigError(error)
    assert not (tmp_path / "x").exists()


def test_folders_of_something_else_are_refused(tmp_path):
    config = tiny("random")
    explore(config, 20, tmp_path / "a", progress=False)
    with pytest.raises(ConfigError, match=r"already holds this collection. Add --resume to continue it"):
        explore(config, 40, tmp_path / "a", progress=False)
    other = config.model_copy(update={"learner": config.learner.model_copy(update={"width": 9})})
    with pytest.raises(ConfigError, match=r"collected with other settings: learner.width=8 \(now 9\). Resume with the"):
        explore(other, 40, tmp_path / "a", resume=True, progress=False)
    with pytest.raises(DataError, match=r"holds episodes of policy 'random', and this run is of policy 'aps'"):
        explore(tiny(), 40, tmp_path / "a", progress=False)
    collect(TASK, "uniform", 1, 3, tmp_path / "b", progress=False, episode_steps=20)
    with pytest.raises(DataError, match=r"holds episodes of policy 'uniform', and this run is of policy 'random'"):
        explore(config, 40, tmp_path / "b", progress=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file is a file; --out names a folder"):
        explore(config, 40, tmp_path / "file", progress=False)
    shutil.rmtree(tmp_path / "a" / "explore")
    with pytest.raises(ConfigError, match=r"holds episodes, and no explore/config.json that says how they were made"):
        explore(config, 40, tmp_path / "a", progress=False)


def test_an_episode_that_is_lost_is_named(tmp_path):
    explore(tiny(), 80, tmp_path, progress=False)
    os.unlink(tmp_path / "episode_000002_20.npz")
    with pytest.raises(DataError, match=r"episode 2 is not in .* any more, and the learner goes on from it"):
        explore(tiny(), 100, tmp_path, resume=True, progress=False)


def test_numbers_that_end_are_told():
    environment = make(TASK, episode_steps=20)
    explorer = Learning(tiny(), environment, lambda steps: None)
    explorer.episode(0, 0)
    explorer.episode(1, 20)
    broken = jax.tree.map(lambda x: x * np.float32(np.nan), explorer.state.actor.weights)
    explorer.state = explorer.state._replace(actor=explorer.state.actor._replace(weights=broken))
    with pytest.raises(Diverged, match=r"an action is not a number in .*aps, seed 3, episode 2. Lower learner"):
        explorer.episode(2, 40)
