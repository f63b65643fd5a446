import errno
import json
import os
import re
import resource
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from data import ChainSampler, DataError, TrajectoryStore, cli
from data.build import build, main
from data.collect import collect
from data.exorl import list_episodes, read_episode, write_episode
from data.relabel import relabel
from data.store_writer import write_store
from tests.data.test_store import episodes

ROOT = Path(__file__).parents[2]
TASK = "cartpole-swingup"
STEPS = 25


@pytest.fixture(scope="module")
def cartpole(tmp_path_factory):
    """Six short episodes collected on cartpole-balance_sparse."""
    folder = tmp_path_factory.mktemp("datasets") / "cartpole"
    collect("cartpole-balance_sparse", "uniform", 6, 0, folder, progress=False, episode_steps=STEPS)
    return folder


@pytest.fixture(scope="module")
def dark(tmp_path_factory):
    folder = tmp_path_factory.mktemp("datasets") / "dark"
    collect("point_mass-dark", "waypoints", 60, 0, folder, progress=False)
    return folder


def copy_episodes(source, folder):
    for index, path in enumerate(list_episodes(source)):
        write_episode(folder, index, read_episode(path))
    return folder


def command(*arguments):
    return [sys.executable, "-m", "data.build", *map(str, arguments)]


@pytest.mark.parametrize("control", ["actual", "exorl"])
def test_rewards_are_those_of_the_task(cartpole, tmp_path, control):
    assert build(cartpole, TASK, tmp_path / "s.h5", workers=1, control=control, progress=False)
    store = TrajectoryStore.open(tmp_path / "s.h5", TASK)
    assert (store.episodes, store.control, store.goal) == (6, control, None)
    assert store.fields == ("observation", "action", "reward", "discount")
    for index, path in enumerate(list_episodes(cartpole)):
        episode = read_episode(path)
        np.testing.assert_array_equal(store.trajectory(index).observation, episode.observation)
        np.testing.assert_array_equal(store.trajectory(index).action, episode.action)
        np.testing.assert_array_equal(store.trajectory(index).reward, relabel(TASK, episode, control=control))
        assert not np.array_equal(store.trajectory(index).reward, episode.reward)


def test_workers_change_nothing(cartpole, tmp_path):
    for workers in (1, 2):
        build(cartpole, TASK, tmp_path / f"{workers}.h5", workers=workers, progress=False)
    one, two = (TrajectoryStore.open(tmp_path / f"{workers}.h5") for workers in (1, 2))
    assert one.content_hash == two.content_hash
    for field in one.fields:
        np.testing.assert_array_equal(one.column(field), two.column(field))


def test_hidden_goals_keep_physics_and_pay_nothing_yet(dark, tmp_path):
    assert build(dark, "point_mass-dark", tmp_path / "s.h5", progress=False)
    store = TrajectoryStore.open(tmp_path / "s.h5")
    assert (store.goal, store.control) == ("hindsight", None)
    assert not store.column("reward").any()
    for index, path in enumerate(list_episodes(dark)):
        np.testing.assert_array_equal(store.trajectory(index).physics, read_episode(path).physics)
    batch = ChainSampler(store, trajectories=4, seed=0).sample(0, 8)
    assert batch.reward.any(1).all()


def test_a_second_build_is_up_to_date(cartpole, tmp_path, capsys):
    out = tmp_path / "s.h5"
    assert build(cartpole, TASK, out, workers=1, progress=False)
    assert f"wrote {out}: 6 episodes, 150 steps of {TASK}" in capsys.readouterr().out
    written = out.stat().st_mtime_ns
    assert not build(cartpole, TASK, out, workers=2, progress=False)
    assert f"{out} is up to date: 6 episodes, 150 steps of {TASK}" in capsys.readouterr().out
    assert out.stat().st_mtime_ns == written


