"""The hidden goals of evaluation: each group's own, and a foreign one for its control."""

import numpy as np

from data.tasks import foreign_goal, goal_task

_FOREIGN = 1  # keeps these draws apart from the own goals'


def held_out_goals(task: str, seed: int, groups: int) -> np.ndarray | None:
    """Returns the goals of evaluation, drawn as the environment draws them; None for tasks that hide none.

    Training never sees them: its goals are where trajectories happened to end.
    """
    hidden = goal_task(task)
    if hidden is None:
        return None
    return np.stack([hidden.sample_goal(np.random.default_rng((seed, group))) for group in range(groups)])


def foreign_goals(task: str, seed: int, goals: np.ndarray) -> np.ndarray:
    """Returns for the goal of each group another that no state meets together with it: what is learnt of the one is
    never about the other. However many groups there are, each has its own."""
    hidden = goal_task(task)
    assert hidden is not None, task
    return np.stack(
        [foreign_goal(hidden, goal, np.random.default_rng((seed, group, _FOREIGN))) for group, goal in enumerate(goals)]
    )
