"""build on published archives: slices, shards and their merge, bad episodes left out, a killed build that goes on."""

import json
import os
import re
import resource
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from data import DataError, TrajectoryStore
from data.build import build
from data.collect import collect
from data.exorl import list_episodes, read_episode, write_episode
from data.info import describe
from data.merge import main, merge
from data.origin import Origin
from data.relabel import relabel
from data.reward_log import RewardLog
from data.selection import Shard

ROOT = Path(__file__).parents[2]
TASK = "cartpole-swingup"
QUIET = {"workers": 1, "progress": False}


@pytest.fixture(scope="module")
def cartpole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("datasets") / "cartpole"
    collect("cartpole-balance_sparse", "uniform", 7, 0, folder, progress=False, episode_steps=25)
    return folder


def linked(folder, source, count):
    """A folder of so many episodes: those of the source again and again, under names of their own."""
    folder.mkdir()
    for index in range(count):
        path = list_episodes(source)[index % len(list_episodes(source))]
        os.link(path, folder / re.sub(r"_\d+_", f"_{index:06d}_", path.name))
    return folder


def assert_equal_stores(left, right):
    one, two = TrajectoryStore.open(left), TrajectoryStore.open(right)
    assert (one.content_hash, one.made_from, one.source) == (two.content_hash, two.made_from, two.source)
    np.testing.assert_array_equal(one.start, two.start)
    np.testing.assert_array_equal(one.returns, two.returns)
    assert one.fields == two.fields
    for field in one.fields:
        np.testing.assert_array_equal(one.column(field), two.column(field))
    np.testing.assert_allclose(one.statistics.observation_std, two.statistics.observation_std, rtol=1e-6)


def test_the_slice_is_recorded_and_part_of_what_it_was_made_from(cartpole, tmp_path, capsys):
    out = tmp_path / "s.h5"
    seen = {}
    for options, chosen, words in (
        ({"skip_steps": 50, "limit_steps": 75}, [2, 3, 4], "the first 3 of 7 episodes in file-name order, after the"),
        ({"skip_steps": 50}, [2, 3, 4, 5, 6], "after the first 50 steps"),
        ({"limit_steps": 75, "spread": True}, [1, 3, 5], "3 of 7 episodes, spread evenly"),
        ({"limit_steps": 75}, [0, 1, 2], "the first 3 of 7 episodes in file-name order"),
    ):
        assert build(cartpole, TASK, out, **options, **QUIET)
        store = TrajectoryStore.open(out)
        for episode, index in enumerate(chosen):
            stored = read_episode(list_episodes(cartpole)[index])
            np.testing.assert_array_equal(store.trajectory(episode).observation, stored.observation)
        assert store.episodes == len(chosen)
        assert words in store.source
        assert words in describe(out)
        assert json.loads(Origin.of(out).settings).items() >= options.items()
        assert not build(cartpole, TASK, out, **options, **QUIET)
        seen[store.made_from] = store.content_hash
    assert len(set(seen.values())) == len(seen) == 4


@pytest.mark.parametrize("task", [TASK, "point_mass-dark"])
def test_merged_shards_are_the_store_of_one_build(cartpole, tmp_path, task, capsys):
    folder = cartpole
    if task != TASK:
        folder = tmp_path / "dark"
        collect(task, "waypoints", 7, 0, folder, progress=False)
    whole, out = tmp_path / "whole.h5", tmp_path / "merged.h5"
    options = {"limit_steps": 24 * 6 + 7, **QUIET}
    build(folder, task, whole, **options)
    count = 3
    for index in reversed(range(count)):
        assert build(folder, task, out, shard=f"{index}/{count}", **options)
        assert not build(folder, task, out, shard=f"{index}/{count}", **options)
    assert not out.exists()
    merge(out, progress=False)
    assert_equal_stores(whole, out)
    assert not build(folder, task, out, **options), "one build finds it up to date"
    capsys.readouterr()
    assert main([str(out), "--delete"]) == 0
    assert "from 3 shards" in capsys.readouterr().out
    assert {path.name for path in tmp_path.glob("*.h5")} == {"whole.h5", "merged.h5"}


