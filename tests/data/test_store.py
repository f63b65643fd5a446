import multiprocessing
import os
import pickle
import re
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data import DataError, Trajectory, TrajectoryStore
from data.origin import Origin
from data.store_writer import write_store

ROOT = Path(__file__).parents[2]


def episodes(lengths, *, sizes=(3, 2), seed=0):
    rng = np.random.default_rng(seed)
    for steps in lengths:
        yield Trajectory(
            observation=rng.normal(5, 2, (steps + 1, sizes[0])),
            action=rng.uniform(-1, 1, (steps, sizes[1])),
            reward=rng.random(steps),
            discount=rng.integers(0, 2, steps),
            physics=rng.standard_normal((steps + 1, 4)),
            extras={"goal": np.tile(rng.random(2), (steps + 1, 1))},
        )


def write(path, lengths=(3, 1, 5), **options):
    return write_store(path, episodes(lengths), task="walker-walk", source="a test", **options)


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 3)),
    keep_physics=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_round_trip(tmp_path_factory, lengths, sizes, keep_physics, seed):
    path = tmp_path_factory.mktemp("store") / "s.h5"
    written = list(episodes(lengths, sizes=sizes, seed=seed))
    write_store(path, iter(written), task="walker-walk", source="a test", keep_physics=keep_physics)
    store = TrajectoryStore.open(path, "walker-walk")
    assert store.lengths.tolist() == lengths
    assert (store.episodes, store.steps, store.longest) == (len(lengths), sum(lengths), max(lengths))
    assert (store.observation_size, store.action_size) == sizes
    np.testing.assert_array_equal(store.returns, [trajectory.total_reward for trajectory in written])
    assert ("physics" in store.fields) == keep_physics
    for index, expected in enumerate(written):
        found = store.trajectory(index)
        for name in ("observation", "action", "reward", "discount"):
            np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
        rows = slice(store.start[index] + index, store.start[index + 1] + index + 1)
        np.testing.assert_array_equal(store.column("observation")[rows], expected.observation)
        if keep_physics:
            np.testing.assert_array_equal(found.physics, expected.physics)
            np.testing.assert_array_equal(store.column("physics")[rows], expected.physics)
            np.testing.assert_array_equal(found.extras["goal"], expected.extras["goal"])
        else:
            assert found.physics is None
            assert not found.extras


def test_more_rows_than_a_block(tmp_path):
    written = list(episodes([3000, 2000, 5000, 1]))
    store = write_store(tmp_path / "s.h5", written, task="walker-walk", source="a test")
    np.testing.assert_array_equal(store.column("reward"), np.concatenate([t.reward for t in written]))
    observations = np.concatenate([t.observation for t in written]).astype(np.float64)
    np.testing.assert_allclose(store.statistics.observation_mean, observations.mean(0), rtol=1e-6)
    np.testing.assert_allclose(store.statistics.observation_std, observations.std(0), rtol=1e-6)


def test_statistics(tmp_path):
    returns = [3.0, 1.0, 2.0]
    trajectories = [
        Trajectory(np.full((3, 2), [7.0, index]), np.zeros((2, 1)), [value, 0], [1, 1])
        for index, value in enumerate(returns)
    ]
    store = write_store(tmp_path / "s.h5", trajectories, task="walker-walk", source="a test")
    statistics = store.statistics
    assert (statistics.return_min, statistics.return_mean, statistics.return_max) == (1, 2, 3)
    assert statistics.return_quantiles[[0, 3, 6]].tolist() == [1, 2, 3]
    assert statistics.observation_mean.tolist() == [7, 1]
    np.testing.assert_allclose(statistics.observation_std, [0, np.sqrt(2 / 3)])
    np.testing.assert_allclose(statistics.observation_scale, [1, np.sqrt(2 / 3)])


def test_read_takes_slices_and_lists(tmp_path):
    store = write(tmp_path / "s.h5")
    assert [len(rows) for rows in store.read("observation", slice(1, None))] == [2, 6]
    assert [len(rows) for rows in store.read("reward", [2, 0])] == [5, 3]
    with pytest.raises(DataError, match="has episodes 0 to 2; asked for 3"):
        store.read("reward", [3])
    with pytest.raises(DataError, match="has no field 'physics'; it has observation, action, reward, discount"):
        store.read("physics", [0])


