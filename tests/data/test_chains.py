import multiprocessing
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import ChainSampler, DataError, GoalSampling, Trajectory
from data.draws import split_episodes
from data.lazy_field import BLOCK
from data.store_writer import write_store
from data.tasks import goal_task

STEPS = 6


def numbered(lengths, seed=0):
    """Episodes whose observation, action and reward say which episode and step they are of."""
    rng = np.random.default_rng(seed)
    for episode, steps in enumerate(lengths):
        yield Trajectory(
            observation=np.stack([np.full(steps + 1, episode), np.arange(steps + 1)], 1),
            action=np.stack([np.full(steps, episode), np.arange(steps)], 1),
            reward=rng.integers(-1, 3, steps),
            discount=np.ones(steps),
        )


def wandering(episodes, steps=16, seed=0):
    """Point-mass episodes that go to a random place and, most of them, stay there."""
    rng = np.random.default_rng(seed)
    for _ in range(episodes):
        places, place, position = [], rng.uniform(-0.15, 0.15, 2), np.zeros(2)
        for _ in range(steps + 1):
            places.append(position)
            way = place - position
            position = position + way * min(1, 0.03 / max(np.linalg.norm(way), 1e-9))
        physics = np.concatenate([places, np.zeros((steps + 1, 2))], axis=1)
        yield Trajectory(physics, rng.uniform(-1, 1, (steps, 2)), np.zeros(steps), np.ones(steps), physics)


@pytest.fixture(scope="module")
def even(tmp_path_factory):
    path = tmp_path_factory.mktemp("even") / "s.h5"
    return write_store(path, numbered([STEPS] * 60), task="walker-walk", source="a test")


@pytest.fixture(scope="module")
def ragged(tmp_path_factory):
    lengths = np.random.default_rng(1).integers(1, STEPS + 1, 60)
    path = tmp_path_factory.mktemp("ragged") / "s.h5"
    return write_store(path, numbered(lengths), task="walker-walk", source="a test")


@pytest.fixture(scope="module")
def dark(tmp_path_factory):
    path = tmp_path_factory.mktemp("dark") / "s.h5"
    return write_store(
        path, wandering(400), task="point_mass-dark", source="a test", keep_physics=True, goal="hindsight"
    )


def assert_same(left, right):
    for name, one, other in zip(left._fields, left, right, strict=True):
        np.testing.assert_array_equal(one, other, err_msg=name)


def trajectory_index(batch):
    """The trajectory that each step belongs to, counted within its chain; 0 in padding."""
    begins = (batch.step == 0) & (batch.segment >= 0)
    count = begins.cumsum(axis=1)
    first = np.maximum.accumulate(np.where(begins & (batch.position == 0), count, 0), axis=1)
    return np.where(batch.segment >= 0, count - first, 0)


def trajectories_of(batch, row):
    """Takes a chain apart again: for each trajectory, its fields over its own steps."""
    real, trajectory = batch.segment[row] == 0, trajectory_index(batch)[row]
    for index in range(trajectory[real].max() + 1):
        at = real & (trajectory == index)
        yield {name: values[row][at] for name, values in zip(batch._fields, batch, strict=True)}


def returns_of(batch):
    return np.array(
        [[part["reward"].sum() for part in trajectories_of(batch, row)] for row in range(len(batch.reward))]
    )


@pytest.mark.parametrize("kind", ["even", "ragged"])
@given(trajectories=st.integers(1, 9), seed=st.integers(0, 2**40), step=st.integers(0, 2**40))
@settings(max_examples=30)
def test_a_chain_is_whole_trajectories_ascending_to_one_target(request, kind, trajectories, seed, step):
    store = request.getfixturevalue(kind)
    sampler = ChainSampler(store, trajectories=trajectories, seed=seed)
    batch = sampler.sample(step, 3)
    assert sampler.timesteps == trajectories * store.longest
    assert batch.observation.shape == (3, sampler.timesteps, 2)
    for row in range(3):
        parts = list(trajectories_of(batch, row))
        drawn = [int(part["observation"][0, 0]) for part in parts]
        assert len(set(drawn)) == trajectories
        assert set(drawn) <= set(sampler.pool.tolist())
        totals = [store.returns[episode] for episode in drawn]
        assert totals == sorted(totals)
        for episode, part in zip(drawn, parts, strict=True):
            expected = store.trajectory(episode)
            np.testing.assert_array_equal(part["observation"], expected.observation[:-1])
            np.testing.assert_array_equal(part["action"], expected.action)
            np.testing.assert_array_equal(part["reward"], expected.reward)
            np.testing.assert_array_equal(part["step"], np.arange(expected.length))
            assert part["return_to_go"][0] == max(totals)
            earned_before = np.concatenate([[0], np.cumsum(expected.reward)[:-1]])
            np.testing.assert_array_equal(part["return_to_go"], np.float32(max(totals) - earned_before))


