"""Policies that collect data: noise, wandering between waypoints, and scripted controllers.

A policy is a function `(environment, rng) -> act`, called once per episode, right after the reset. It draws random
numbers only from `rng`, so that an episode is a function of its seed. `act(step, physics)` takes the index of the step
and the physics state [P], and returns the action, float32 [A] in [-1, 1].
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32

from data.dmc import Environment
from data.errors import DataError
from data.tasks import goal_task, goal_task_names
from data.tasks.dark import ReacherDark

Act = Callable[[int, Float[np.ndarray, " P"]], Float32[np.ndarray, " A"]]


class Planned(NamedTuple):
    """An `Act` whose actions are all fixed before the episode."""

    actions: Float32[np.ndarray, "M A"]

    def __call__(self, step: int, physics: Float[np.ndarray, " P"]) -> Float32[np.ndarray, " A"]:
        """Returns the action of a step."""
        return self.actions[step]


Controller = Callable[[Float[np.ndarray, " P"]], Float32[np.ndarray, " A"]]

_LONGEST_REPEAT = 10
_WAYPOINT_NOISE = 0.2


def uniform(environment: Environment, rng: np.random.Generator) -> Act:
    """Returns a policy whose actions are independent and uniform over [-1, 1]."""
    return Planned(_uniform_actions(environment, rng))


def repeat(environment: Environment, rng: np.random.Generator) -> Act:
    """Returns a policy that holds a uniform action for 1 to 10 steps, then draws another, so that it moves farther."""
    steps = environment.episode_steps
    holds = rng.integers(1, _LONGEST_REPEAT + 1, steps)
    return Planned(np.repeat(_uniform_actions(environment, rng), holds, axis=0)[:steps])


def pink(environment: Environment, rng: np.random.Generator) -> Act:
    """Returns a policy of pink noise (power proportional to 1/frequency) of unit variance, clipped to [-1, 1].

    Eberhard et al. 2023, "Pink Noise Is All You Need". Pink noise lies between white noise, whose effects average out
    near the start, and a random walk.
    """
    steps, size = environment.episode_steps, environment.action_space.shape[0]
    # Drawn in the frequency domain (Timmer & Koenig 1995). Frequency 0 gets the weight of the lowest positive one.
    frequency = np.fft.rfftfreq(2 * steps)
    weight = 1.0 / np.sqrt(np.maximum(frequency, frequency[1]))
    spectrum = weight * (rng.standard_normal((size, weight.size)) + 1j * rng.standard_normal((size, weight.size)))
    noise = np.fft.irfft(spectrum, n=2 * steps)[:, :steps]
    power = (weight[0] ** 2 + 4 * np.sum(weight[1:-1] ** 2) + weight[-1] ** 2) / (2 * steps) ** 2
    return Planned(np.clip(noise / np.sqrt(power), -1.0, 1.0).T.astype(np.float32))


def waypoints(environment: Environment, rng: np.random.Generator) -> Act:
    """Returns a policy for a hidden-goal task: goes straight to a random place and stays, or goes on to a second one.

    Half of the episodes have one waypoint, and half have two, with the change at a uniformly random step in the middle
    half of the episode. Waypoints are drawn as goals are. Each action is independently replaced by uniform noise, with
    a probability that is uniform up to 20 % over the episodes. Correlated noise would teach a model to copy its last
    action. DataError for a task without a hidden goal.
    """
    task = goal_task(environment.task_name)
    if task is None:
        raise DataError(
            f"policy 'waypoints' goes where goals may be hidden, and {environment.task_name} hides none. "
            f"Use another policy, or one of the tasks {', '.join(goal_task_names())}"
        )
    steps = environment.episode_steps
    first, second = task.sample_goal(rng), task.sample_goal(rng)
    change = rng.integers(steps // 4, 3 * steps // 4 + 1) if rng.random() < 0.5 else steps
    noise = _noise(environment, rng, share=rng.uniform(0.0, _WAYPOINT_NOISE))

    def act(step: int, physics: Float[np.ndarray, " P"]) -> Float32[np.ndarray, " A"]:
        return noise[step] if step in noise else task.oracle(physics, first if step < change else second)

    return act


def scripted(environment: Environment, rng: np.random.Generator) -> Act:
    """Returns a scripted controller, which is given the task's hidden goal if there is one, with noise in its actions.

    Each action is replaced by uniform noise with a probability that is uniform over the episodes. So their returns
    range from those of random actions to those of the controller. DataError for a task without a controller.
    """
    noise = _noise(environment, rng, share=rng.uniform())
    control = controller(environment)
    return lambda step, physics: noise[step] if step in noise else control(physics)


POLICIES: dict[str, Callable[[Environment, np.random.Generator], Act]] = {
    "uniform": uniform,
    "repeat": repeat,
    "pink": pink,
    "waypoints": waypoints,
    "scripted": scripted,
}


def controller(environment: Environment) -> Controller:
    """Returns a scripted controller for the environment's current episode; it uses the hidden goal and other extras.

    DataError for a task that has none.
    """
    task = goal_task(environment.task_name)
    if task is not None:
        goal = environment.extras()["goal"]
        return lambda physics: task.oracle(physics, goal)
    if environment.task_name not in _CONTROLLERS:
        known = ", ".join(sorted({*_CONTROLLERS, *goal_task_names()}))
        raise DataError(f"{environment.task_name} has no scripted controller; these have one: {known}")
    return _CONTROLLERS[environment.task_name](environment)


def _point_mass(environment: Environment) -> Controller:
    # The reward falls with the control, so the gains are small: the target is still twice as wide as the steady error.
    gains = environment.extras()["gains"].reshape(2, 2) if environment.task_name == "point_mass-hard" else np.eye(2)
    mixing = np.linalg.inv(gains.T)  # joint force = gains^T control

    def control(physics: Float[np.ndarray, " 4"]) -> Float32[np.ndarray, " 2"]:
        force = mixing @ (-20.0 * physics[:2] - 4.0 * physics[2:])
        return (force / max(1.0, np.abs(force).max())).astype(np.float32)

    return control


def _reacher(environment: Environment) -> Controller:
    target = environment.extras()["target"]
    return lambda physics: ReacherDark().oracle(physics, target)


def _pendulum(environment: Environment) -> Controller:
    """Pumps energy until the pole can reach the top (Astrom & Furuta 2000), then balances it there."""
    return _pendulum_action


def _pendulum_action(physics: Float[np.ndarray, " 2"]) -> Float32[np.ndarray, " 1"]:
    angle = (physics[0] + np.pi) % (2 * np.pi) - np.pi  # 0 is upright
    speed = physics[1]
    if abs(angle) < 0.3:
        torque = -8.0 * angle - 2.0 * speed
    else:
        # The energy of a point mass on a rod of 0.5 m under g = 9.81 m/s^2, divided by its mass and length squared.
        energy = 0.5 * speed**2 + 9.81 / 0.5 * (np.cos(angle) - 1.0)
        torque = -np.sign(energy) * (1.0 if speed >= 0 else -1.0)
    return np.array([np.clip(torque, -1.0, 1.0)], np.float32)


def _cartpole(environment: Environment) -> Controller:
    """Pumps energy into the pole with the cart near the middle (Astrom & Furuta 2000), then balances it at the top."""
    return _cartpole_action


def _cartpole_action(physics: Float[np.ndarray, " 4"]) -> Float32[np.ndarray, " 1"]:
    position, angle, velocity, speed = physics
    angle = (angle + np.pi) % (2 * np.pi) - np.pi  # 0 is upright
    if abs(angle) < 0.35 and abs(speed) < 4.0:
        # The linear-quadratic regulator of dm_control's model (1 kg cart, 0.1 kg pole of 1 m, 10 N) about the top, with
        # costs of 2, 10, 1 and 1 for the state and 4 for the control.
        force = 0.707 * position + 6.949 * angle + 1.047 * velocity + 1.814 * speed
        return np.array([np.clip(force, -1.0, 1.0)], np.float32)
    energy = _POLE_INERTIA * speed**2 / 2 + 0.1 * 9.81 * 0.5 * (np.cos(angle) - 1.0)
    force = 10.0 * energy * speed * np.cos(angle) - position - velocity
    return np.array([np.clip(force, -1.0, 1.0)], np.float32)


_POLE_INERTIA = 0.1 / 3  # moment of inertia of a 0.1 kg rod of 1 m about its end, kg m^2


_CONTROLLERS: dict[str, Callable[[Environment], Controller]] = {
    **{f"cartpole-{task}": _cartpole for task in ("balance", "balance_sparse", "swingup", "swingup_sparse")},
    "point_mass-easy": _point_mass,
    "point_mass-hard": _point_mass,
    "reacher-easy": _reacher,
    "reacher-hard": _reacher,
    "pendulum-swingup": _pendulum,
}


def _uniform_actions(environment: Environment, rng: np.random.Generator) -> Float32[np.ndarray, "M A"]:
    shape = (environment.episode_steps, environment.action_space.shape[0])
    return rng.uniform(-1.0, 1.0, shape).astype(np.float32)


def _noise(environment: Environment, rng: np.random.Generator, *, share: float) -> dict[int, np.ndarray]:
    """Returns {step: uniform random action}; each step is included independently with probability `share`."""
    chosen = np.flatnonzero(rng.random(environment.episode_steps) < share)
    actions = rng.uniform(-1.0, 1.0, (chosen.size, environment.action_space.shape[0])).astype(np.float32)
    return dict(zip(chosen.tolist(), actions, strict=True))
