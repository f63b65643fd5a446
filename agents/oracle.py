"""The oracle: a scripted controller that is given the hidden goal, an upper reference in plots."""

import numpy as np

from agents.checkpoint import versions
from agents.config import Config
from agents.goals import held_out_goals
from agents.identity import settings_id
from agents.results import ORACLE, Result
from data.environment_batch import EnvironmentBatch
from data.tasks import goal_task


def evaluate_oracle(config: Config) -> list[Result]:
    """Returns the results of the scripted controller that is given the goal, for the groups of a config. Tasks without
    a hidden goal have none."""
    results = []
    own = config.evaluate
    settings = {"evaluate.seed": own.seed, "evaluate.episode_steps": own.episode_steps}  # it depends on these only
    for task in config.data.tasks:
        hidden = goal_task(task)
        if hidden is None:
            continue
        environments = EnvironmentBatch(task, own.groups, episode_steps=own.episode_steps)
        goals = held_out_goals(task, own.seed, own.groups)
        environments.reset([(own.seed, group, 0) for group in range(own.groups)], goals)
        total = np.zeros(own.groups)
        for _ in range(environments.episode_steps):
            total += environments.step(hidden.oracle(environments.physics_states(), goals)).reward
        results += [
            Result(
                experiment=config.name,
                agent=ORACLE,
                task=task,
                seed=0,
                context_trajectories=0,
                context_tokens=0,
                mode="prompted",
                episode_index=0,
                return_=float(total[index]),
                steps=environments.episode_steps,
                checkpoint_step=0,
                versions=versions(),
                run=config.name,
                series=config.name,
                settings_id=settings_id(settings),
                settings=settings,
                evaluation_seed=own.seed,
                group=index,
                context="none",
            )
            for index in range(own.groups)
        ]
    return results