@pytest.mark.parametrize("kind", ["even", "ragged"])
def test_previous_action_and_reward_cross_trajectories(request, kind):
    batch = ChainSampler(request.getfixturevalue(kind), trajectories=5, seed=3).sample(0, 8)
    for row in range(8):
        count = int((batch.segment[row] == 0).sum())
        np.testing.assert_array_equal(batch.previous_action[row, 0], [0, 0])
        assert batch.previous_reward[row, 0] == 0
        np.testing.assert_array_equal(batch.previous_action[row, 1:count], batch.action[row, : count - 1])
        np.testing.assert_array_equal(batch.previous_reward[row, 1:count], batch.reward[row, : count - 1])


def test_padding_is_at_the_end_and_empty(ragged):
    batch = ChainSampler(ragged, trajectories=5, seed=3).sample(0, 8)
    assert (batch.segment == -1).any()
    assert (np.diff(batch.segment, axis=1) <= 0).all()
    padding = batch.segment == -1
    for name, values in zip(batch._fields, batch, strict=True):
        if name not in ("position", "segment"):
            assert not values[padding].any(), name
    np.testing.assert_array_equal(batch.position, np.broadcast_to(np.arange(5 * STEPS), (8, 5 * STEPS)))


def test_types(even):
    batch = ChainSampler(even, trajectories=2, seed=0).sample(0, 1)
    integers = {"step", "trajectory", "position", "segment"}
    for name, values in zip(batch._fields, batch, strict=True):
        assert values.dtype == (np.int32 if name in integers else np.float32), name


@pytest.mark.parametrize("kind", ["even", "ragged", "dark"])
@given(rows=st.lists(st.integers(0, 2**31), min_size=1, max_size=6, unique=True), step=st.integers(0, 2**31))
@settings(max_examples=20)
def test_a_row_is_the_same_however_rows_are_split(request, kind, rows, step):
    sampler = ChainSampler(request.getfixturevalue(kind), trajectories=4, seed=5)
    together = sampler.sample(step, rows)
    for index, row in enumerate(rows):
        alone = sampler.sample(step, [row])
        assert_same(alone, type(together)(*(values[index : index + 1] for values in together)))


def test_a_number_of_rows_means_the_first(even):
    sampler = ChainSampler(even, trajectories=4, seed=5)
    assert_same(sampler.sample(7, 6), sampler.sample(7, np.arange(6)))
    assert_same(sampler.sample(7, 6), sampler.sample(7, range(6)))


def test_draws_depend_on_seed_step_and_row(even):
    draws = [
        ChainSampler(even, trajectories=4, seed=seed).sample(step, [row]).observation[0, :, 0].tolist()
        for seed, step, row in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    ]
    assert len({tuple(draw) for draw in draws}) == 4


@pytest.mark.parametrize("kind", ["even", "dark"])
def test_pickled_sampler_draws_the_same_in_another_process(request, kind):
    sampler = ChainSampler(request.getfixturevalue(kind), trajectories=4, seed=5)
    expected = sampler.sample(3, 2)
    assert len(pickle.dumps(sampler)) < 100_000
    assert_same(pickle.loads(pickle.dumps(sampler)).sample(3, 2), expected)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert_same(pool.apply(sampler.sample, (3, 2)), expected)


def test_sort(even):
    def draw(sort):
        return ChainSampler(even, trajectories=6, seed=2, sort=sort).sample(0, 20)

    returns = {sort: returns_of(draw(sort)) for sort in ("ascending", "descending", "random", "time")}
    assert (np.diff(returns["ascending"]) >= 0).all()
    assert (np.diff(returns["descending"]) <= 0).all()
    assert (np.diff(draw("time").observation[:, ::STEPS, 0]) > 0).all()
    assert not (np.diff(returns["random"]) >= 0).all(1).any()
    for values in returns.values():
        np.testing.assert_array_equal(np.sort(values), returns["ascending"])


