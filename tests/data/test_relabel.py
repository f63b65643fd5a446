"""relabel: what is computed from stored physics states is what the environment paid."""

import dataclasses

import numpy as np
import pytest
from dm_control import suite

from data.collect import roll_out
from data.dmc import Environment, make, task_names
from data.episode_randomization import EPISODE_RANDOMIZATIONS
from data.errors import DataError
from data.exorl import read_episode, write_episode
from data.relabel import _REFUSED, relabel
from data.tasks import goal_task
from data.tasks.maze import ROOMS
from data.trajectory import Trajectory

BENCHMARK = [f"{domain}-{task}" for domain, task in suite.BENCHMARKING]
RELABELLED = sorted({*BENCHMARK, *task_names()} - set(_REFUSED))
# The same body and the same kind of reward as others here.
ALIKE = {*(f"pointmass-{name}" for name in ("loop", "square", "fast_slow", *(f"reach_{room}" for room in ROOMS)))}
ALIKE |= {*(f"{body}-reach_{room}" for body in ("jaco", "point_mass_maze") for room in list(ROOMS)[1:])}
EACH = [pytest.param(task, marks=pytest.mark.slow) if task in ALIKE else task for task in RELABELLED]
CHARGES_CONTROL = {
    *(f"cartpole-{task}" for task in ("balance", "swingup", "two_poles", "three_poles")),
    *(f"humanoid-{task}" for task in ("run", "run_pure_state", "stand", "walk")),
    *(f"humanoid_CMU-{task}" for task in ("run", "stand", "walk")),
    *("hopper-stand", "point_mass-easy", "point_mass-hard"),
    *(f"{maze}-reach_{room}" for maze in ("point_mass_maze", "pointmass") for room in ROOMS),
}
# Positions and velocities, by MuJoCo index, from which random actions are paid something that changes.
STARTS = {
    "acrobot-swingup_sparse": {0: 0.1, 1: 0.0, 2: 0.0, 3: 0.0},
    "ball_in_cup-catch": {2: 0.0, 3: 0.45, 7: -1.0},
    "cartpole-swingup": {0: 0.0, 1: 0.3},
    "cartpole-swingup_sparse": {0: 0.0, 1: 0.05},
    "cheetah-run": {9: 5.0},
    "cheetah-walk": {9: 1.0},
    "cheetah-walk_backward": {9: -1.0},
    "cheetah-run_backward": {9: -5.0},
    "cheetah-flip": {11: 4.0},
    "cheetah-flip_backward": {11: -4.0},
    "hopper-flip": {1: 0.1, 2: 0.0, 3: 0.0, 4: 0.0, 5: 0.0, 6: 0.0, 9: 4.0},
    "hopper-flip_backward": {1: 0.1, 2: 0.0, 3: 0.0, 4: 0.0, 5: 0.0, 6: 0.0, 9: -4.0},
    "hopper-hop_backward": {1: 0.1, 2: 0.0, 3: 0.0, 4: 0.0, 5: 0.0, 6: 0.0, 7: -2.0},
    "finger-spin": {5: -17.0},
    "finger-turn_easy": {5: 30.0},
    "finger-turn_hard": {5: 15.0},
    "hopper-hop": {1: 0.1, 2: 0.0, 3: 0.0, 4: 0.0, 5: 0.0, 6: 0.0, 7: 2.0},
    "hopper-stand": {1: 0.1, 2: 0.0, 3: 0.0, 4: 0.0, 5: 0.0, 6: 0.0},
    "jaco-reach_top_left": {0: 5.29, 1: 3.8, 2: 0.91, 3: 3.22, 4: 5.99, 5: 5.37},
    "jaco-reach_top_right": {0: 4.74, 1: 3.79, 2: 0.88, 3: 3.21, 4: 6.02, 5: 4.81},
    "jaco-reach_bottom_left": {0: 4.8, 1: 4.01, 2: 1.62, 3: 6.05, 4: 0.87, 5: 1.43},
    "jaco-reach_bottom_right": {0: 4.73, 1: 3.99, 2: 1.58, 3: 3.36, 4: 5.44, 5: 4.95},
    "pendulum-swingup": {0: 0.0, 1: 0.5},
    "point_mass-easy": {0: 0.01, 1: 0.01},
    "point_mass-hard": {0: 0.01, 1: 0.01},
    **{
        f"{maze}-reach_{room}": {0: x - 0.01 * np.sign(x), 1: y + 0.01 * np.sign(y)}
        for maze in ("point_mass_maze", "pointmass")
        for room, (x, y) in ROOMS.items()
    },
    **{f"{maze}-loop": {0: -0.14, 1: 0.14, 2: 0.08, 3: 0.08} for maze in ("point_mass_maze", "pointmass")},
    "pointmass-reach_bottom_left_long": {0: 0.0, 1: 0.25, 2: 0.05},
    **{f"{maze}-square": {0: 0.0, 1: 0.25, 2: 0.05} for maze in ("point_mass_maze", "pointmass")},
    **{f"{maze}-fast_slow": {0: 0.0, 1: 0.25, 2: -0.05} for maze in ("point_mass_maze", "pointmass")},
}
# Tasks that pay only at a drawn place, and the place that is there: the target is put where the body is.
PLACES = {
    **{f"finger-{task}": ("site_xpos", "tip", ["x", "z"]) for task in ("turn_easy", "turn_hard")},
    **{f"reacher-{task}": ("geom_xpos", "finger", ["x", "y"]) for task in ("easy", "hard")},
    **{f"stacker-{task}": ("site_xpos", "box0", ["x", "z"]) for task in ("stack_2", "stack_4")},
    **{f"manipulator-{task}_ball": ("site_xpos", "ball", ["x", "z"]) for task in ("bring", "insert")},
    **{f"manipulator-{task}_peg": ("site_xpos", "peg_grasp", ["x", "z"]) for task in ("bring", "insert")},
}


