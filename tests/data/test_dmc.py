"""dmc: the environments pay and show what dm_control does, and an episode is a function of its seed."""

import subprocess
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from dm_control import composer, suite
from dm_control.suite import quadruped
from gymnasium.utils.env_checker import check_env

from data import dmc
from data.dmc import Environment, make
from data.environment_batch import EnvironmentBatch
from data.errors import DataError
from data.tasks import jaco

# Every domain of the suite's benchmark once, and what is special: no limits (lqr), asymmetric ranges (quadruped), RK4.
COMPARED = ["acrobot-swingup", "ball_in_cup-catch", "cartpole-swingup", "cheetah-run", "finger-turn_easy", "fish-swim"]
COMPARED += ["hopper-hop", "humanoid-run", "manipulator-bring_ball", "pendulum-swingup", "point_mass-easy"]
COMPARED += ["point_mass-hard", "quadruped-walk", "reacher-hard", "swimmer-swimmer6", "walker-walk"]


def actions(environment: Environment, steps: int, seed: int = 0) -> np.ndarray:
    size = environment.action_space.shape[0]
    return np.random.default_rng(seed).uniform(-1, 1, (steps, size)).astype(np.float32)


@pytest.mark.parametrize("task", COMPARED)
def test_steps_are_those_of_dm_control(task: str):
    environment = make(task)
    theirs = suite.load(*task.split("-"), environment_kwargs={"flat_observation": True})
    theirs.task._random = np.random.RandomState(np.random.MT19937(np.random.SeedSequence(5)))
    spec = theirs.action_spec()
    expected = theirs.reset()
    observation, info = environment.reset(seed=5)
    for action in actions(environment, 20):
        np.testing.assert_array_equal(observation, expected.observation["observations"].astype(np.float32))
        np.testing.assert_array_equal(info["physics"], theirs.physics.get_state())
        expected = theirs.step(spec.minimum + (spec.maximum - spec.minimum) / 2 * (action.astype(np.float64) + 1))
        observation, reward, terminated, truncated, info = environment.step(action)
        assert reward == expected.reward
        assert (terminated, truncated, info["discount"]) == (False, False, expected.discount)


def test_escape_is_dm_controls_without_opengl(monkeypatch):
    theirs = suite.load("quadruped", "escape", environment_kwargs={"flat_observation": True})
    theirs.task._random = np.random.RandomState(np.random.MT19937(np.random.SeedSequence(5)))
    monkeypatch.setattr(quadruped.Physics, "contexts", None)  # they ask for it at every reset
    expected = theirs.reset()
    environment = make("quadruped-escape")
    other = environment.clone()
    observation, _ = environment.reset(seed=5)
    first = environment._physics.model.hfield_data.copy()
    other.reset(seed=6)
    np.testing.assert_array_equal(environment._physics.model.hfield_data, first)
    assert not np.array_equal(other._physics.model.hfield_data, first)
    spec = theirs.action_spec()
    for action in actions(environment, 5):
        np.testing.assert_array_equal(observation, expected.observation["observations"].astype(np.float32))
        expected = theirs.step(spec.minimum + (spec.maximum - spec.minimum) / 2 * (action.astype(np.float64) + 1))
        observation, reward, *_ = environment.step(action)
        assert reward == expected.reward


def test_jaco_is_composers():
    task = jaco.reach_task(jaco.PLACES["top_left"])
    theirs = composer.Environment(task, time_limit=10.0)
    theirs._random_state = np.random.RandomState(np.random.MT19937(np.random.SeedSequence(5)))
    environment = make("jaco-reach_top_left")
    expected, (observation, info) = theirs.reset(), environment.reset(seed=5)
    spec, steps, truncated = theirs.action_spec(), 0, False
    assert environment.observation_space.shape == (42,)
    for action in actions(environment, 1000):
        shown = np.concatenate([part.ravel() for part in expected.observation.values()])
        np.testing.assert_array_equal(observation, shown.astype(np.float32))
        np.testing.assert_array_equal(info["physics"], theirs.physics.get_state())
        assert expected.last() == truncated
        if truncated:
            break
        expected = theirs.step(spec.minimum + (spec.maximum - spec.minimum) / 2 * (action.astype(np.float64) + 1))
        observation, reward, _, truncated, info = environment.step(action)
        steps += 1
        assert reward == expected.reward
    assert steps == environment.episode_steps == 250