def test_attributes(tmp_path):
    store = write(tmp_path / "s.h5", keep_physics=True, goal="hindsight", control="actual")
    assert (store.task, store.source, store.goal, store.control) == ("walker-walk", "a test", "hindsight", "actual")
    assert set(store.versions) == {"dm_control", "mujoco"}
    plain = write(tmp_path / "t.h5")
    assert (plain.goal, plain.control) == (None, None)


def test_content_hash_is_of_the_numbers(tmp_path, monkeypatch):
    first, again = write(tmp_path / "a.h5"), write(tmp_path / "b.h5", origin=Origin("elsewhere"))
    assert re.fullmatch("[0-9a-f]{64}", first.content_hash)
    assert first.content_hash == again.content_hash
    assert first.made_from == ""
    assert again.made_from == Origin("elsewhere").made_from != ""
    with monkeypatch.context() as blocks:
        blocks.setattr("data.store_writer._CHUNK_ROWS", 2)
        assert write(tmp_path / "c.h5").content_hash == first.content_hash
    plain = {"task": "walker-walk", "source": "a test"}
    one, *rest = episodes([3, 1, 5])
    reward = one.reward.copy()
    reward[1] = np.nextafter(reward[1], 2)
    others = {
        "another order of lengths": write(tmp_path / "d.h5", [3, 5, 1]),
        "other episodes": write(tmp_path / "e.h5", [3, 1]),
        "one bit": write_store(tmp_path / "f.h5", [replace(one, reward=reward), *rest], **plain),
        "order": write_store(tmp_path / "g.h5", [*rest, one], **plain),
        "task": write_store(tmp_path / "h.h5", [one, *rest], **{**plain, "task": "walker-run"}),
        "goal": write(tmp_path / "i.h5", goal="hindsight"),
        "control": write(tmp_path / "j.h5", control="exorl"),
        "fields": write(tmp_path / "k.h5", keep_physics=True),
    }
    assert len({first.content_hash, *(store.content_hash for store in others.values())}) == len(others) + 1


def test_wrong_task(tmp_path):
    write(tmp_path / "s.h5")
    with pytest.raises(
        DataError, match=r"is a store of task 'walker-walk'; asked for 'walker-run'. Build the right one"
    ):
        TrajectoryStore.open(tmp_path / "s.h5", "walker-run")


def test_no_store(tmp_path):
    with pytest.raises(DataError, match=r"no store at .*; build one with"):
        TrajectoryStore.open(tmp_path / "s.h5")


def test_not_a_store(tmp_path):
    path = tmp_path / "s.h5"
    path.write_text("hello")
    with pytest.raises(DataError, match="is not a trajectory store; choose another file"):
        TrajectoryStore.open(path)
    with h5py.File(path, "w") as file:
        file["observation"] = np.zeros(3)
    with pytest.raises(
        DataError, match="is an HDF5 file, but no trajectory store of format 2; if it is an older store"
    ):
        TrajectoryStore.open(path)
    with pytest.raises(DataError, match=r"no store at .*: it is no file"):
        TrajectoryStore.open(tmp_path)


def test_another_format(tmp_path):
    path = write(tmp_path / "s.h5").path
    path.write_bytes(path.read_bytes().replace(b"trajectory store 2", b"trajectory store 3"))
    with pytest.raises(DataError, match="has store format 3, and this code reads 2; build it again"):
        TrajectoryStore.open(path)


