"""Computes the rewards of stored physics states, for any task of the same body.

This is ExoRL's idea (Yarats et al. 2022): data collected without rewards serves every task. ExoRL's own code computes
rewards with control 0, although the actions are in the file. So the rewards of all tasks with a control cost come out
too high (by up to a quarter in `cartpole-swingup` and `point_mass-easy`). With `control="actual"` rewards equal those
of the environment to 1e-6; `control="exorl"` is for comparisons with published numbers.
"""

from argparse import ArgumentParser
from collections.abc import Mapping
from functools import lru_cache
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float, Float32

from data.actions import clipped_actions
from data.dmc import Environment, make
from data.errors import DataError
from data.tasks import goal_task
from data.tasks.catalogue import check_task
from data.trajectory import Trajectory

Control = Literal["actual", "exorl"]

_DOG = "it pays for the forces under the paws, which follow from the step before and are not in the physics state"
# Tasks whose reward is not a function of state, control and extras. A test checks all other tasks to 1e-6.
_REFUSED: dict[str, str] = {f"dog-{task}": _DOG for task in ("fetch", "run", "stand", "trot", "walk")}


def add_control_argument(parser: ArgumentParser) -> None:
    """Adds --control, the `Control` of relabelled rewards."""
    parser.add_argument(
        "--control",
        choices=get_args(Control),
        default="actual",
        help="action in the control costs: the stored one (actual, the default), or 0 as in ExoRL's code (exorl)",
    )


def why_refused(task: str) -> str | None:
    """Returns the reason why a task's rewards cannot be computed from stored episodes; None if they can."""
    return _REFUSED.get(task)


def relabel(
    task: str,
    trajectory: Trajectory,
    *,
    control: Control = "actual",
    goal: Float[np.ndarray, " G"] | None = None,
) -> Float32[np.ndarray, " M"]:
    """Returns the reward of `task` for every step of the trajectory.

    Values that the task draws per episode (a hidden goal, a target) come from the trajectory's extras, or from `goal`.
    DataError when the trajectory has no physics states or those of another body, when a drawn value is unknown, and for
    the tasks of `why_refused`.
    """
    check_task(task)
    if control not in ("actual", "exorl"):
        raise DataError(f"control {control!r} is unknown; use 'actual' (as paid) or 'exorl' (as if the control were 0)")
    if why_refused(task):
        raise DataError(f"{task} cannot be relabelled: {why_refused(task)}")
    environment = _environment(task)
    check_body(environment, trajectory)
    extras = drawn_for(task, environment, trajectory, goal)
    hidden = goal_task(task)
    if hidden is not None:
        return hidden.reward(trajectory.physics[1:], extras["goal"])
    environment.set_extras(extras)
    taken = clipped_actions(trajectory.action, trajectory.source) if control == "actual" else None
    return environment.rewards_at(trajectory.physics[1:], taken).astype(np.float32)


def check_body(environment: Environment, trajectory: Trajectory) -> None:
    """Raises DataError when an episode has no physics states, or its sizes are not those of the environment's body."""
    if trajectory.physics is None:
        raise DataError(
            f"{trajectory.source}: no physics states, and nothing can be computed for {environment.task_name} without. "
            "ExoRL's files and those of data.collect hold them; URLB's do not"
        )
    actions, size = trajectory.action.shape[1], environment.action_space.shape[0]
    states, state_size = trajectory.physics.shape[1], environment.physics_state().size
    if (actions, states) != (size, state_size):
        raise DataError(
            f"{trajectory.source}: not an episode of {environment.task_name}'s body, which has {size} actions and "
            f"{state_size} numbers of physics state; got {actions} and {states}"
        )


@lru_cache(maxsize=4)
def _environment(task: str) -> Environment:
    return make(task)


def drawn_for(
    task: str, environment: Environment, trajectory: Trajectory, goal: Float[np.ndarray, " G"] | None = None
) -> Mapping[str, np.ndarray]:
    """Returns by name the values that the task draws per episode, from `goal` or else from the trajectory's extras;
    DataError when the extras lack them."""
    drawn = {}
    for key, present in environment.extras().items():
        if goal is not None:
            value = np.asarray(goal, np.float64)
        elif key in trajectory.extras:
            rows = trajectory.extras[key]
            if not np.array_equal(rows, np.broadcast_to(rows[:1], rows.shape)):
                raise DataError(
                    f"{trajectory.source}: extras {key!r} changes within the episode; {task} draws one a time"
                )
            value = rows[0]
        else:
            raise DataError(
                f"{trajectory.source}: {task} draws a {key} for every episode, and this one did not keep its own. "
                f"Collect it with data.collect, which does, or give the {key} through goal="
            )
        if value.shape != present.shape or not np.isfinite(value).all():
            raise DataError(f"{trajectory.source}: the {key} of {task} is {present.size} finite numbers; got {value!r}")
        drawn[key] = value
    if goal is not None and not drawn:
        raise DataError(f"{task} draws nothing for an episode, so relabel() cannot be given a goal for it")
    return drawn