def test_episodes_have_the_length_of_dm_controls():
    for task in ("cartpole-swingup", "ball_in_cup-catch", "finger-spin", "swimmer-swimmer6", "point_mass-easy"):
        theirs = suite.load(*task.split("-"))
        zero, count = np.zeros(theirs.action_spec().shape), 0
        theirs.reset()
        while not theirs.step(zero).last():
            count += 1
        assert make(task).episode_steps == count + 1 == 1000


@pytest.mark.parametrize("task", ["reacher-easy", "quadruped-run", "lqr-lqr_2_1", "point_mass-dark", "walker-flip"])
def test_gymnasium_approves(task: str):
    with pytest.warns(UserWarning, match="infinity|observation space"):
        check_env(make(task), skip_render_check=True)


def test_the_time_limit_truncates_and_the_next_step_is_an_error():
    environment = make("point_mass-easy", episode_steps=3)
    with pytest.raises(gymnasium.error.ResetNeeded, match=r"point_mass-easy: step\(\) was called after the end"):
        environment.step(np.zeros(2))
    environment.reset(seed=0)
    ends = [environment.step(np.zeros(2))[2:4] for _ in range(3)]
    assert ends == [(False, False), (False, False), (False, True)]
    with pytest.raises(gymnasium.error.ResetNeeded, match="Call reset"):
        environment.step(np.zeros(2))
    environment.reset()
    environment.step(np.zeros(2))


def test_lqr_terminates_at_the_origin_with_discount_zero():
    environment = make("lqr-lqr_2_1")
    environment.reset(seed=0)
    environment.set_physics_state(np.zeros(4))
    _, _, terminated, truncated, info = environment.step(np.zeros(1))
    assert (terminated, truncated, info["discount"]) == (True, False, 0.0)
    with pytest.raises(gymnasium.error.ResetNeeded):
        environment.step(np.zeros(1))


def test_lqr_is_the_same_system_every_time():
    first, second = make("lqr-lqr_6_2"), make("lqr-lqr_6_2")
    first.reset(seed=1), second.reset(seed=1)
    np.testing.assert_array_equal(first.step(np.ones(2))[0], second.step(np.ones(2))[0])


def test_native_ranges_that_are_not_symmetric():
    environment = make("quadruped-walk")
    spec = suite.load("quadruped", "walk").action_spec()
    np.testing.assert_allclose(environment.native_action(np.full(12, 1.0)), spec.maximum)
    np.testing.assert_allclose(environment.native_action(np.full(12, -1.0)), spec.minimum)


def test_an_episode_depends_on_its_seed_alone():
    def episode(environment: Environment, seed):
        rows = [environment.reset(seed=seed)[0]]
        return np.stack(rows + [environment.step(action)[0] for action in actions(environment, 5)])

    used = make("manipulator-bring_ball")
    episode(used, 8)
    np.testing.assert_array_equal(episode(used, (3, 1)), episode(make("manipulator-bring_ball"), (3, 1)))
    assert not np.array_equal(episode(used, (3, 1)), episode(used, (3, 2)))
    # Without a seed the stream goes on, so the next episode is another one, and it too follows from the seed.
    used.reset(seed=3)
    follower = make("manipulator-bring_ball")
    follower.reset(seed=3)
    np.testing.assert_array_equal(used.reset()[0], follower.reset()[0])


def test_physics_state_round_trip():
    environment = make("walker-walk")
    environment.reset(seed=0)
    for action in actions(environment, 5):
        observation, *_, info = environment.step(action)
    environment.reset(seed=1)
    environment.set_physics_state(info["physics"])
    np.testing.assert_array_equal(environment.physics_state(), info["physics"])
    np.testing.assert_allclose(environment._observe(), observation, atol=1e-6)
    with pytest.raises(DataError, match=r"has 18 numbers; got shape \(3,\)"):
        environment.set_physics_state(np.zeros(3))


@pytest.mark.parametrize("task", ["point_mass-dark", "reacher-easy", "walker-run", "fish-swim", "lqr-lqr_2_1"])
def test_a_batch_is_bitwise_that_many_single_environments(task: str):
    rows, steps = 3, 6
    batch = EnvironmentBatch(task, rows, episode_steps=steps)
    moves = np.stack([actions(batch.environments[0], steps, seed=row) for row in range(rows)], 1)
    seeds = [(9, row) for row in range(rows)]
    for _ in range(2):  # the second time the environments have a past
        observations = [batch.reset(seeds)]
        taken = [batch.step(action) for action in moves]
        states = batch.physics_states()
    observations += [step.observation for step in taken]
    for row in range(rows):
        single = make(task, episode_steps=steps)
        np.testing.assert_array_equal(single.reset(seed=seeds[row])[0], observations[0][row])
        for step in range(steps):
            observation, *rest, info = single.step(moves[step, row])
            np.testing.assert_array_equal(observation, observations[step + 1][row])
            assert rest == [taken[step].reward[row], taken[step].terminated[row], taken[step].truncated[row]]
        np.testing.assert_array_equal(info["physics"], states[row])