def test_target(even):
    own = ChainSampler(even, trajectories=6, seed=2, target="own").sample(0, 20)
    np.testing.assert_array_equal(own.return_to_go[:, ::STEPS], returns_of(own))
    fixed = ChainSampler(even, trajectories=6, seed=2, target=42.0).sample(0, 20)
    assert (fixed.return_to_go[:, ::STEPS] == 42).all()


def test_split(even):
    samplers = {
        split: ChainSampler(even, trajectories=3, seed=0, split=split) for split in ("train", "held_out", "all")
    }
    assert {split: len(sampler.pool) for split, sampler in samplers.items()} == {"train": 54, "held_out": 6, "all": 60}
    assert not set(samplers["train"].pool) & set(samplers["held_out"].pool)
    for sampler in samplers.values():
        assert set(sampler.sample(0, 300).observation[..., 0].astype(int).ravel()) == set(sampler.pool)
    other_seed = ChainSampler(even, trajectories=3, seed=99, split="held_out")
    np.testing.assert_array_equal(other_seed.pool, samplers["held_out"].pool)
    assert len(ChainSampler(even, trajectories=3, seed=0, held_out=0).pool) == 60


@pytest.mark.parametrize("held_out", [0.01, 0.1, 0.5, 0.9])
def test_a_store_that_grows_moves_no_episode(held_out):
    whole = split_episodes(1000, held_out)
    for episodes in (1, 60, 120, 999):
        split = split_episodes(episodes, held_out)
        for name, members in whole.items():
            np.testing.assert_array_equal(split[name], members[members < episodes])
        assert abs(len(split["held_out"]) - held_out * episodes) <= 2
        assert len(split["held_out"]) >= 1
        assert set(split["held_out"]) <= set(split_episodes(episodes, min(0.99, held_out * 2))["held_out"])
    assert not len(split_episodes(1000, 0.0)["held_out"])


def test_take_reorders_and_pads(ragged):
    batch = ChainSampler(ragged, trajectories=3, seed=0).sample(0, 4)
    length = batch.segment.shape[1]
    order = np.random.default_rng(0).permutation(length + 6)
    taken = batch.take(order)
    for name, before, after in zip(batch._fields, batch, taken, strict=True):
        inside = order < length
        np.testing.assert_array_equal(after[:, inside], before[:, order[inside]], err_msg=name)
        assert after.dtype == before.dtype
    assert (taken.segment[:, order >= length] == -1).all()
    np.testing.assert_array_equal(taken.position, np.broadcast_to(order, taken.position.shape))
    assert not taken.observation[:, order >= length].any()
    assert (batch.take(np.array([-1, 0])).segment[:, 0] == -1).all()


# --- goals in hindsight ---


def test_a_chain_shares_one_goal_that_its_best_trajectory_met(dark):
    sampler = ChainSampler(dark, trajectories=8, seed=0)
    task, batch = goal_task("point_mass-dark"), sampler.sample(0, 50)
    returns = returns_of(batch)
    assert (np.diff(returns) >= 0).all()
    assert (returns[:, -1] >= 4).all()
    np.testing.assert_array_equal(batch.return_to_go[:, ::16], np.repeat(returns[:, -1:], 8, axis=1))
    # Every reward of the chain must come from one and the same goal: where one of its trajectories ended.
    ends = dark.column("physics").reshape(400, 17, 4)
    fifth = ends[:, 5].astype(np.float32)
    for row in range(50):
        states = batch.observation[row].reshape(8, 16, 4)
        episodes = [int(np.flatnonzero((fifth == part[5]).all(1))[0]) for part in states]
        assert len(set(episodes)) == 8
        paid = batch.reward[row].reshape(8, 16)
        goals = task.hindsight_goal(ends[episodes, -1])
        fits = [(task.reward(ends[episodes, 1:], goal) == paid).all() for goal in goals]
        assert any(fits)