def rewarding(environment: Environment) -> None:
    """Moves a new episode to where something is paid, target included."""
    state, task = environment.physics_state(), environment.task_name
    for index, value in STARTS.get(task, {}).items():
        state[index] = value
    environment.set_physics_state(state)
    if task in PLACES:
        field, name, columns = PLACES[task]
        place = getattr(environment._physics.named.data, field)[name, columns]
        target = environment.extras()["target"]
        target[:2] = place + 0.01
        environment.set_extras({"target": target})
        environment.set_physics_state(state)


class Rewarding(Environment):
    """An environment whose episodes start where something is paid."""

    def reset(self, **arguments):
        """As the environment's own, from elsewhere."""
        super().reset(**arguments)
        rewarding(self)
        return self._observe(), self._info(1.0)


def episodes(task: str, count: int = 2, steps: int = 40) -> list[Trajectory]:
    environment = Rewarding(task, episode_steps=None if goal_task(task) else steps)
    policy = "waypoints" if goal_task(task) else "repeat"
    return [roll_out(environment, policy, 3, index) for index in range(count)]


@pytest.mark.parametrize("task", EACH)
def test_relabelled_is_paid(task: str, tmp_path):
    collected = episodes(task)
    if goal_task(task) is None:
        rewards = np.concatenate([trajectory.reward for trajectory in collected])
        assert np.ptp(rewards) > 1e-8, "an episode that is always paid the same shows nothing"
    for index, trajectory in enumerate(collected):
        stored = read_episode(write_episode(tmp_path, index, trajectory))
        np.testing.assert_allclose(relabel(task, stored), trajectory.reward, rtol=0, atol=1e-6)
        free = relabel(task, stored, control="exorl")
        if task in CHARGES_CONTROL:
            # All these have actuators of range [-1, 1] and pay (4 + mean(1 - control^2)) / 5 of the rest.
            small = (4 + np.mean(1 - trajectory.action.astype(np.float64) ** 2, axis=1)) / 5
            np.testing.assert_allclose(trajectory.reward, free * small, rtol=0, atol=1e-6)
            assert np.abs(trajectory.reward - free).max() > 1e-5
        elif task.startswith("lqr"):
            cost = 0.1 / 2 * np.sum(trajectory.action.astype(np.float64) ** 2, axis=1)
            np.testing.assert_allclose(trajectory.reward, free - cost, rtol=0, atol=1e-6)
        else:
            np.testing.assert_array_equal(free, relabel(task, stored))


@pytest.mark.parametrize("task", EACH)
def test_whatever_the_model_draws_for_an_episode_is_kept(task: str):
    """Compares whole models between episodes: nothing but what extras() keeps may differ (colours and lamps aside)."""
    environment = make(task)
    environment.reset(seed=1)
    model = environment._physics.model
    public = [name for name in dir(model.ptr) if not name.startswith("_")]
    fields = [name for name in public if isinstance(getattr(model.ptr, name), np.ndarray)]
    before = {name: np.array(getattr(model, name)) for name in fields}
    environment.reset(seed=2)
    changed = {name for name in fields if not np.array_equal(before[name], getattr(model, name), equal_nan=True)}
    assert len(fields) > 200
    assert changed - {"light_pos", "geom_rgba", "site_rgba"} == {
        *(entry.field for entry in EPISODE_RANDOMIZATIONS.get(task, ())),
        *["hfield_data"] * (task == "quadruped-escape"),  # no reward depends on the terrain
    }
    kept = environment.extras()
    environment.reset(seed=3)
    environment.set_extras(kept)
    assert {key: value.tolist() for key, value in environment.extras().items()} == {
        key: value.tolist() for key, value in kept.items()
    }
    assert bool(kept) == (task in EPISODE_RANDOMIZATIONS or goal_task(task) is not None)