def test_shards_that_do_not_belong_together(cartpole, tmp_path, capsys):
    out = tmp_path / "s.h5"
    with pytest.raises(DataError, match=r"no shards of .*s.h5: there is no s.shard-0-of-8.h5 or the like"):
        merge(out)
    build(cartpole, TASK, out, shard="1/4", **QUIET)
    with pytest.raises(DataError, match=r"shards 0, 2, 3 of 4 of .* are missing; build with `--shard 0/4`"):
        merge(out)
    build(cartpole, TASK, out, shard="0/2", **QUIET)
    with pytest.raises(DataError, match=r"holds shards of s.h5 in 2 and in 4 parts; delete those of the older build"):
        merge(out)
    Shard(1, 4).path(out).unlink()
    build(cartpole, "cartpole-balance", out, shard="1/2", **QUIET)
    with pytest.raises(DataError, match=r"s.shard-1-of-2.h5 was built with other settings or versions"):
        merge(out)
    grown = linked(tmp_path / "grown", cartpole, 8)
    build(grown, TASK, out, shard="1/2", **QUIET)
    with pytest.raises(DataError, match=r"s.shard-1-of-2.h5 is a part of other episodes than s.shard-0-of-2.h5"):
        merge(out)
    assert not out.exists()
    assert build(grown, TASK, out, shard="0/2", **QUIET)
    assert merge(out, progress=False).episodes == 8
    out.unlink()
    for index in range(2):
        build(cartpole, TASK, out, shard=f"{index}/2", **QUIET)
    last = Shard(1, 2).path(out)
    last.write_bytes(last.read_bytes()[:-9])
    assert main([str(out)]) == 2
    assert "is damaged or cut off" in capsys.readouterr().err
    out.write_text("precious")
    assert main([str(out)]) == 2
    assert "exists and is no trajectory store" in capsys.readouterr().err
    with pytest.raises(DataError, match="--shard 0/9: only 7 episodes are chosen"):
        build(cartpole, TASK, tmp_path / "t.h5", shard="0/9", **QUIET)


@pytest.mark.parametrize(("task", "workers"), [(TASK, 2), (TASK, 1), ("point_mass-dark", 1)])
def test_bad_episodes_are_left_out_only_when_asked(cartpole, tmp_path, workers, task, capsys):
    folder, out = tmp_path / "episodes", tmp_path / "s.h5"
    collect("point_mass-dark", "waypoints", 7, 0, tmp_path / "dark", progress=False)
    linked(folder, cartpole if task == TASK else tmp_path / "dark", 7)
    paths = list_episodes(folder)
    episode = read_episode(paths[5])
    for path in (paths[2], paths[5]):
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(content[:-40])
    paths[5].unlink()
    write_episode(folder, 5, replace(episode, physics=None))
    with pytest.raises(DataError, match=re.escape(f"{paths[2]}: cut off or damaged")):
        build(folder, task, out, **QUIET)
    assert build(folder, task, out, skip_bad=True, workers=workers, progress=False)
    said = capsys.readouterr().err
    assert f"left out: {paths[2]}: cut off or damaged" in said
    assert f"left out: {paths[5]}: has no physics" in said
    store = TrajectoryStore.open(out)
    assert store.episodes == 5
    assert [message.split(": ")[0] for message in store.skipped] == [str(paths[2]), str(paths[5])]
    assert f"left out  2 bad, such as {paths[2]}: cut off" in describe(out)
    assert not build(folder, task, out, skip_bad=True, **QUIET)
    for index in range(2):
        build(folder, task, out.with_name("m.h5"), skip_bad=True, shard=f"{index}/2", **QUIET)
    merge(out.with_name("m.h5"), progress=False)
    assert_equal_stores(out, out.with_name("m.h5"))
    assert TrajectoryStore.open(out.with_name("m.h5")).skipped == store.skipped
    for path in paths[:2] + paths[3:]:
        path.unlink()
    with pytest.raises(DataError, match="needs at least one trajectory; got none"):
        build(folder, task, tmp_path / "none.h5", skip_bad=True, **QUIET)


# --- rewards that were computed before the build was killed ---


def test_the_log_keeps_what_is_whole(tmp_path):
    out, rng = tmp_path / "s.h5", np.random.default_rng(0)
    rewards = {bytes([index]) * 32: rng.random(9000).astype(np.float32) for index in range(5)}
    log = RewardLog(out, b"a" * 32)
    for digest, reward in rewards.items():
        log.add(digest, reward)
        assert log.path.exists() == (digest[0] >= 2), "few rewards are not worth a file"
    log.close(delete=False)

    def known(of=b"a" * 32):
        again = RewardLog(out, of)
        return {digest: again.get(digest) for digest in rewards if again.get(digest) is not None}

    whole = log.path.read_bytes()
    assert known().keys() == rewards.keys()
    assert not known(b"b" * 32)
    for cut in (-1, -36001, -40000, 33):
        log.path.write_bytes(whole[:cut])
        kept = known()
        assert len(kept) == (4, 4, 3, 0)[(-1, -36001, -40000, 33).index(cut)]
        for digest, reward in kept.items():
            np.testing.assert_array_equal(reward, rewards[digest])
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 1
    log.path.write_bytes(damaged)
    assert len(known()) == 2, "nothing behind the damage is believed"
    again = RewardLog(out, b"a" * 32)
    for digest, reward in list(rewards.items())[2:]:
        again.add(digest, reward)
    again.close(delete=False)
    assert log.path.read_bytes() == whole
    again.close(delete=True)
    assert not log.path.exists()


