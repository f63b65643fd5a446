"""A suite task with another reward: what the tasks of ExoRL (Yarats et al. 2022) and of its users are made of.

They are built on the suite's own bodies; rewards and arenas are those of ExoRL's `custom_dmc_tasks`, and of Meta's
`dmc_tasks` (TD-JEPA, metamotivo) for the tasks that came later. Nothing of either is vendored: ExoRL's models include a
file by an absolute path of its authors' machine.
"""

from collections.abc import Callable

import numpy as np
from dm_control import mujoco, suite
from dm_control.rl import control
from dm_control.utils import rewards

Reward = Callable[[mujoco.Physics], float]
Builder = Callable[[], control.Environment]


class OtherReward:
    """Mixed in before one of the suite's task classes, whose reward it replaces."""

    def __init__(self, reward: Reward, **options) -> None:
        self._reward = reward
        super().__init__(**options)

    def get_reward(self, physics) -> float:
        """Returns what the given function pays."""
        return self._reward(physics)


def variant(task: str, seconds: float, task_class: type, reward: Reward, **options) -> Builder:
    """Returns a builder of a suite task (`domain-task`, so many seconds long) with another reward."""

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
    """Returns 1 from the target upwards; below, a line through `least` at one margin (or the target), and 0 at last."""
    margin = target if margin is None else margin
    return rewards.tolerance(value, (target, np.inf), margin=margin, value_at_margin=least, sigmoid="linear")


def turn(physics: mujoco.Physics) -> float:
    """Returns the angular momentum of a planar body about the axis it turns around, in kg m^2/s."""
    # MuJoCo computes every subtree's momentum because the models have a velocity sensor of the torso's.
    return physics.named.data.subtree_angmom["torso"][1]