def test_others_that_met_the_goal_are_mixed_in(dark):
    def met(most):
        sampler = ChainSampler(dark, trajectories=8, seed=0, goals=GoalSampling(met_most=most))
        return (returns_of(sampler.sample(0, 200)) > 0).sum(1).mean()

    # Each draw adds 0 to `most` that met it, in place of random ones of which a share met it anyway.
    base = met(0)
    assert 0.5 < met(2) - base < 1
    assert 1.5 < met(6) - base < 3


@pytest.mark.parametrize("met", [0.0, 0.25, 1.0])
def test_a_goal_is_met_as_rarely_as_asked(dark, met):
    goals = GoalSampling(met=met)
    batch = ChainSampler(dark, trajectories=9, sort="random", seed=0, goals=goals).sample(0, 300)
    far = np.linalg.norm(batch.observation[:, -1, :2], axis=-1) > 0.1  # all begin at 0, and so have met what is near
    has_met = returns_of(batch)[far] > 0
    assert has_met[:, -1].all()  # the one that the goal was taken from
    assert has_met[:, :-1].mean() == pytest.approx(met, abs=0.04)
    # A context may be longer than the pool, and begins as a shorter one does.
    sampler = ChainSampler(dark, trajectories=1, sort="random", seed=1, split="held_out", goals=goals)
    goal = np.array([[0.1, 0.0], [0.0, -0.12], [-0.08, 0.08]])
    prompt = sampler.prompt(0, 3, 500, goal, 1.0)
    assert (returns_of(prompt) > 0).mean() == pytest.approx(met, abs=0.05)
    np.testing.assert_array_equal(sampler.prompt(0, 3, 8, goal, 1.0).observation, prompt.observation[:, : 8 * 16])


def test_a_history_meets_the_goal_ever_more_often(dark):
    goals = GoalSampling(met="annealed")
    batch = ChainSampler(dark, trajectories=5, sort="time", seed=0, goals=goals).sample(0, 600)
    far = np.linalg.norm(batch.observation[:, -1, :2], axis=-1) > 0.1
    np.testing.assert_allclose((returns_of(batch)[far] > 0).mean(0), [0, 0.25, 0.5, 0.75, 1.0], atol=0.06)
    sampler = ChainSampler(dark, trajectories=1, sort="time", seed=1, split="held_out", goals=goals)
    goal = np.tile([[0.1, 0.0], [0.0, -0.12]], (200, 1))
    prompt = sampler.prompt(0, 400, 4, goal, 1.0)  # what comes before the best
    np.testing.assert_allclose((returns_of(prompt) > 0).mean(0), [0, 0.25, 0.5, 0.75], atol=0.08)
    assert sampler.prompt(0, 2, 1, goal[:2], 1.0).reward.max() == 0
    assert not sampler.prompt(0, 2, 0, goal[:2], 1.0).reward.size
    with pytest.raises(DataError, match=r"goals.met is a chance, 0 <= met <= 1, or 'annealed'; got 'often'"):
        GoalSampling(met="often")


def test_a_rare_meeting_tells_the_place(dark):
    """Its last timesteps are paid: what only passes by leaves open on which side of it the goal lies."""
    batch = ChainSampler(dark, trajectories=2, sort="random", seed=0, goals=GoalSampling(met=1.0)).sample(0, 300)
    paid = batch.reward.reshape(300, 2, 16)[:, 0]
    assert (paid[:, -4:].all(axis=1)).mean() > 0.8  # the others have a goal at which none of 400 episodes rests


def test_the_best_is_not_always_last_when_order_is_random(dark):
    returns = returns_of(ChainSampler(dark, trajectories=8, seed=0, sort="random").sample(0, 200))
    counts = np.bincount(returns.argmax(1), minlength=8)
    assert counts.min() > 5


def test_goals_stay_within_the_split(dark):
    sampler = ChainSampler(dark, trajectories=4, seed=0, split="held_out")
    starts = dark.column("physics").reshape(400, 17, 4)[sampler.pool, 5].astype(np.float32)
    drawn = sampler.sample(0, 50).observation.reshape(50 * 4, 16, 4)[:, 5]
    assert {tuple(state) for state in drawn} <= {tuple(state) for state in starts}


def test_chains_of_a_few_episodes_and_of_one(tmp_path):
    store = write_store(
        tmp_path / "s.h5", wandering(5), task="point_mass-dark", source="t", keep_physics=True, goal="hindsight"
    )
    for count in (1, 5):
        sampler = ChainSampler(store, trajectories=count, seed=0, held_out=0)
        returns = returns_of(sampler.sample(0, 20))
        assert returns.shape == (20, count)
        assert (returns[:, -1] >= 4).all()


