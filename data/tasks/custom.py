"""dm_control environments for the tasks that its suite lacks, built on the suite's own bodies."""

from collections.abc import Callable

import mujoco
import numpy as np
from dm_control.rl import control
from dm_control.suite import point_mass, reacher

from data.tasks import GoalTask, cheetah, goal_task, hopper, jaco, maze, quadruped, walker
from data.tasks.map import sample_signs


class HiddenGoal:
    """Mixin that gives a dm_control task a goal which is drawn for every episode and is not in the observation.

    It comes before one of the suite's task classes, and replaces the start state, the observation and the reward.
    """

    goal: np.ndarray
    """The goal of the present episode. Given through `next_goal`, or else drawn."""
    next_goal: np.ndarray | None = None
    """The goal of the next episode; used once."""

    def __init__(self, goal_task: GoalTask, **options) -> None:
        self.goal_task = goal_task
        super().__init__(**options)

    def initialize_episode(self, physics) -> None:
        """Sets the start position and the goal of an episode."""
        # The start is drawn first, so that it does not depend on the goal.
        physics.data.qpos[:] = self.goal_task.sample_start(self.random)
        drawn = self.goal_task.sample_goal(self.random)
        self.goal, self.next_goal = (drawn if self.next_goal is None else self.next_goal), None

    def get_observation(self, physics) -> dict[str, np.ndarray]:
        """Returns position and velocity; neither depends on the goal."""
        return {"position": physics.position(), "velocity": physics.velocity()}

    def get_reward(self, physics) -> float:
        """Returns 1 within the radius of the goal, else 0."""
        return float(self.goal_task.reward(physics.get_state(), self.goal))

    def show_goal(self, physics) -> None:
        """Moves the model's coloured target to the goal; called before a frame is rendered."""
        physics.named.model.geom_pos["target", ["x", "y"]] = self.goal
        physics.named.model.geom_size["target", 0] = self.goal_task.radius
        # Not forward(): it would change the solver's warm start, and so the rest of the episode.
        mujoco.mj_kinematics(physics.model.ptr, physics.data.ptr)


class SignedPlace(HiddenGoal):
    """A hidden-goal task whose observation includes the sign of a place; the sign is drawn for every episode, or
    given."""

    sign: np.ndarray
    """The sign of the present episode. Given through `next_sign`, or else drawn."""
    next_sign: np.ndarray | None = None
    """The sign of the next episode; used once."""

    def initialize_episode(self, physics) -> None:
        """Sets the start position, the goal and the sign of an episode."""
        super().initialize_episode(physics)
        drawn = sample_signs(self.random)
        self.sign, self.next_sign = (drawn if self.next_sign is None else self.next_sign), None

    def get_observation(self, physics) -> dict[str, np.ndarray]:
        """Returns position, velocity and the sign."""
        return super().get_observation(physics) | {"sign": self.sign}


class PointMassDark(HiddenGoal, point_mass.PointMass):
    """dm_control task of `point_mass-dark`."""


class PointMassMap(SignedPlace, point_mass.PointMass):
    """dm_control task of `point_mass-map`."""


class ReacherDark(HiddenGoal, reacher.Reacher):
    """dm_control task of `reacher-dark`."""


class ReacherMap(SignedPlace, reacher.Reacher):
    """dm_control task of `reacher-map`."""


def load(name: str) -> control.Environment | None:
    """Returns a new dm_control environment of the task `name` of this module, or None when it has no such task."""
    builder = _BUILDERS.get(name)
    return builder() if builder else None


def names() -> tuple[str, ...]:
    """Returns the names of the tasks that `load` can load."""
    return tuple(_BUILDERS)


def _hidden(name: str, domain, task_class: type, **options) -> control.Environment:
    goal = goal_task(name)
    physics = domain.Physics.from_xml_string(*domain.get_model_and_assets())
    seconds = goal.episode_steps * goal.action_steps * physics.timestep()
    return control.Environment(physics, task_class(goal, **options), time_limit=seconds, n_sub_steps=goal.action_steps)


_BUILDERS: dict[str, Callable[[], control.Environment]] = {
    "point_mass-dark": lambda: _hidden("point_mass-dark", point_mass, PointMassDark, randomize_gains=False),
    "point_mass-map": lambda: _hidden("point_mass-map", point_mass, PointMassMap, randomize_gains=False),
    "reacher-dark": lambda: _hidden("reacher-dark", reacher, ReacherDark, target_size=0.05),
    "reacher-map": lambda: _hidden("reacher-map", reacher, ReacherMap, target_size=0.05),
    **cheetah.BUILDERS,
    **hopper.BUILDERS,
    **jaco.BUILDERS,
    **maze.BUILDERS,
    **quadruped.BUILDERS,
    **walker.BUILDERS,
}