def test_trajectories_of_different_kinds(tmp_path):
    def mixed(**options):
        yield from episodes([3])
        yield from (
            Trajectory(np.zeros((3, 3)), np.zeros((2, 2)), np.zeros(2), np.ones(2), **options) for _ in range(1)
        )

    with pytest.raises(DataError, match="has no physics, which this store needs"):
        write_store(tmp_path / "s.h5", mixed(), task="a", source="b", keep_physics=True)
    physics = {"physics": np.zeros((3, 5)), "extras": {"goal": np.zeros((3, 2))}}
    with pytest.raises(DataError, match=r"physics has rows float64\[5\], the episodes before it float64\[4\]"):
        write_store(tmp_path / "s.h5", mixed(**physics), task="a", source="b", keep_physics=True)
    with pytest.raises(DataError, match=r"has arrays \[.*\], the episodes before it \[.*'extras/goal'"):
        write_store(tmp_path / "s.h5", mixed(physics=np.zeros((3, 4))), task="a", source="b", keep_physics=True)
    different = (*episodes([3]), *episodes([3], sizes=(2, 2)))
    with pytest.raises(DataError, match=r"observation has rows float32\[2\], the episodes before it float32\[3\]"):
        write_store(tmp_path / "s.h5", different, task="a", source="b")
    with pytest.raises(DataError, match="a store needs at least one trajectory; got none"):
        write_store(tmp_path / "s.h5", [], task="a", source="b")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_older_store(tmp_path):
    before = write(tmp_path / "s.h5")

    def failing():
        yield from episodes([5000, 5000])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_store(tmp_path / "s.h5", failing(), task="walker-walk", source="a test")
    assert [path.name for path in tmp_path.iterdir()] == ["s.h5"]
    assert TrajectoryStore.open(tmp_path / "s.h5").content_hash == before.content_hash


def test_two_writers_notice_each_other(tmp_path):
    def slow():
        yield from episodes([3])
        with pytest.raises(DataError, match=r"another process is writing .*s\.h5 right now"):
            write(tmp_path / "s.h5")

    write_store(tmp_path / "s.h5", slow(), task="walker-walk", source="a test")
    assert TrajectoryStore.open(tmp_path / "s.h5").episodes == 1


def test_leftovers_of_a_killed_writer_are_overwritten(tmp_path):
    (tmp_path / ".s.h5.rlring-partial").write_bytes(os.urandom(1 << 20))
    write(tmp_path / "s.h5")
    assert [path.name for path in tmp_path.iterdir()] == ["s.h5"]
    assert (tmp_path / "s.h5").stat().st_size < 1 << 20


@pytest.mark.parametrize("steps", [2500, 5000, 100_000])
def test_full_disk(tiny_disk, steps):
    write(tiny_disk / "s.h5")
    with pytest.raises(OSError, match=r"No space left on device: '.*s\.h5'"):
        write(tiny_disk / "s.h5", [steps] * 20)
    assert [path.name for path in tiny_disk.iterdir()] == ["s.h5"]
    assert TrajectoryStore.open(tiny_disk / "s.h5").steps == 9


def test_file_size_limit_ends_with_one_message_and_no_crash(tmp_path):
    script = """
import sys
from data import cli
from tests.data.test_store import write
raise SystemExit(cli.run(lambda: write(sys.argv[1], [1000] * 100)))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "s.h5"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr == (
        f"error: the disk is full: could not write {tmp_path / 's.h5'} (File too large); "
        "free some space or choose another --out\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_pickled_store_opens_its_own_handle(tmp_path):
    store = write(tmp_path / "s.h5")
    rows = store.column("reward")
    copy = pickle.loads(pickle.dumps(store))
    np.testing.assert_array_equal(copy.column("reward"), rows)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        np.testing.assert_array_equal(pool.apply(store.column, ("reward",)), rows)
    store.close()
    np.testing.assert_array_equal(store.column("reward"), rows)


def test_a_replaced_store_is_noticed(tmp_path):
    store = write(tmp_path / "s.h5")
    write(tmp_path / "s.h5", [2, 2])
    with pytest.raises(DataError, match="was replaced by another store while in use; open it again"):
        store.column("reward")


def test_a_store_cut_off_while_in_use_is_noticed(tmp_path):
    """HDF5 reads zeros where an open file has ended."""
    store = write(tmp_path / "s.h5", [1000] * 20)
    store.rows("reward", slice(0, 3))
    os.truncate(store.path, 3000)
    for _ in range(2):
        with pytest.raises(DataError, match=r"s.h5 was changed while in use; open it again"):
            store.column("observation")
    with pytest.raises(DataError, match=r"s.h5 is damaged or cut off"):
        TrajectoryStore.open(store.path)


def test_a_store_deleted_while_in_use_is_still_read(tmp_path):
    store = write(tmp_path / "s.h5")
    store.rows("reward", slice(0, 3))
    store.path.unlink()
    assert len(store.column("reward")) == 9
