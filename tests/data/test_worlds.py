"""Worlds: every place is visited twice, the sign alone ties the visits, and a draw is a function of its arguments."""

import pickle

import numpy as np
import pytest

from data import ChainSampler, DataError, Growth, TrajectoryStore, WorldSampler
from data.build import build
from data.collect import collect
from data.dmc import make
from data.worlds import NEAR


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> TrajectoryStore:
    """The map of episodes that were collected in the dark."""
    folder = tmp_path_factory.mktemp("map")
    collect("point_mass-dark", "waypoints", 240, 0, folder / "episodes", progress=False)
    build(folder / "episodes", "point_mass-map", folder / "map.h5", workers=1, progress=False)
    return TrajectoryStore.open(folder / "map.h5")


def visits(batch, row: int, of: np.ndarray) -> np.ndarray:
    """A field of one row, by visit: [N, 16, ...]."""
    return of[row].reshape(-1, 16, *of.shape[2:])


def test_every_place_is_visited_twice_and_the_second_visit_is_the_query(store):
    sampler = WorldSampler(store, trajectories=8, seed=0)
    batch = sampler.sample(3, 5)
    assert batch.observation.shape == (5, 128, 4 + 32)
    for row in range(5):
        signs = visits(batch, row, batch.observation)[:, :, 4:]
        assert (signs == signs[:, :1]).all()
        np.testing.assert_allclose(np.linalg.norm(signs[:, 0], axis=-1), 32**0.5 / 2, rtol=1e-5)
        _, place, times = np.unique(signs[:, 0], axis=0, return_inverse=True, return_counts=True)
        assert (times == 2).all()
        query = visits(batch, row, batch.last)[:, 0]
        for own in range(4):
            first, second = np.flatnonzero(place.ravel() == own)
            assert (query[first], query[second]) == (0, 1)
            path = visits(batch, row, batch.observation)[[first, second], :, :2]
            assert not np.array_equal(*path)  # two trajectories
            assert np.linalg.norm(path[0, -1] - path[1, -1]) < 2 * sampler.task.radius
        paid = visits(batch, row, batch.reward)
        assert (paid[:, -2:] == 1).all()  # they stay where they are paid


def test_a_chain_of_one_is_a_query_alone(store):
    batch = WorldSampler(store, trajectories=1, seed=0).sample(0, 6)
    assert batch.observation.shape == (6, 16, 36)
    assert batch.last.all()
    assert (batch.reward[:, -2:] == 1).all()
    pair = WorldSampler(store, trajectories=2, seed=0).sample(0, 6)
    np.testing.assert_array_equal(batch.observation, pair.observation[:, 16:])


def test_a_visit_begins_anew_and_no_return_is_asked_for(store):
    batch = WorldSampler(store, trajectories=4, seed=0).sample(0, 2)
    begins = batch.step == 0
    assert begins.sum() == 8
    assert not batch.previous_action[begins].any()
    assert not batch.previous_reward[begins].any()
    np.testing.assert_array_equal(batch.previous_reward[0, 1:16], batch.reward[0, :15])
    assert not batch.return_to_go.any()


def test_rows_places_and_copies_agree(store):
    sampler = WorldSampler(store, trajectories=8, seed=1, growth=Growth((2, 4), 10))
    copy = pickle.loads(pickle.dumps(sampler))
    for step, chains in ((0, 4), (4, 4), (5, 2), (9, 2), (10, 1), (1000, 1)):
        whole = sampler.sample(step, 3)
        assert whole.segment.max() + 1 == chains
        places = np.array([127, -1, 3, 64, 200])
        part = copy.sample(step, [2, 0], places)
        for name, got in part._asdict().items():
            np.testing.assert_array_equal(got[:, [0, 2, 3]], getattr(whole, name)[[2, 0]][:, places[[0, 2, 3]]], name)
        assert (part.segment[:, [1, 4]] == -1).all()
        assert not part.observation[:, [1, 4]].any()
    assert not np.array_equal(sampler.sample(10, 1).observation, sampler.sample(11, 1).observation)
    assert not np.array_equal(
        sampler.sample(10, 1).observation, WorldSampler(store, trajectories=8, seed=2).sample(10, 1).observation
    )


