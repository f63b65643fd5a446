import resource

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data import DataError, Trajectory
from data.exorl import episode_length, list_episodes, read_episode, read_reward, write_episode


def counting(steps=5):
    """An episode whose observation and action number t says t, and whose step t is paid 100 + t."""
    return Trajectory(
        observation=np.arange(steps + 1)[:, None],
        action=np.arange(steps)[:, None] / 100,
        reward=100 + np.arange(steps),
        discount=np.ones(steps),
        physics=np.arange(steps + 1)[:, None] * 10.0,
        extras={"skill": np.arange(steps + 1)},
    )


def exorl_rows(steps=5):
    """The same episode as ExoRL's own code lays it out: row t holds the action that led to observation t."""
    rows = {
        "observation": np.arange(steps + 1, dtype=np.float32)[:, None],
        "action": np.zeros((steps + 1, 1), np.float32),
        "reward": np.zeros((steps + 1, 1), np.float32),
        "discount": np.ones((steps + 1, 1), np.float32),
        "physics": np.arange(steps + 1)[:, None] * 10.0,
        "skill": np.arange(steps + 1),
    }
    for t in range(steps):
        rows["action"][t + 1] = t / 100
        rows["reward"][t + 1] = 100 + t
    return rows


def assert_same(left, right):
    for name in ("observation", "action", "reward", "discount", "physics"):
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name))
    assert left.extras.keys() == right.extras.keys()
    for key, values in left.extras.items():
        np.testing.assert_array_equal(values, right.extras[key])


def test_alignment_of_a_hand_made_episode(tmp_path):
    path = tmp_path / "episode_000000_5.npz"
    np.savez_compressed(path, **exorl_rows())
    trajectory = read_episode(path)
    assert trajectory.observation[:, 0].tolist() == [0, 1, 2, 3, 4, 5]
    np.testing.assert_array_equal(trajectory.action[:, 0], np.float32([0, 0.01, 0.02, 0.03, 0.04]))
    assert trajectory.reward.tolist() == [100, 101, 102, 103, 104]
    assert trajectory.physics[:, 0].tolist() == [0, 10, 20, 30, 40, 50]
    assert_same(trajectory, counting())


def test_an_episode_shifted_by_one_is_not_the_same(tmp_path):
    path = tmp_path / "episode_000000_5.npz"
    rows = exorl_rows()
    rows["action"] = np.roll(rows["action"], -1, axis=0)
    np.savez_compressed(path, **rows)
    with pytest.raises(AssertionError):
        assert_same(read_episode(path), counting())


def test_written_file_is_exorls(tmp_path):
    path = write_episode(tmp_path / "new", 12, counting())
    assert path.name == "episode_000012_5.npz"
    with np.load(path) as archive:
        for name, values in exorl_rows().items():
            np.testing.assert_array_equal(archive[name], values)
            assert archive[name].dtype == values.dtype
    assert [found.name for found in path.parent.iterdir()] == [path.name]


@given(
    steps=st.integers(1, 30),
    sizes=st.tuples(st.integers(1, 5), st.integers(1, 4)),
    has_physics=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_round_trip(tmp_path_factory, steps, sizes, has_physics, seed):
    rng = np.random.default_rng(seed)
    trajectory = Trajectory(
        observation=rng.standard_normal((steps + 1, sizes[0])),
        action=rng.uniform(-1, 1, (steps, sizes[1])),
        reward=rng.standard_normal(steps),
        discount=rng.integers(0, 2, steps),
        physics=rng.standard_normal((steps + 1, 3)) if has_physics else None,
        extras={"goal": rng.standard_normal((steps + 1, 2))},
    )
    path = write_episode(tmp_path_factory.mktemp("round"), seed % 1000, trajectory)
    assert_same(read_episode(path), trajectory)


def test_truncation_is_noticed(tmp_path):
    path = write_episode(tmp_path, 0, counting())
    whole = path.read_bytes()
    for length in [*range(0, len(whole), 11), *range(len(whole) - 30, len(whole))]:
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"not an npz file|cut off or damaged"):
            read_episode(path)


def test_damage_is_noticed_or_harmless(tmp_path):
    path = write_episode(tmp_path, 0, counting())
    whole = path.read_bytes()
    for index in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[index] ^= 0x55
        path.write_bytes(damaged)
        try:
            found = read_episode(path)
        except DataError:
            continue
        # Dates and attributes in the archive protect nothing; what was read is what was written, save for names.
        if "skill" in found.extras and found.physics is not None:
            assert_same(found, counting())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reward": None}, "not an ExoRL episode: it lacks reward; got keys"),
        ({"action": np.zeros((5, 1))}, r"action has shape \(5, 1\); ExoRL episodes have as many rows in every array"),
        ({"discount": np.zeros((6, 2))}, r"discount has shape \(6, 2\); expected one number a row"),
        ({"action": np.full((6, 1), np.nan)}, r"action\[0, 0\] is nan; every value must be finite"),
        ({"observation": np.zeros(6)}, r"observation has shape \(6,\)"),
        ({"observation": np.float32(0)}, r"observation has shape \(\)"),
        ({"skill": np.array([{}] * 6)}, "cut off or damaged, or holding Python objects"),
        ({name: values[:4] for name, values in exorl_rows().items()}, "the name says 5 steps and the file holds 3"),
    ],
)
def test_foreign_content(tmp_path, change, message):
    rows = {name: values for name, values in {**exorl_rows(), **change}.items() if values is not None}
    path = tmp_path / "episode_000003_5.npz"
    np.savez(path, **rows)
    with pytest.raises(DataError, match=message) as error:
        read_episode(path)
    assert str(path) in str(error.value)