AS_EXORL = ["cartpole-swingup", "cheetah-walk", "hopper-flip", "jaco-reach_bottom_right", "point_mass_maze-loop"]
AS_EXORL += ["point_mass_maze-reach_top_left", "quadruped-fetch", "quadruped-jump", "walker-flip", "walker-spin"]


@pytest.mark.parametrize("task", AS_EXORL)
def test_exorls_own_procedure(task: str):
    """ExoRL's `relable_episode`: every state is set in a reset context, which leaves the control at 0."""
    trajectory = episodes(task, count=1, steps=10)[0]
    environment = make(task)
    physics, paid = environment._physics, []
    for state in trajectory.physics[1:]:
        with physics.reset_context():
            physics.set_state(state)
        paid.append(environment._task.get_reward(physics))
    np.testing.assert_allclose(relabel(task, trajectory, control="exorl"), paid, rtol=0, atol=1e-6)


DRAWS_TARGET = ["reacher-easy", "finger-turn_easy", "stacker-stack_2", "fish-swim", "swimmer-swimmer6"]


@pytest.mark.parametrize("task", DRAWS_TARGET)
def test_without_the_drawn_target_nothing_is_guessed(task: str):
    trajectory = episodes(task, count=1)[0]
    target = trajectory.extras["target"]
    bare = dataclasses.replace(trajectory, extras={})
    with pytest.raises(DataError, match=f"{task} draws a target for every episode"):
        relabel(task, bare)
    np.testing.assert_array_equal(relabel(task, bare, goal=target[0]), trajectory.reward)
    assert not np.array_equal(relabel(task, bare, goal=target[0] + 1.0), trajectory.reward)
    wandering = target + np.arange(len(target))[:, None]
    with pytest.raises(DataError, match="changes within the episode"):
        relabel(task, dataclasses.replace(trajectory, extras={"target": wandering}))


def test_episodes_of_one_task_serve_another():
    walk = episodes("walker-walk", count=1)[0]
    run = relabel("walker-run", walk)
    environment = make("walker-run")
    np.testing.assert_array_equal(run, environment.rewards_at(walk.physics[1:], walk.action).astype(np.float32))
    assert not np.array_equal(run, walk.reward)


def test_a_hidden_goal_can_be_chosen_in_hindsight():
    task = goal_task("point_mass-dark")
    trajectory = episodes("point_mass-dark", count=1)[0]
    goal = task.hindsight_goal(trajectory.physics[-1])
    reward = relabel("point_mass-dark", trajectory, goal=goal)
    assert reward[-1] == 1
    np.testing.assert_array_equal(reward, task.reward(trajectory.physics[1:], goal))
    bare = dataclasses.replace(trajectory, extras={})
    with pytest.raises(DataError, match="draws a goal for every episode"):
        relabel("point_mass-dark", bare)


@pytest.mark.parametrize("task", sorted(_REFUSED))
def test_what_is_refused_really_cannot_be_computed(task: str):
    environment = make(task, episode_steps=10)
    trajectory = roll_out(environment, "uniform", 0, 0)
    with pytest.raises(DataError, match=f"{task} cannot be relabelled: it pays for the forces under the paws"):
        relabel(task, trajectory)
    assert np.abs(environment.rewards_at(trajectory.physics[1:], trajectory.action) - trajectory.reward).max() > 1e-4


def test_errors():
    trajectory = episodes("point_mass-easy", count=1)[0]
    with pytest.raises(DataError, match="did you mean 'walker-walk'"):
        relabel("walker-wlak", trajectory)
    with pytest.raises(DataError, match="control 'none' is unknown; use 'actual'"):
        relabel("point_mass-easy", trajectory, control="none")
    with pytest.raises(DataError, match=r"no physics states.*URLB's do not"):
        relabel("point_mass-easy", dataclasses.replace(trajectory, physics=None))
    action = trajectory.action.copy()
    action[7] = 2
    with pytest.raises(DataError, match=r"episode 0: actions lie in \[-1, 1\]; step 7 has \[2.0, 2.0\]"):
        relabel("point_mass-easy", dataclasses.replace(trajectory, action=action))
    with pytest.raises(DataError, match="episode 0: not an episode of walker-walk's body, which has 6 actions and 18"):
        relabel("walker-walk", trajectory)
    with pytest.raises(DataError, match="point_mass-easy draws nothing for an episode"):
        relabel("point_mass-easy", trajectory, goal=np.zeros(2))
    with pytest.raises(DataError, match="the goal of point_mass-dark is 2 finite numbers"):
        relabel("point_mass-dark", trajectory, goal=np.zeros(3))