@pytest.mark.parametrize("change", ["task", "control", "limit", "episode"])
def test_another_source_is_built_again(cartpole, tmp_path, change, capsys):
    out, folder = tmp_path / "s.h5", copy_episodes(cartpole, tmp_path / "episodes")
    options = {"task": TASK, "out": out, "workers": 1, "progress": False}
    build(folder, **options)
    before = TrajectoryStore.open(out).content_hash
    if change == "episode":
        path = list_episodes(folder)[2]
        episode = read_episode(path)
        write_episode(folder, 2, replace(episode, action=-episode.action))
    else:
        options |= {
            "task": {"task": "cartpole-balance"},
            "control": {"control": "exorl"},
            "limit": {"limit_steps": 60},
        }[change]
    assert build(folder, **options)
    assert "was made from other episodes, for another task or by other versions" in capsys.readouterr().out
    assert TrajectoryStore.open(out).content_hash != before


def test_limit_steps_takes_whole_episodes_in_file_name_order(cartpole, tmp_path):
    for limit, count in ((25, 1), (74, 2), (75, 3), (10**9, 6)):
        build(cartpole, TASK, tmp_path / "s.h5", workers=1, limit_steps=limit, progress=False)
        store = TrajectoryStore.open(tmp_path / "s.h5")
        assert store.episodes == count
        first = read_episode(list_episodes(cartpole)[count - 1])
        np.testing.assert_array_equal(store.trajectory(count - 1).observation, first.observation)
    with pytest.raises(DataError, match=r"--limit-steps 24 is less than the first episode of .*, 25 steps; raise it"):
        build(cartpole, TASK, tmp_path / "s.h5", limit_steps=24)


def test_a_damaged_store_is_built_again(cartpole, tmp_path, capsys):
    out = tmp_path / "s.h5"
    build(cartpole, TASK, out, workers=1, progress=False)
    for size in (600, 5000, out.stat().st_size - 1):
        out.write_bytes(out.read_bytes()[:size])
        assert build(cartpole, TASK, out, workers=1, progress=False)
        assert "building again: " in capsys.readouterr().out
        assert TrajectoryStore.open(out).episodes == 6


def _text(path):
    path.write_text("precious")


def _empty(path):
    path.touch()


def _hdf5(path):
    with h5py.File(path, "w") as file:
        file["observations"] = np.zeros(3)


def _truncated_hdf5(path):
    _hdf5(path)
    path.write_bytes(path.read_bytes()[:-100])


def _older_store(path):
    _hdf5(path)
    with h5py.File(path, "r+") as file:
        file.attrs["format"] = "rlring trajectory store"


def _broken_link(path):
    path.symlink_to(path.parent / "elsewhere")


STRANGERS = [_text, _empty, _hdf5, _truncated_hdf5, _older_store, _broken_link, Path.mkdir, os.mkfifo]


@pytest.mark.parametrize("make", STRANGERS)
def test_what_is_no_store_is_never_replaced(cartpole, tmp_path, make):
    out = tmp_path / "s.h5"
    make(out)
    before = out.lstat()
    with pytest.raises(
        DataError, match=rf"{out} exists and is no trajectory store .*; choose another --out, or delete"
    ):
        build(cartpole, TASK, out, workers=1, progress=False)
    after = out.lstat()
    assert (before.st_ino, before.st_size, before.st_mtime_ns) == (after.st_ino, after.st_size, after.st_mtime_ns)
    assert list(tmp_path.iterdir()) == [out]