def test_goals_among_episodes_of_different_lengths(tmp_path):
    lengths = np.random.default_rng(0).integers(2, 17, 80)
    trajectories = [next(wandering(1, int(steps), seed)) for seed, steps in enumerate(lengths)]
    store = write_store(
        tmp_path / "s.h5", trajectories, task="point_mass-dark", source="t", keep_physics=True, goal="hindsight"
    )
    batch = ChainSampler(store, trajectories=5, seed=0).sample(0, 100)
    assert (np.diff(batch.segment, axis=1) <= 0).all()
    assert not batch.reward[batch.segment == -1].any()
    returns = returns_of(batch)
    assert (np.diff(returns) >= 0).all()
    assert (returns[:, -1] >= 4).all()
    np.testing.assert_array_equal(batch.return_to_go[:, 0], returns[:, -1])


def test_nobody_stays(tmp_path):
    moving = np.concatenate([np.linspace(-1, 1, 17)[:, None]] * 4, axis=1)
    trajectories = [Trajectory(moving, np.zeros((16, 2)), np.zeros(16), np.ones(16), moving) for _ in range(5)]
    store = write_store(
        tmp_path / "s.h5", trajectories, task="point_mass-dark", source="t", keep_physics=True, goal="hindsight"
    )
    with pytest.raises(DataError, match=r"in none of the 5 episodes does the body stay .* lower goals.stay_steps"):
        ChainSampler(store, trajectories=2, seed=0, held_out=0).sample(0, 1)


# --- prompts ---


def test_prompt_is_sorted_and_aims_at_the_target(even):
    sampler = ChainSampler(even, trajectories=2, seed=0, split="all")
    batch = sampler.prompt(3, 10, 7, None, 8.0)
    returns = returns_of(batch)
    assert returns.shape == (10, 7)
    assert (np.diff(returns) >= 0).all()
    assert (batch.return_to_go[:, ::STEPS] == 8).all()
    assert not np.array_equal(batch.observation, sampler.prompt(4, 10, 7, None, 8.0).observation)


def test_prompts_nest_and_do_not_depend_on_the_sampler(dark):
    sampler = ChainSampler(dark, trajectories=2, seed=0, split="all")
    goal = np.zeros((6, 2))

    def drawn(count, sampler=sampler, goal=goal, rows=6):
        return sampler.prompt(3, rows, count, goal, 5.0).observation.reshape(len(goal), count, 16, 4)[:, :, 5]

    for count in (1, 2, 4, 8):
        small, large = drawn(count), drawn(2 * count)
        for row in range(6):
            assert {tuple(state) for state in small[row]} < {tuple(state) for state in large[row]}
    np.testing.assert_array_equal(drawn(4), drawn(4, ChainSampler(dark, trajectories=9, seed=8, split="all")))
    np.testing.assert_array_equal(drawn(4, goal=goal[:1], rows=[5]), drawn(4)[5:])
    elsewhere = drawn(4, goal=goal + 0.1)
    for row in range(6):
        assert {tuple(state) for state in elsewhere[row]} == {tuple(state) for state in drawn(4)[row]}


def test_prompt_pays_for_the_goal_of_its_row(dark):
    sampler = ChainSampler(dark, trajectories=2, seed=0, split="all")
    goal = np.array([[0.0, 0.0], [5.0, 5.0], [0.1, 0.0]])
    batch = sampler.prompt(3, 3, 12, goal, 5.0)
    assert (returns_of(batch)[0] >= 1).all()
    assert not batch.reward[1].any()
    # observation t + 1 is where step t led, except at the end of a trajectory.
    states = batch.observation[2].reshape(12, 16, 4)
    paid = batch.reward[2].reshape(12, 16)
    np.testing.assert_array_equal(goal_task("point_mass-dark").reward(states[:, 1:], goal[2]), paid[:, :-1])