def test_rows_of_a_batch_that_are_over_rest():
    batch = EnvironmentBatch("lqr-lqr_2_1", 3, episode_steps=4)
    batch.reset([0, 1])
    assert batch.over.tolist() == [False, False, True]
    batch.environments[1].set_physics_state(np.zeros(4))
    first, second = batch.step(np.zeros((3, 1))), batch.step(np.ones((3, 1)))
    assert first.terminated.tolist() == [False, True, True]
    assert second.reward[0] != 0
    assert second.reward[1:].tolist() == [0, 0]
    np.testing.assert_array_equal(first.observation[1:], second.observation[1:])
    assert not np.array_equal(first.observation[0], second.observation[0])


def test_a_batch_refuses_what_does_not_fit():
    batch = EnvironmentBatch("point_mass-dark", 2)
    with pytest.raises(DataError, match=r"takes up to 2 seeds.*got 3 seeds"):
        batch.reset([0, 1, 2])
    with pytest.raises(DataError, match="got 2 seeds and 1 goals"):
        batch.reset([0, 1], np.zeros((1, 2)))
    with pytest.raises(DataError, match=r"have shape \(2, 2\); got \(2,\)"):
        batch.step(np.zeros(2))
    with pytest.raises(DataError, match="count=0"):
        EnvironmentBatch("point_mass-dark", 0)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("walker-wlak", "did you mean 'walker-walk'"),
        ("walker_walk", "did you mean 'walker-walk'"),
        ("point_mass_dark", "'point_mass-dark'"),
        ("zzz", "see `python -m data.tasks`"),
    ],
)
def test_unknown_tasks(name: str, message: str):
    with pytest.raises(DataError, match=message):
        make(name)


def test_actions_that_are_none():
    environment = make("point_mass-easy")
    environment.reset(seed=0)
    wrong = (
        (np.zeros(3), r"has shape \(2,\); got \(3,\)"),
        ([0, 1.5], "Clip it"),
        ([0, 1.00001], "Clip it"),
        ([0, np.nan], "nan"),
    )
    for action, message in wrong:
        with pytest.raises(DataError, match=message):
            environment.step(np.array(action))
    above = environment.native_action(np.nextafter(np.float32([1, -1]), np.float32([2, -2])))
    np.testing.assert_array_equal(above, environment.native_action(np.float32([1, -1])))


def test_options_that_are_none():
    environment = make("point_mass-easy")
    with pytest.raises(DataError, match="reset option 'gaol' is unknown"):
        environment.reset(options={"gaol": 1})
    with pytest.raises(DataError, match="point_mass-easy hides no goal"):
        environment.reset(options={"goal": np.zeros(2)})
    with pytest.raises(DataError, match="a goal is 2 finite numbers"):
        make("point_mass-dark").reset(options={"goal": [0.0, np.nan]})
    with pytest.raises(DataError, match="a seed is not negative"):
        environment.reset(seed=-1)
    with pytest.raises(DataError, match="episode_steps must be at least 1; got 0"):
        make("point_mass-easy", episode_steps=0)
    with pytest.raises(DataError, match="render_mode 'human' is unknown"):
        make("point_mass-easy", render_mode="human")


def test_registration():
    dmc.register()
    dmc.register()
    environment = gymnasium.make("rlring/ball_in_cup-catch-v0")
    assert environment.unwrapped.task_name == "ball_in_cup-catch"
    assert environment.reset(seed=0)[0].shape == (8,)
    assert {"rlring/point_mass-dark-v0", "rlring/walker-flip-v0"} <= set(gymnasium.registry)


def test_nothing_is_rendered_unless_asked():
    environment = make("point_mass-dark")
    environment.reset(seed=0)
    assert environment.render() is None


def test_deprecations_stay_hidden_as_python_hides_them():
    """Importing dm_control.composer shows them all: with NumPy 2.5 hundreds of lines a task."""
    code = "import warnings, data.dmc; assert ('always', None, DeprecationWarning, None, 0) not in warnings.filters"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2], timeout=120)