def test_a_build_goes_on_with_the_rewards_that_were_computed(cartpole, tmp_path, monkeypatch):
    folder = linked(tmp_path / "episodes", cartpole, 40)
    monkeypatch.setattr("data.reward_log._WORTH", 100)
    calls = []

    def counted(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 31:
            raise KeyboardInterrupt
        return relabel(*arguments, **options)

    monkeypatch.setattr("data.relabelled.relabel", counted)
    out = tmp_path / "s.h5"
    with pytest.raises(KeyboardInterrupt):
        build(folder, TASK, out, **QUIET)
    assert not out.exists()
    assert build(folder, TASK, out, **QUIET)
    assert len(calls) == 31 + 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ["episodes", "s.h5"]
    build(folder, TASK, tmp_path / "at_once.h5", **QUIET)
    assert_equal_stores(out, tmp_path / "at_once.h5")


def test_a_log_without_room_says_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("data.reward_log._WORTH", 1)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    log = RewardLog(tmp_path / "s.h5", b"a" * 32)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50, limit[1]))
        for index in range(3):
            log.add(bytes([index]) * 32, np.zeros(10, np.float32))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    log.close(delete=False)
    assert RewardLog(tmp_path / "s.h5", b"a" * 32).get(bytes(32)) is None


@pytest.mark.slow
def test_a_million_steps_within_two_gibibytes_killed_and_continued(tmp_path):
    collect("cartpole-balance", "uniform", 20, 0, tmp_path / "few", progress=False)
    folder, out = linked(tmp_path / "episodes", tmp_path / "few", 1000), tmp_path / "s.h5"
    command = [sys.executable, "-m", "data.build", "--exorl", folder, "--task", TASK, "--out", out, "--workers", "2"]
    # The largest of its processes, as the system counts at their end; half of the limit each for two workers and it.
    script = (
        "import resource, sys\nfrom data.build import main\ncode = main(sys.argv[1:])\n"
        "of = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)\n"
        "print('KiB', *(resource.getrusage(who).ru_maxrss for who in of))\nsys.exit(code)"
    )
    process = subprocess.Popen(list(map(str, command)), cwd=ROOT, stderr=subprocess.DEVNULL)
    log = tmp_path / ".s.h5.rlring-rewards"
    deadline = time.monotonic() + 300
    while not log.exists() or log.stat().st_size < 4 * 300_000:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.wait()
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, command[3:])], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    own, worker = map(int, done.stdout.split("KiB")[1].split())
    assert own + 2 * worker < 2 * 1024**2
    assert TrajectoryStore.open(out).steps == 1_000_000


# --- launch files ---


def run_launched(words, tmp_path, **environment):
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True, exist_ok=True)
    python.unlink(missing_ok=True)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    everything = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    done = subprocess.run(list(map(str, words)), cwd=tmp_path, env=everything, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_launch_files_build_every_shard(cartpole, tmp_path):
    arguments = ["--exorl", cartpole, "--task", TASK, "--out", "stores/a.h5"]
    for index in range(2):
        slurm = {"SLURM_ARRAY_TASK_ID": index, "SLURM_ARRAY_TASK_COUNT": 2, "SLURM_CPUS_PER_TASK": 1}
        words = ["bash", ROOT / "configs/launch/build.sbatch", *arguments]
        run_launched(words, tmp_path, **{name: str(value) for name, value in slurm.items()})
    assert_equal_after_merge(cartpole, tmp_path / "stores/a.h5")

    job = yaml.safe_load((ROOT / "configs/launch/build.yaml").read_text())
    assert job["spec"]["completionMode"] == "Indexed"
    (container,) = job["spec"]["template"]["spec"]["containers"]
    count = job["spec"]["completions"]
    for index in range(count):
        words = [
            word.replace("$(JOB_COMPLETION_INDEX)", str(index)) for word in container["command"] + container["args"]
        ]
        words[0] = str(tmp_path / ".venv/bin/python")
        given = {"--exorl": cartpole, "--task": TASK, "--out": "stores/b.h5", "--workers": "1"}
        words = [str(given.get(before, word)) for before, word in zip(["", *words], words, strict=False)]
        run_launched(words, tmp_path)
    assert count == 4
    assert_equal_after_merge(cartpole, tmp_path / "stores/b.h5")


def assert_equal_after_merge(folder, out):
    merge(out, progress=False)
    build(folder, TASK, out.with_suffix(".whole.h5"), **QUIET)
    assert_equal_stores(out, out.with_suffix(".whole.h5"))