@pytest.mark.parametrize(
    ("kind", "goal"), [("even", None), ("ragged", None), ("dark", np.zeros((4, 2))), ("dark", None)]
)
def test_empty_prompt(request, kind, goal):
    store = request.getfixturevalue(kind)
    batch = ChainSampler(store, trajectories=2, seed=0).prompt(0, 4, 0, goal, 1.0)
    assert batch.observation.shape == (4, 0, store.observation_size)
    assert batch.action.shape == (4, 0, store.action_size)
    assert {values.shape[:2] for values in batch} == {(4, 0)}
    assert (batch.take(np.arange(3)).segment == -1).all()


def test_typical_target(even, dark):
    for store, chains in ((even, 3), (dark, 5)):
        sampler = ChainSampler(store, trajectories=chains, seed=0)
        target = sampler.typical_target()
        assert target == sampler.typical_target()
        assert target == ChainSampler(store, trajectories=chains, seed=0, split="all").typical_target()
        best = np.concatenate([returns_of(sampler.sample(step, 50)).max(1) for step in range(10)])
        assert abs(target - np.percentile(best, 90)) <= 1


# --- errors ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sort": "best"}, "sort must be one of 'ascending', 'descending', 'random', 'time'; got 'best'"),
        ({"split": "test"}, "split must be one of 'train', 'held_out', 'all'; got 'test'"),
        ({"target": "most"}, "target must be one of 'max', 'own' or a number; got 'most'"),
        ({"target": float("nan")}, "target must be 'max', 'own' or a finite number; got nan"),
        ({"trajectories": 0}, "a chain needs trajectories >= 1; got 0"),
        ({"trajectories": 55}, "has 54 episodes in split 'train' .*, too few for chains of 55; lower trajectories"),
        ({"held_out": 1.0}, "held_out is a share of the episodes, 0 <= held_out < 1; got 1.0"),
        ({"seed": -1}, "seed must be 0 or more; got -1"),
        ({"goals": GoalSampling()}, "task 'walker-walk' hides no goal; leave out goals"),
    ],
)
def test_wrong_options(even, options, message):
    with pytest.raises(DataError, match=message):
        ChainSampler(even, **{"trajectories": 3, "seed": 0, **options})


def test_wrong_prompts(even, dark):
    plain, hidden = (ChainSampler(store, trajectories=2, seed=0) for store in (even, dark))
    with pytest.raises(DataError, match="a context takes 0 to 54 trajectories, the episodes in split 'train'; got 55"):
        plain.prompt(0, 1, 55, None, 1.0)
    with pytest.raises(DataError, match="task 'walker-walk' hides no goal, so a context takes goal=None; got a goal"):
        plain.prompt(0, 1, 1, np.zeros((1, 2)), 1.0)
    with pytest.raises(DataError, match=r"a context of 'point_mass-dark' needs a goal a row, \(3, 2\); got \(2,\)"):
        hidden.prompt(0, 3, 1, np.zeros(2), 1.0)
    with pytest.raises(DataError, match=r"needs a goal a row, \(3, 2\); got \(\)"):
        hidden.prompt(0, 3, 1, None, 1.0)


def test_typical_target_needs_training_chains(even):
    with pytest.raises(DataError, match="has 54 training episodes, too few for chains of 60"):
        ChainSampler(even, trajectories=60, seed=0, split="all").typical_target()


def test_wrong_goal_sampling():
    with pytest.raises(DataError, match=r"goals.met is a chance, 0 <= met <= 1, or 'annealed'; got 2"):
        GoalSampling(met=2)
    with pytest.raises(DataError, match="goals needs stay_steps >= 1"):
        GoalSampling(stay_steps=0)


def test_a_hindsight_store_needs_its_task_and_physics(tmp_path):
    strange = write_store(tmp_path / "a.h5", numbered([3] * 9), task="walker-walk", source="t", goal="hindsight")
    with pytest.raises(DataError, match="'walker-walk' is no task with a hidden goal; build it again"):
        ChainSampler(strange, trajectories=2, seed=0)
    blind = write_store(tmp_path / "b.h5", wandering(9), task="point_mass-dark", source="t", goal="hindsight")
    with pytest.raises(DataError, match="it holds no physics; build it again"):
        ChainSampler(blind, trajectories=2, seed=0)