@pytest.mark.parametrize("places", [1, 16, 1000])
def test_a_history_is_the_end_of_the_whole_world(store, places):
    sampler = WorldSampler(store, trajectories=2, seed=0, split="held_out", held_out=0.5)
    whole, asked = sampler.history(7, [0, 3], places, places, 4)
    assert whole.observation.shape == (2, places * 16, 36)
    signs = whole.observation[:, ::16, 4:]
    assert len(np.unique(signs[0], axis=0)) == places
    for query in range(4):
        np.testing.assert_array_equal(asked.sign[0, query], signs[0, asked.place[0, query]])
        end = whole.observation[0, asked.place[0, query] * 16 + 15, :2]
        assert np.linalg.norm(end - asked.goal[0, query]) < 2 * sampler.task.radius * NEAR
    for seen in {0, places // 2}:
        some, same = sampler.history(7, [0, 3], places, seen, 4)
        np.testing.assert_array_equal(some.observation, whole.observation[:, (places - seen) * 16 :])
        np.testing.assert_array_equal(same.goal, asked.goal)
    # A larger world holds a smaller one, and the same is asked of both.
    larger, again = sampler.history(7, [0, 3], 2 * places, 2 * places, 4)
    if places >= 4:
        np.testing.assert_array_equal(again.goal, asked.goal)
        np.testing.assert_array_equal(again.sign, asked.sign)
        assert len({*asked.place[0]}) == 4
    assert {tuple(sign) for sign in signs[0]} <= {tuple(sign) for sign in larger.observation[0, ::16, 4:]}
    one, _ = sampler.history(7, [3], places, places, 4)
    np.testing.assert_array_equal(one.observation[0], whole.observation[1])


def test_the_age_of_what_is_asked_is_uniform(store):
    _, asked = WorldSampler(store, trajectories=2, seed=0).history(0, 400, 8, 0, 2)
    counts = np.bincount(asked.place.ravel(), minlength=8)
    assert counts.sum() == 800
    assert 60 < counts.min() <= counts.max() < 140


def test_chains_in_the_dark_grow_too(dark):
    sampler = ChainSampler(dark, trajectories=4, seed=0, growth=Growth((1, 2), 10))
    for step, chains in ((0, 4), (5, 2), (10, 1)):
        batch = sampler.sample(step, 2)
        assert [len(np.unique(row)) for row in batch.segment] == [chains] * 2
        assert np.bincount(batch.segment[0], batch.step[0] == 0).tolist() == [4 // chains] * chains
    mixed = ChainSampler(dark, trajectories=4, seed=0, lengths="mixed", growth=Growth((1,), 10))
    assert (mixed.sample(9, 8).last == 1).all()  # chains of one
    assert (mixed.sample(10, 8).last == 0).any()


@pytest.fixture
def dark(store, tmp_path) -> TrajectoryStore:
    build(store.path.parent / "episodes", "point_mass-dark", tmp_path / "dark.h5", workers=1, progress=False)
    return TrajectoryStore.open(tmp_path / "dark.h5")


def test_episodes_collected_on_a_map_serve_as_well(store, tmp_path):
    collect("point_mass-map", "waypoints", 3, 0, tmp_path / "episodes", progress=False)
    build(tmp_path / "episodes", "point_mass-map", tmp_path / "map.h5", workers=1, progress=False)
    other = TrajectoryStore.open(tmp_path / "map.h5")
    assert other.observation_size == 4
    np.testing.assert_array_equal(other.read("action", [0])[0], store.read("action", [0])[0])


def test_refusals(store, dark):
    with pytest.raises(DataError, match=r"'point_mass-dark' has no places; use a map, such as 'point_mass-map'"):
        WorldSampler(dark, trajectories=2, seed=0)
    with pytest.raises(DataError, match=r"visit every place twice: trajectories must be even, or 1; got 3"):
        WorldSampler(store, trajectories=3, seed=0)
    with pytest.raises(DataError, match=r"of 8 trajectories grows through its divisors, the smallest first; got \[6\]"):
        WorldSampler(store, trajectories=8, seed=0, growth=Growth((6,), 5))
    with pytest.raises(DataError, match=r"of a world of 4 places 0 to 4 can be seen; got 5"):
        WorldSampler(store, trajectories=2, seed=0).history(0, 1, 4, 5, 1)
    few = WorldSampler(store, trajectories=2, seed=0, split="held_out", held_out=0.001)
    with pytest.raises(DataError, match=r"no two of the 1 episodes come to rest in one place"):
        few.sample(0, 1)
    with pytest.raises(DataError, match=r"point_mass-dark shows no sign, so reset\(\) cannot be given one"):
        make("point_mass-dark").reset(options={"sign": np.zeros(32)})
    with pytest.raises(DataError, match=r"point_mass-map: a sign is 32 finite numbers; got"):
        make("point_mass-map").reset(options={"sign": np.zeros(3)})