def test_a_file_that_another_process_has_open_is_never_replaced(cartpole, tmp_path):
    out = tmp_path / "s.h5"
    script = "import sys, h5py; file = h5py.File(sys.argv[1], sys.argv[2]); print('open', flush=True); input()"
    for mode, message in (("w", "is no trajectory store"), ("r+", "another process writes to .* right now")):
        if mode == "r+":
            out.unlink()
            build(cartpole, TASK, out, workers=1, progress=False)
        with subprocess.Popen(
            [sys.executable, "-c", script, out, mode], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as other:
            assert other.stdout.readline() == "open\n"
            inode = out.stat().st_ino
            with pytest.raises(DataError, match=message):
                build(cartpole, "cartpole-balance", out, workers=1, progress=False)
            assert out.stat().st_ino == inode
            other.communicate("\n")


def test_what_appears_during_the_build_is_not_replaced(tmp_path):
    out = tmp_path / "s.h5"

    def slow():
        yield from episodes([3])
        _text(out)

    with pytest.raises(DataError, match="exists and is no trajectory store"):
        write_store(out, slow(), task="walker-walk", source="a test")
    assert out.read_text() == "precious"
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_bad_episode_is_named_and_nothing_is_left(cartpole, tmp_path, workers):
    folder = copy_episodes(cartpole, tmp_path / "episodes")
    path = list_episodes(folder)[4]
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError, match=re.escape(str(path)) + ": cut off or damaged"):
        build(folder, TASK, tmp_path / "out" / "s.h5", workers=workers, progress=False)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("task", [TASK, "point_mass-dark"])
def test_actions_off_by_a_rounding_are_clipped_and_others_refused(cartpole, dark, tmp_path, task):
    folder = copy_episodes(cartpole if task == TASK else dark, tmp_path / "episodes")
    paths = list_episodes(folder)[:2]
    for path in list_episodes(folder)[2:]:
        path.unlink()
    episode = read_episode(paths[1])
    options = {"workers": 1, "progress": False}
    action = episode.action.copy()
    action[3, 0], action[5, 0] = np.nextafter(np.float32(1), np.float32(2)), -1 - 9e-7
    write_episode(folder, 1, replace(episode, action=action))
    build(folder, task, tmp_path / "rounded.h5", **options)
    stored = TrajectoryStore.open(tmp_path / "rounded.h5").trajectory(1)
    np.testing.assert_array_equal(stored.action, np.clip(action, -1, 1))
    for wrong in (1.00001, -1.5, 1e30):
        action[3, 0] = wrong
        write_episode(folder, 1, replace(episode, action=action))
        message = re.escape(str(paths[1])) + r": actions lie in \[-1, 1\]; step 3 has \[.*\]. Clip it to the range"
        with pytest.raises(DataError, match=message):
            build(folder, task, tmp_path / "s.h5", **options)
    assert not (tmp_path / "s.h5").exists()


def test_episodes_without_physics(cartpole, tmp_path):
    episode = read_episode(list_episodes(cartpole)[0])
    write_episode(tmp_path / "episodes", 0, replace(episode, physics=None))
    with pytest.raises(DataError, match="has no physics, and rewards are computed from it; use ExoRL's zips"):
        build(tmp_path / "episodes", TASK, tmp_path / "s.h5", workers=1, progress=False)


def test_episodes_of_another_task(cartpole, dark, tmp_path):
    with pytest.raises(
        DataError, match="was collected on 'cartpole-balance_sparse', which cannot serve task 'walker-walk'"
    ):
        build(cartpole, "walker-walk", tmp_path / "s.h5")
    unlabelled = copy_episodes(cartpole, tmp_path / "unlabelled")
    with pytest.raises(DataError, match="not an episode of walker-walk's body"):
        build(unlabelled, "walker-walk", tmp_path / "s.h5", workers=1, progress=False)
    easy = tmp_path / "easy"
    collect("point_mass-easy", "uniform", 1, 0, easy, progress=False, episode_steps=5)
    with pytest.raises(
        DataError, match="was collected on 'point_mass-easy', which cannot serve task 'point_mass-dark'"
    ):
        build(easy, "point_mass-dark", tmp_path / "s.h5")
    (easy / "collect.json").write_text(json.dumps(["point_mass-easy"]))
    with pytest.raises(DataError, match=r"collect\.json: not what data\.collect writes"):
        build(easy, "point_mass-dark", tmp_path / "s.h5")


