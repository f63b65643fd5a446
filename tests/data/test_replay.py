"""replay: stored actions lead to the stored states, and where they do not, it says where and why."""

import json
from dataclasses import replace

import numpy as np
import pytest

from data.collect import collect, roll_out
from data.dmc import make, task_names
from data.errors import DataError
from data.exorl import list_episodes, read_episode, write_episode
from data.open_loop import states_after
from data.replay import main, replay, replay_folder
from data.selection import Selection
from data.tasks import goal_task

# One task of each body; the cheetah is stepped 200 times before an episode, whose warm start is not in its state.
BODIES = sorted({task.split("-")[0]: task for task in task_names() if task != "quadruped-escape"}.values())
BODIES += ["point_mass-hard", "reacher-dark"]
QUICK = ("ball_in_cup-catch", "point_mass-hard", "reacher-dark", "walker-walk")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("datasets") / "walker"
    collect("walker-walk", "repeat", 3, 0, folder, progress=False, episode_steps=60)
    return folder


@pytest.mark.parametrize("task", [t if t in QUICK else pytest.param(t, marks=pytest.mark.slow) for t in BODIES])
def test_what_was_just_collected_is_the_same_bits(task):
    environment = make(task, episode_steps=min(100, make(task).episode_steps))
    episode = roll_out(environment, "repeat" if goal_task(task) is None else "waypoints", 0, 0)
    drift = replay(episode, task)
    assert drift.largest <= (1e-9 if task.startswith("cheetah") else 0)
    assert drift.by_step.shape == (episode.length,)
    assert drift.shift == 0


@pytest.mark.parametrize("task", ["walker-walk", "point_mass-easy"])
def test_states_after_are_those_of_steps(task):
    """From the middle of an episode, in contact, and over more actions than go into one call."""
    one, other = make(task, episode_steps=1500), make(task, episode_steps=1500)
    actions = np.random.default_rng(0).uniform(-1, 1, (1100, one.action_space.shape[0])).astype(np.float32)
    for environment in (one, other):
        environment.reset(seed=3)
        for action in actions[:40]:
            environment.step(action)
    steps = [one.step(action)[-1]["physics"] for action in actions]
    np.testing.assert_array_equal(states_after(other, actions), steps)
    np.testing.assert_array_equal(other.physics_state(), steps[-1])


def test_the_command_says_it_at_a_glance(folder, tmp_path, capsys):
    out = tmp_path / "drift.json"
    assert main([str(folder), "--json", str(out)]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{folder}: all 3 episodes, 180 steps, played again as walker-walk\n")
    assert "difference    0 at most, bit for bit" in said
    assert "1e-09         0 of 3\n" in said
    assert len(said.splitlines()) <= 25
    content = json.loads(out.read_text())
    assert content["largest"] == 0
    assert content["largest_by_step"] == [0.0] * 60
    assert [episode["first_beyond"] for episode in content["of_episodes"]] == [
        {"1e-09": None, "1e-06": None, "1e-03": None}
    ] * 3
    # Any task of the body, some of the episodes.
    assert main([str(folder), "--task", "walker-spin", "--limit-steps", "120", "--spread"]) == 0
    assert "2 of 3 episodes, spread evenly, 120 steps, played again as walker-spin" in capsys.readouterr().out


@pytest.mark.slow
def test_processes_share_the_work(folder):
    one, two = (replay_folder(folder, workers=workers, progress=False) for workers in (1, 2))
    assert [drift.episode for drift in one.drifts] == [drift.episode for drift in two.drifts]
    np.testing.assert_array_equal(one.by_step(), two.by_step())


@pytest.mark.parametrize(("rows", "where"), [(-1, "later"), (1, "earlier")])
def test_actions_off_by_one_are_found(folder, tmp_path, capsys, rows, where):
    """By hand: the column of actions moved by a row, as by a writer that knows no dummy row, or has two."""
    for path in list_episodes(folder):
        with np.load(path) as arrays:
            np.savez(tmp_path / path.name, **{**arrays, "action": np.roll(arrays["action"], rows, axis=0)})
    assert main([str(tmp_path), "--task", "walker-walk"]) == 2
    said = capsys.readouterr()
    assert "3 of 3" in said.out, "the report stands before the error"
    assert f"the actions of 3 of 3 episodes, such as episode_000000_60.npz, are off by one: they fit a row {where}" in (
        said.err
    )


def test_where_the_drift_begins(folder, tmp_path):
    """A stored state that was changed, and a body that is another one from there on: neither is off by one."""
    episode = read_episode(list_episodes(folder)[0])
    physics = episode.physics.copy()
    physics[20, 3] += 2e-4
    drift = replay(replace(episode, physics=physics), "walker-walk")
    assert [drift.first_beyond(threshold) for threshold in (1e-9, 1e-6, 1e-3)] == [20, 20, None]
    assert (drift.largest, drift.shift) == (pytest.approx(2e-4), 0)
    actions = episode.action.copy()
    actions[30:] *= -1
    drift = replay(replace(episode, action=actions), "walker-walk")
    assert (drift.first_beyond(1e-9), drift.shift) == (31, 0)
    write_episode(tmp_path, 0, replace(episode, physics=physics))
    write_episode(tmp_path, 1, replace(episode, action=actions))
    replayed = replay_folder(tmp_path, "walker-walk", progress=False)
    assert "1e-09         2 of 2         20, 25.5" in replayed.text()
    assert f"in episode_000001_60.npz after step {drift.by_step.argmax() + 1}" in replayed.text()
    assert replayed.by_step()[19] == pytest.approx(2e-4)
    one = replay_folder(tmp_path, "walker-walk", Selection(limit_steps=60), progress=False)
    assert one.chosen == "the first 1 of 2 episodes in file-name order"


def test_errors_are_words(folder, tmp_path, capsys):
    episode = read_episode(list_episodes(folder)[0])
    write_episode(tmp_path, 0, replace(episode, physics=None))
    for arguments, message in (
        ([tmp_path], "has no collect.json that names its task; give --task"),
        ([tmp_path, "--task", "walker-walk"], "no physics states"),
        ([tmp_path, "--task", "walker-wlak"], "did you mean 'walker-walk'"),
        ([folder, "--task", "cheetah-run"], "was collected on 'walker-walk', whose actions are none of 'cheetah-run'"),
        ([tmp_path, "--task", "reacher-dark"], "no physics states"),
        ([folder, "--task", "quadruped-escape"], "cannot be played again: every episode draws a terrain"),
        ([folder, "--workers", "0"], "workers must be 1 to"),
        ([folder / "nowhere"], "no dataset at"),
    ):
        assert main([str(argument) for argument in arguments]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert "Traceback" not in error
    walker = replace(episode, action=episode.action[:, :2], physics=episode.physics[:, :4])
    with pytest.raises(DataError, match="not an episode of walker-walk's body, which has 6 actions and 18 numbers"):
        replay(walker, "walker-walk")
    hard = roll_out(make("point_mass-hard", episode_steps=5), "uniform", 0, 0)
    with pytest.raises(DataError, match="draws a gains for every episode, and this one did not keep its own"):
        replay(replace(hard, extras={}), "point_mass-hard")