def test_the_dummy_row_may_hold_anything(tmp_path):
    rows = exorl_rows()
    for name in ("action", "reward", "discount"):
        rows[name][0] = np.nan
    np.savez(tmp_path / "episode_000003_5.npz", **rows)
    assert_same(read_episode(tmp_path / "episode_000003_5.npz"), counting())


def test_not_an_npz(tmp_path):
    path = tmp_path / "episode_000000_5.npz"
    path.write_text("hello")
    with pytest.raises(DataError, match="not an npz file"):
        read_episode(path)
    with pytest.raises(DataError, match="no such episode"):
        read_episode(tmp_path / "episode_000001_5.npz")


def test_extras_may_not_shadow_the_episode(tmp_path):
    trajectory = Trajectory(np.zeros((2, 1)), np.zeros((1, 1)), np.zeros(1), np.ones(1), extras={"reward": np.zeros(2)})
    with pytest.raises(DataError, match=r"extras may not use the episode's own keys; got \['reward'\]"):
        write_episode(tmp_path, 0, trajectory)


@pytest.mark.parametrize("inner", ["", "buffer"])
def test_list_is_in_file_name_order(tmp_path, inner):
    folder = tmp_path / inner
    for index in (2, 10, 0):
        write_episode(folder, index, counting())
    (folder / ".episode_000003_5.npz.rlring-partial").write_text("left by a killed writer")
    names = [path.name for path in list_episodes(tmp_path)]
    assert names == ["episode_000000_5.npz", "episode_000002_5.npz", "episode_000010_5.npz"]
    assert episode_length(list_episodes(tmp_path)[0]) == 5


def test_urlb_names_are_read(tmp_path):
    np.savez(tmp_path / "20220101T000000_7_5.npz", **exorl_rows())
    assert_same(read_episode(list_episodes(tmp_path)[0]), counting())


def test_no_dataset(tmp_path):
    with pytest.raises(DataError, match=r"no dataset at .*there is no such folder. Collect some with"):
        list_episodes(tmp_path / "missing")
    with pytest.raises(DataError, match=r"no dataset at .*it holds no <name>_<index>_<length>.npz"):
        list_episodes(tmp_path)
    (tmp_path / "weights.npz").write_text("")
    with pytest.raises(DataError, match=r"weights.npz: not named like an ExoRL episode"):
        list_episodes(tmp_path)
    with pytest.raises(DataError, match=r"weights.npz: not named like an ExoRL episode"):
        episode_length(tmp_path / "weights.npz")


def test_nothing_is_left_of_an_episode_that_does_not_fit_the_disk(tmp_path):
    rng = np.random.default_rng(0)
    large = Trajectory(rng.standard_normal((1001, 24)), np.zeros((1000, 6)), np.zeros(1000), np.ones(1000))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(OSError, match=r"File too large: '.*episode_000000_1000.npz'"):
            write_episode(tmp_path, 0, large)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []
    assert read_episode(write_episode(tmp_path, 0, large)).length == 1000


def test_several_tasks_and_a_collectors_own_keys(tmp_path):
    """As published: the maze's files hold the rewards of four tasks, those of skill agents a skill for each row."""
    path = tmp_path / "episode_000000_5.npz"
    rows = exorl_rows()
    rows["reward"] = np.arange(24, dtype=np.float32).reshape(6, 4)
    rows |= {"meta": np.eye(6, 16, dtype=np.float32), "seed": np.array(7), "tags": np.arange(3)}
    np.savez_compressed(path, **rows)
    episode = read_episode(path)
    assert episode.reward.tolist() == [4, 8, 12, 16, 20]
    assert episode.extras.keys() == {"skill", "meta", "task_rewards"}
    np.testing.assert_array_equal(episode.extras["task_rewards"], rows["reward"])
    np.testing.assert_array_equal(read_reward(path), episode.reward)
    assert_same(read_episode(write_episode(tmp_path / "again", 0, episode)), episode)


def test_rewards_alone(tmp_path):
    path = write_episode(tmp_path, 3, counting())
    np.testing.assert_array_equal(read_reward(path), read_episode(path).reward)
    rows = exorl_rows()
    for change, message in (
        ({"reward": np.full((6, 1), np.nan)}, "every reward must be a finite number"),
        ({"reward": rows["reward"][:4]}, "the name says 5 steps and the file holds 3"),
        ({"reward": np.array(1.0)}, "the name says 5 steps and the file holds -1"),
        ({"reward": rows["reward"].astype(object)}, "holding Python objects"),
        ({"reward": rows["reward"].astype(str)}, "every reward must be a finite number"),
    ):
        np.savez_compressed(path, **rows | change)
        with pytest.raises(DataError, match=message):
            read_reward(path)
    del rows["reward"]
    np.savez_compressed(path, **rows)
    with pytest.raises(DataError, match="it lacks reward"):
        read_reward(path)
