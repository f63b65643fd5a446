"""Transitions: each is one of the store, none that is held out; a draw is a function of seed, step and row."""

import pickle

import numpy as np
import pytest

from data import DataError, Trajectory, TrajectoryStore, TransitionSampler
from data.draws import split_episodes
from data.store_writer import write_store

LENGTHS = (3, 1, 5, 2, 40, 7, 1, 600)


@pytest.fixture
def store(tmp_path):
    """A store whose numbers say where they stand: observations 0, 1, 2, ... through all episodes, actions likewise."""

    def episodes():
        rows = steps = 0
        for length in LENGTHS:
            step = np.arange(steps, steps + length)
            yield Trajectory(
                observation=np.arange(rows, rows + length + 1)[:, None] * [1.0, -1.0],
                action=step[:, None],
                reward=step * 0.5,
                discount=step % 2,
            )
            rows, steps = rows + length + 1, steps + length

    write_store(tmp_path / "s.h5", episodes(), task="walker-walk", source="a test")
    return TrajectoryStore.open(tmp_path / "s.h5")


def test_a_transition_is_one_of_the_store(store):
    got = TransitionSampler(store, seed=3, held_out=0.0).sample(5, 1000)
    assert {name: value.shape for name, value in got._asdict().items()} == {
        "observation": (1000, 1, 2),
        "action": (1000, 1, 1),
        "reward": (1000, 1),
        "discount": (1000, 1),
        "next_observation": (1000, 1, 2),
        "key": (1000, 1, 2),
    }
    step = got.action[:, 0, 0].astype(int)
    episode = np.searchsorted(np.cumsum(LENGTHS), step, side="right")
    np.testing.assert_array_equal(got.observation[:, 0, 0], step + episode)  # an observation more in each episode
    np.testing.assert_array_equal(got.next_observation, got.observation + np.array([1.0, -1.0]))
    np.testing.assert_array_equal(got.reward[:, 0], step * 0.5)
    np.testing.assert_array_equal(got.discount[:, 0], step % 2)


def test_all_are_drawn_alike_and_none_that_is_held_out(store):
    sampler = TransitionSampler(store, seed=0, held_out=0.3)
    steps = np.concatenate([sampler.sample(n, 1000).action.ravel().astype(int) for n in range(50)])
    ends = np.cumsum(LENGTHS)
    trained = np.concatenate([np.arange(ends[e] - LENGTHS[e], ends[e]) for e in split_episodes(8, 0.3)["train"]])
    count = np.bincount(steps, minlength=sum(LENGTHS))
    assert not np.delete(count, trained).any()
    mean = len(steps) / len(trained)
    assert np.abs(count[trained] - mean).max() < 5 * mean**0.5


def test_a_draw_is_a_function_of_seed_step_and_row(store):
    sampler = TransitionSampler(store, seed=7)
    whole = sampler.sample(2, 1000)
    part = pickle.loads(pickle.dumps(sampler)).sample(2, [999, 4], np.arange(1))
    for name, values in part._asdict().items():
        np.testing.assert_array_equal(values, getattr(whole, name)[[999, 4]])
    assert len(sampler.sample(2, 1).key) == 1
    assert len(np.unique(whole.key[:, 0], axis=0)) == 1000
    for other in (TransitionSampler(store, seed=8).sample(2, 1000), sampler.sample(3, 1000)):
        assert (other.key != whole.key).all(axis=-1).all()


def test_a_store_without_rewards_is_refused(tmp_path, store):
    episode = store.trajectory(0)
    write_store(tmp_path / "dark.h5", [episode], task="point_mass-dark", source="a test")
    with pytest.raises(DataError, match=r"dark.h5 holds no rewards, because point_mass-dark hides its goal: no value"):
        TransitionSampler(TrajectoryStore.open(tmp_path / "dark.h5"), seed=0)