def test_wrong_arguments(cartpole, tmp_path):
    with pytest.raises(DataError, match="--control must be one of actual, exorl; got 'none'"):
        build(cartpole, TASK, tmp_path / "s.h5", control="none")
    with pytest.raises(DataError, match="task 'cartpole-swingupp' does not exist; did you mean 'cartpole-swingup'"):
        build(cartpole, "cartpole-swingupp", tmp_path / "s.h5")
    with pytest.raises(DataError, match=r"no dataset at .*: there is no such folder"):
        build(tmp_path / "nothing", TASK, tmp_path / "s.h5")


def test_a_killed_build_starts_over_cleanly(cartpole, tmp_path):
    """Killed without warning in the middle, it leaves no store and no process, and the same command succeeds."""
    folder, out = tmp_path / "episodes", tmp_path / "s.h5"
    episode = read_episode(list_episodes(cartpole)[0])
    long = replace(
        episode,
        observation=np.tile(episode.observation[:-1], (400, 1))[:9001],
        action=np.tile(episode.action, (400, 1))[:9000],
        reward=np.tile(episode.reward, 400)[:9000],
        discount=np.tile(episode.discount, 400)[:9000],
        physics=np.tile(episode.physics[:-1], (400, 1))[:9001],
        extras={},
    )
    for index in range(4):
        write_episode(folder, index, long)
    arguments = ("--exorl", folder, "--task", TASK, "--out", out, "--workers", 2)
    process = subprocess.Popen(command(*arguments), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    partial = tmp_path / ".s.h5.rlring-partial"
    deadline = time.monotonic() + 120
    while not partial.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(1)
    assert process.poll() is None, "the build ended before it could be killed"
    process.kill()
    # Its workers were not killed; they notice, and only then is the other end of their output closed.
    process.communicate(timeout=60)
    assert not out.exists()
    with pytest.raises(DataError, match="not a trajectory store"):
        TrajectoryStore.open(partial)
    done = subprocess.run(command(*arguments), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert TrajectoryStore.open(out).steps == 4 * 9000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["episodes", "s.h5"]


# --- the command line ---


def test_command_line(cartpole, tmp_path, capsys):
    out = tmp_path / "stores" / "s.h5"
    arguments = ["--exorl", str(cartpole), "--task", TASK, "--out", str(out), "--workers", "1", "--limit-steps", "50"]
    assert main(arguments) == 0
    assert TrajectoryStore.open(out, TASK).source == f"{cartpole}: the first 2 of 6 episodes in file-name order"
    assert main(arguments) == 0
    assert main([*arguments, "--task", "walker-walk"]) == 2
    assert "error: " in capsys.readouterr().err


def test_full_disk_is_one_message(cartpole, tmp_path):
    done = subprocess.run(
        command("--exorl", cartpole, "--task", TASK, "--out", tmp_path / "s.h5", "--workers", 1),
        cwd=ROOT,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"error: the disk is full: could not write {tmp_path / 's.h5'}")
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("raised", "status", "message"),
    [
        (None, 0, ""),
        (DataError("bad"), 2, "error: bad\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "a.h5"),
            2,
            "error: the disk is full: could not write a.h5 (No space left on device); "
            "free some space or choose another --out\n",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "a.h5"), 2, "error: Permission denied: a.h5\n"),
        (OSError(errno.EIO, "Input/output error"), 2, "error: Input/output error\n"),
        (OSError("odd"), 2, "error: odd\n"),
        (
            KeyboardInterrupt(),
            130,
            "interrupted; the same command (training: with --resume) continues or starts over cleanly\n",
        ),
    ],
)
def test_exit_status(raised, status, message, capsys):
    def body():
        if raised is not None:
            raise raised

    assert cli.run(body) == status
    assert capsys.readouterr().err == message


def test_a_caller_may_name_errors_of_its_own(capsys):
    assert cli.run(lambda: {}["x"], KeyError) == 2
    assert capsys.readouterr().err == "error: 'x'\n"


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ValueError, match="a bug"):
        cli.run(lambda: (_ for _ in ()).throw(ValueError("a bug")))
