"""The tasks that dm_control lacks, and functions of hidden-goal tasks that need no simulator (NumPy only)."""

from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from data.errors import DataError
from data.tasks.dark import PointMassDark, ReacherDark
from data.tasks.map import PointMassMap, ReacherMap


@runtime_checkable
class GoalTask(Protocol):
    """A task whose reward is a function of the physics state and of a goal that is not in the observation.

    Every method works on NumPy arrays with any leading dimensions, so one episode can be relabelled for thousands of
    goals at once. `physics` is dm_control's state vector (positions, then velocities), float64, or an observation,
    which starts with the same numbers. The leading dimensions of `goal` broadcast against those of `physics`.
    """

    name: str
    collected_on: str
    """The task whose episodes this one shares: it has the same body, start states and action repeat."""
    goal_size: int
    sign_size: int
    """Size of the sign, the last numbers of the observation, which identifies the place. 0: the task has no places."""
    radius: float
    """Distance (metres) from the goal within which the reward is 1."""
    action_steps: int
    """Action repeat: physics steps per action."""
    episode_steps: int
    """Actions in an episode."""

    def reward(self, physics: Float[np.ndarray, "... P"], goal: Float[np.ndarray, "... G"]) -> Float[np.ndarray, "..."]:
        """Returns 1 within the radius of the goal and 0 elsewhere, float32."""

    def hindsight_goal(self, physics: Float[np.ndarray, "... P"]) -> Float[np.ndarray, "... G"]:
        """Returns the goal that this state meets exactly: the position of the body, float64."""

    def sample_goal(self, rng: np.random.Generator | np.random.RandomState) -> Float[np.ndarray, " G"]:
        """Returns a goal drawn as the environment draws it, float64."""

    def oracle(
        self, physics: Float[np.ndarray, "... P"], goal: Float[np.ndarray, "... G"]
    ) -> Float[np.ndarray, "... A"]:
        """Returns the action in [-1, 1] of a scripted controller that is given the goal, float32."""


_GOAL_TASKS: dict[str, GoalTask] = {
    task.name: task for task in (PointMassDark(), ReacherDark(), PointMassMap(), ReacherMap())
}


def goal_task(name: str) -> GoalTask | None:
    """Returns the hidden-goal task called `name`, or None when that task hides no goal or does not exist."""
    return _GOAL_TASKS.get(name)


def goal_task_names() -> tuple[str, ...]:
    """Returns the names of the tasks that hide a goal."""
    return tuple(_GOAL_TASKS)


FOREIGN_RADII = 2.0
_TRIES = 1000


def foreign_goal(task: GoalTask, goal: Float[np.ndarray, " G"], rng: np.random.Generator) -> Float[np.ndarray, " G"]:
    """Returns another goal of the task, float64, drawn as the environment draws it but more than FOREIGN_RADII radii
    from `goal`, so that no state is rewarded for both. DataError when no goal is that far away."""
    for _ in range(_TRIES):
        other = task.sample_goal(rng)
        if np.linalg.norm(other - goal) > FOREIGN_RADII * task.radius:
            return other
    raise DataError(
        f"{task.name} has no goal more than {FOREIGN_RADII:g} radii ({FOREIGN_RADII * task.radius:g} m) from {goal}; "
        "without a foreign goal there is no foreign context: leave evaluate.foreign out"
    )
