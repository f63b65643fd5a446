"""collect: episodes are functions of their seed, whatever the workers, and interrupted work goes on where it was."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from data import collect as command
from data.collect import collect, main, roll_out
from data.dmc import make
from data.errors import DataError
from data.exorl import list_episodes, read_episode
from data.policies import POLICIES
from data.relabel import relabel
from data.tasks import goal_task

ROOT = Path(__file__).parents[2]


def content(folder) -> dict[str, list[bytes]]:
    """Returns the raw bytes of every array of every episode, by file name."""
    episodes = {path.name: read_episode(path) for path in list_episodes(folder)}
    return {
        name: [array.tobytes() for array in (t.observation, t.action, t.reward, t.physics, *t.extras.values())]
        for name, t in episodes.items()
    }


def test_an_episode_on_disk(tmp_path):
    collect("point_mass-dark", "waypoints", 3, seed=1, out=tmp_path, progress=False)
    paths = list_episodes(tmp_path)
    assert [path.name for path in paths] == [f"episode_{index:06d}_16.npz" for index in range(3)]
    stored, again = read_episode(paths[2]), roll_out(make("point_mass-dark"), "waypoints", 1, 2)
    assert stored.observation.shape == (17, 4)
    assert stored.action.shape == (16, 2)
    assert stored.extras["goal"].shape == (17, 2)
    np.testing.assert_array_equal(stored.physics, again.physics)
    np.testing.assert_array_equal(stored.observation, stored.physics.astype(np.float32))
    np.testing.assert_array_equal(relabel("point_mass-dark", stored), stored.reward)
    note = json.loads((tmp_path / "collect.json").read_text())
    assert set(note.pop("versions")) == {"dm_control", "mujoco", "numpy"}
    assert note == {"task": "point_mass-dark", "policy": "waypoints", "seed": 1, "episode_steps": 16}
    assert not list(tmp_path.glob(".*"))


def test_the_same_episodes_whatever_the_workers_and_the_interruptions(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "_CHUNK", 2)
    collect("reacher-easy", "pink", 6, seed=4, out=tmp_path / "one", progress=False, episode_steps=5)
    collect("reacher-easy", "pink", 6, seed=4, out=tmp_path / "two", workers=2, progress=False, episode_steps=5)

    count = 0

    def interrupted(*arguments):
        nonlocal count
        count += 1
        if count == 4:
            raise KeyboardInterrupt
        return roll_out(*arguments)

    monkeypatch.setattr(command, "roll_out", interrupted)
    options = {"seed": 4, "out": tmp_path / "three", "progress": False, "episode_steps": 5}
    with pytest.raises(KeyboardInterrupt):
        collect("reacher-easy", "pink", 6, **options)
    assert len(list_episodes(tmp_path / "three")) == 3
    # What a lost power supply leaves: a name without its content, and a temporary file.
    damaged = list_episodes(tmp_path / "three")[1]
    damaged.write_bytes(damaged.read_bytes()[:-30])
    (tmp_path / "three" / ".episode_000005_5.npz.rlring-partial").write_bytes(b"PK")
    monkeypatch.setattr(command, "roll_out", roll_out)
    collect("reacher-easy", "pink", 6, **options)

    expected = content(tmp_path / "one")
    assert len(expected) == 6
    assert content(tmp_path / "two") == expected
    assert content(tmp_path / "three") == expected
    files = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "three").iterdir()}
    collect("reacher-easy", "pink", 6, **options)
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "three").iterdir()} == files
    collect("reacher-easy", "pink", 8, **options)
    assert {name: content(tmp_path / "three")[name] for name in expected} == expected
    assert len(list_episodes(tmp_path / "three")) == 8


@pytest.mark.parametrize("signal_", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_interrupted_it_ends_at_once_and_leaves_whole_files(tmp_path, signal_):
    """At once: not after the episodes that a worker was given, which would take minutes here."""
    out = tmp_path / "episodes"
    arguments = "--task pendulum-swingup --policy uniform --episodes 10000 --episode-steps 8000 --workers 2 --out"
    process = subprocess.Popen(
        [sys.executable, "-m", "data.collect", *arguments.split(), out],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not list(out.glob("*.npz")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    # A terminal sends it to every process, who kills one knows its number.
    (os.killpg if signal_ == signal.SIGINT else os.kill)(process.pid, signal_)
    try:
        _, error = process.communicate(timeout=30)  # closed when the last worker is gone
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert "Traceback" not in error
    if signal_ == signal.SIGINT:
        assert process.returncode == 130
        assert error.splitlines()[-1].startswith("interrupted; ")
        assert not list(out.glob(".*"))
    for path in list_episodes(out):
        assert read_episode(path).length == 8000


def test_two_do_not_collect_into_one_folder(tmp_path):
    collect("point_mass-dark", "uniform", 1, 0, tmp_path, progress=False)
    with open(tmp_path / "collect.json") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(DataError, match=rf"another process collects into {tmp_path} right now; wait for it"):
            collect("point_mass-dark", "uniform", 2, 0, tmp_path, progress=False)
    collect("point_mass-dark", "uniform", 2, 0, tmp_path, progress=False)


def test_two_do_not_collect_into_one_folder_whose_note_is_written_anew(tmp_path, monkeypatch):
    note = tmp_path / "collect.json"
    collect("point_mass-dark", "uniform", 1, 0, tmp_path, progress=False)
    note.write_text(json.dumps({**json.loads(note.read_text()), "versions": {"numpy": "1.0"}}))

    def meanwhile(*arguments):
        monkeypatch.setattr(command, "roll_out", roll_out)
        with pytest.raises(DataError, match=r"another process collects into"):
            collect("point_mass-dark", "uniform", 2, 0, tmp_path, progress=False)
        return roll_out(*arguments)

    monkeypatch.setattr(command, "roll_out", meanwhile)
    collect("point_mass-dark", "uniform", 2, 0, tmp_path, progress=False)
    note.write_text(json.dumps({**json.loads(note.read_text()), "versions": "1.0"}))
    with pytest.raises(DataError, match=r"collect.json is not what data.collect writes"):
        collect("point_mass-dark", "uniform", 3, 0, tmp_path, progress=False)


def test_foreign_files_in_the_folder_stay(tmp_path):
    collect("point_mass-dark", "uniform", 1, 0, tmp_path, progress=False)
    foreign = ["episode_x_16.npz", "episode_000001.npz", "notes.txt", ".episode_000001_16.npz.tmp", "episode_1_2.npz"]
    for name in foreign:
        (tmp_path / name).write_text(name)
    collect("point_mass-dark", "uniform", 3, 0, tmp_path, progress=False)
    assert all((tmp_path / name).read_text() == name for name in foreign)
    assert all((tmp_path / f"episode_{index:06d}_16.npz").exists() for index in range(3))


def test_seeds_differ(tmp_path):
    environment = make("cartpole-swingup", episode_steps=5)
    first, other_index, other_seed = (roll_out(environment, "uniform", *key) for key in ((0, 0), (0, 1), (1, 0)))
    for other in (other_index, other_seed):
        assert not np.array_equal(first.physics[0], other.physics[0])
        assert not np.array_equal(first.action, other.action)


@pytest.mark.parametrize("policy", ["uniform", "repeat", "pink"])
def test_noise_fills_the_box(policy: str):
    environment = make("walker-walk", episode_steps=200)
    environment.reset(seed=0)
    acts = [POLICIES[policy](environment, np.random.default_rng(index)) for index in range(20)]
    actions = np.stack([[act(step, np.zeros(18)) for step in range(200)] for act in acts])
    assert actions.shape == (20, 200, 6)
    assert actions.dtype == np.float32
    assert np.abs(actions).max() <= 1.0
    assert abs(actions.mean()) < 0.1
    assert 0.5 < actions.std() < 0.8
    following = np.mean(actions[:, 1:] * actions[:, :-1]) / np.mean(actions**2)
    low, high = {"uniform": (-0.05, 0.05), "repeat": (0.7, 0.9), "pink": (0.5, 0.95)}[policy]
    assert low < following < high


def test_the_power_of_pink_noise_falls_as_one_over_frequency():
    environment = make("pendulum-swingup", episode_steps=512)
    environment.reset(seed=0)
    acts = [POLICIES["pink"](environment, np.random.default_rng(index)) for index in range(100)]
    noise = np.stack([[act(step, np.zeros(2))[0] for step in range(512)] for act in acts])
    power = np.mean(np.abs(np.fft.rfft(noise)) ** 2, axis=0)[4:128]
    slope = np.polyfit(np.log(np.arange(4, 128)), np.log(power), 1)[0]
    assert -1.2 < slope < -0.7


@pytest.mark.parametrize("name", ["point_mass-dark", "reacher-dark"])
def test_waypoints_meet_a_random_goal_one_time_in_four_and_stay_somewhere(name: str):
    task, environment, rng = goal_task(name), make(name), np.random.default_rng(0)
    physics = np.stack([roll_out(environment, "waypoints", 0, index).physics[1:] for index in range(150)])
    goals = np.stack([task.sample_goal(rng) for _ in range(1000)])
    met = task.reward(physics[:, None], goals[None, :, None]).max(-1).mean()
    assert 0.2 < met < 0.3
    stays = task.reward(physics[:, -4:], task.hindsight_goal(physics[:, -1:])).min(-1).mean()
    assert stays > 0.5


def test_scripted_spreads_returns_from_chance_to_the_controllers_own():
    environment = make("point_mass-dark")
    returns = [roll_out(environment, "scripted", 0, index).total_reward for index in range(60)]
    assert min(returns) < 2
    assert max(returns) > 8


def test_an_episode_that_terminates_is_short_and_says_so():
    environment = make("lqr-lqr_2_1")
    environment.reset()
    environment._task.get_termination = lambda physics: 0.0 if physics.time() > 0.1 else None
    trajectory = roll_out(environment, "uniform", 0, 0)
    assert trajectory.length == 4
    assert trajectory.discount.tolist() == [1, 1, 1, 0]


def test_the_verb(tmp_path, capsys):
    arguments = ["--task", "point_mass-dark", "--policy", "uniform", "--episodes", "2", "--seed", "0"]
    assert main([*arguments, "--out", str(tmp_path / "a")]) == 0
    assert len(list_episodes(tmp_path / "a")) == 2
    arguments[1] = "walker-wlak"
    assert main([*arguments, "--out", str(tmp_path / "b")]) == 2
    assert "did you mean 'walker-walk'" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_errors(tmp_path):
    out = tmp_path / "episodes"
    with pytest.raises(DataError, match="policy 'waypoint' does not exist; choose one of uniform"):
        collect("walker-walk", "waypoint", 1, 0, out)
    with pytest.raises(DataError, match="walker-walk hides none"):
        collect("walker-walk", "waypoints", 1, 0, out)
    with pytest.raises(DataError, match="walker-walk has no scripted controller; these have one: cartpole-balance"):
        collect("walker-walk", "scripted", 1, 0, out)
    assert not out.exists()
    collect("point_mass-dark", "uniform", 1, 0, out, progress=False)
    with pytest.raises(DataError, match="holds episodes of seed 0, and this run is of seed 1"):
        collect("point_mass-dark", "uniform", 1, 1, out)
    (out / "collect.json").write_text("{")
    with pytest.raises(DataError, match=r"collect.json is damaged"):
        collect("point_mass-dark", "uniform", 1, 0, out)
    (out / "collect.json").write_text("[1]")
    with pytest.raises(DataError, match=r"collect.json is not what data.collect writes"):
        collect("point_mass-dark", "uniform", 1, 0, out)
    (out / "collect.json").unlink()
    with pytest.raises(DataError, match=r"no collect.json that says of what"):
        collect("point_mass-dark", "uniform", 1, 0, out)


def test_other_versions_are_noted_and_block_nothing(tmp_path, capsys):
    out = tmp_path / "episodes"
    collect("point_mass-dark", "uniform", 1, 0, out, progress=False)
    note = json.loads((out / "collect.json").read_text())
    now = note["versions"]["numpy"]
    (out / "collect.json").write_text(json.dumps({**note, "versions": {**note["versions"], "numpy": "1.0"}}))
    collect("point_mass-dark", "uniform", 1, 0, out, progress=False)  # nothing is missing
    assert capsys.readouterr().err == ""
    for episodes in (2, 3):
        collect("point_mass-dark", "uniform", episodes, 0, out, progress=False)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        f"note: the episodes in {out} so far were made with numpy 1.0 ({now} now); collect.json keeps both"
    ]
    kept = json.loads((out / "collect.json").read_text())
    assert kept == {**note, "versions": {**note["versions"], "numpy": f"1.0, {now}"}}
    assert len(list(out.glob("*.npz"))) == 3


def test_data_packages_leave_jax_alone():
    # The test session imports jax itself, so this asks a fresh interpreter.
    code = "import sys, data.collect, data.relabel; raise SystemExit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
