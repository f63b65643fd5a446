"""The hidden goals of evaluation: one for each group, and a foreign one for its control."""

import numpy as np

from data.tasks import foreign_goal, goal_task

_FOREIGN = 1  # separates these random draws from those of the groups' own goals


def held_out_goals(task: str, seed: int, groups: int) -> np.ndarray | None:
    """Returns the goals of evaluation [groups, G], drawn from the environment's distribution; None for tasks without a
    hidden goal.

    Training never uses them: its goals are places where trajectories ended.
    """
    hidden = goal_task(task)
    if hidden is None:
        return None
    return np.stack([hidden.sample_goal(np.random.default_rng((seed, group))) for group in range(groups)])


def foreign_goals(task: str, seed: int, goals: np.ndarray) -> np.ndarray:
    """Returns a foreign goal for each group, [groups, G], such that no state is rewarded for both the group's goal and
    the foreign one. A group's foreign goal does not depend on the number of groups."""
    hidden = goal_task(task)
    assert hidden is not None, task
    return np.stack(
        [foreign_goal(hidden, goal, np.random.default_rng((seed, group, _FOREIGN))) for group, goal in enumerate(goals)]
    )
