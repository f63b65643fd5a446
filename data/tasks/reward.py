"""Builds suite tasks with other rewards: the tasks of ExoRL (Yarats et al. 2022) and of projects that use its data.

The bodies are the suite's. Rewards and arenas are those of ExoRL's `custom_dmc_tasks`, and for later tasks those of
Meta's `dmc_tasks` (TD-JEPA, metamotivo). No file of either is copied: ExoRL's models include a file by an absolute path
on its authors' machine.
"""

from collections.abc import Callable

import numpy as np
from dm_control import mujoco, suite
from dm_control.rl import control
from dm_control.utils import rewards

Reward = Callable[[mujoco.Physics], float]
Builder = Callable[[], control.Environment]


class OtherReward:
    """Mixin that replaces the reward of one of the suite's task classes; it comes before that class."""

    def __init__(self, reward: Reward, **options) -> None:
        self._reward = reward
        super().__init__(**options)

    def get_reward(self, physics) -> float:
        """Returns the reward of the function given at construction."""
        return self._reward(physics)


def variant(task: str, seconds: float, task_class: type, reward: Reward, **options) -> Builder:
    """Returns a builder of a suite task (`domain-task`) with another reward and a time limit of `seconds`.

    `options` are passed to `task_class`.
    """

    def build() -> control.Environment:
        environment = suite.load(*task.split("-"), task_kwargs={"random": 0})
        return control.Environment(
            environment.physics,
            task_class(reward, **options),
            time_limit=seconds,
            control_timestep=environment.control_timestep(),
        )

    return build


def rise(value: float, target: float, *, margin: float | None = None, least: float = 0.0) -> float:
    """Returns 1 for values from `target` up. Below it, falls linearly, through `least` at `target - margin`, to 0.

    `margin` defaults to `target`.
    """
    margin = target if margin is None else margin
    return rewards.tolerance(value, (target, np.inf), margin=margin, value_at_margin=least, sigmoid="linear")


def turn(physics: mujoco.Physics) -> float:
    """Returns the angular momentum of a planar body about the axis perpendicular to the plane, in kg m^2/s."""
    # MuJoCo computes the momentum of every subtree because the models have a velocity sensor of the torso's subtree.
    return physics.named.data.subtree_angmom["torso"][1]