def test_best_keeps_the_trajectories_of_highest_return_up_to_a_share_of_the_steps(tmp_path):
    returns = [3.0, 9.0, 1.0, 7.0, 5.0, 8.0, 2.0, 6.0, 4.0, 0.0]
    trajectories = (
        Trajectory(np.zeros((5, 2)), np.zeros((4, 1)), np.full(4, total / 4), np.ones(4)) for total in returns
    )
    store = write_store(tmp_path / "s.h5", trajectories, task="walker-walk", source="a test")
    assert list(ChainSampler(store, trajectories=1, seed=0, split="all", best=0.3).pool) == [1, 3, 5]
    assert list(ChainSampler(store, trajectories=1, seed=0, split="all", best=0.01).pool) == [1]
    assert len(ChainSampler(store, trajectories=1, seed=0, split="all").pool) == 10
    with pytest.raises(DataError, match=r"best is a share of the time steps, 0 < best <= 1; got 0"):
        ChainSampler(store, trajectories=1, seed=0, best=0)


def test_best_of_a_hidden_goal_task_stay_longest_where_they_came_to_rest(dark):
    best = ChainSampler(dark, trajectories=1, seed=0, best=0.1)
    everything = ChainSampler(dark, trajectories=1, seed=0)
    assert len(best.pool) < 0.11 * len(everything.pool)
    assert set(best.pool) <= set(everything.pool)
    of_best = best.sample(0, 32).reward.sum(1)
    assert of_best.min() > np.median(everything.sample(0, 32).reward.sum(1))


def test_mixed_lengths_pack_whole_chains_side_by_side(dark, ragged):
    for store in (dark, ragged):
        sampler = ChainSampler(store, trajectories=7, seed=3, lengths="mixed")
        batch = sampler.sample(5, 12)
        trajectory, seen = trajectory_index(batch), set()
        for row in range(12):
            chains = batch.segment[row].max() + 1
            counts = []
            for chain in range(chains):
                own = batch.segment[row] == chain
                count = trajectory[row, own].max() + 1
                counts.append(count)
                # A chain like any other: positions from 0, one best trajectory at its end, one target.
                np.testing.assert_array_equal(batch.position[row, own], np.arange(own.sum()))
                np.testing.assert_array_equal(batch.last[row, own], trajectory[row, own] == count - 1)
                assert not batch.previous_action[row, own][0].any()
                starts = own & (batch.step[row] == 0)
                assert np.ptp(batch.return_to_go[row, starts]) == 0
                totals = np.bincount(trajectory[row, own], batch.reward[row, own])
                assert (np.diff(totals) >= 0).all()
            assert sum(counts) == 7
            seen |= set(counts)
        assert len(seen) >= 5
        alone = sampler.sample(5, [9])
        for values, own in zip(batch, alone, strict=True):
            np.testing.assert_array_equal(values[9:10], own)


@pytest.mark.parametrize("kind", ["even", "ragged", "dark"])
@pytest.mark.parametrize("lengths", ["full", "mixed"])
def test_a_timestep_is_the_same_whichever_others_are_asked_for(request, kind, lengths):
    store = request.getfixturevalue(kind)
    sampler = ChainSampler(store, trajectories=6, seed=4, lengths=lengths)
    whole = sampler.sample(7, 5)
    rng = np.random.default_rng(0)
    for places in (
        rng.permutation(sampler.timesteps)[:20],
        np.r_[-1, 3, 0, 10_000, sampler.timesteps - 1],
        np.arange(4),
    ):
        part = ChainSampler(store, trajectories=6, seed=4, lengths=lengths).sample(7, [3, 1], places)
        rows = type(whole)(*(values[[3, 1]] for values in whole))
        assert_same(part, rows.take(places))


def test_only_the_timesteps_asked_for_are_read(tmp_path):
    store = write_store(tmp_path / "s.h5", numbered([1000] * 64), task="walker-walk", source="a test")
    part = ChainSampler(store, trajectories=8, seed=0)
    part.sample(0, 2, np.arange(2000, 4000))
    whole = ChainSampler(store, trajectories=8, seed=0)
    whole.sample(0, 2)

    def read(sampler):
        return sampler._stored().observation.is_read

    assert not (read(part) & ~read(whole)).any()
    # A quarter of two chains; whole blocks of rows are read, of each trajectory up to two besides its own.
    assert read(part).sum() <= read(whole).sum() / 4 + 2 * 4
    assert read(whole).sum() >= 2 * 8 * 1000 // BLOCK
