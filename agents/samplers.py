"""The samplers of training batches: chains or transitions, from one store or from several tasks in turn."""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from agents.agent import Batch, Sampler
from agents.config import Config
from data import ChainSampler, GoalSampling, Growth, TrajectoryStore, TransitionSampler, WorldSampler
from data.tasks import goal_task


class MixedSampler:
    """Batches of several tasks: row `r` of step `s` is of task `(s + r) mod tasks`, on any number of processes."""

    def __init__(self, samplers: Sequence[ChainSampler | WorldSampler | TransitionSampler]):
        self.samplers = list(samplers)
        self.timesteps = max(sampler.timesteps for sampler in samplers)

    def sample(self, step: int, rows: Sequence[int] | np.ndarray, places: np.ndarray | None = None) -> Batch:
        rows, places = np.asarray(rows), np.arange(self.timesteps) if places is None else places
        owner = (step + rows) % len(self.samplers)
        parts, order = [], []
        for index, sampler in enumerate(self.samplers):
            picked = np.flatnonzero(owner == index)
            if picked.size:
                parts.append(sampler.sample(step, rows[picked], places))
                order.append(picked)
        order = np.argsort(np.concatenate(order))
        return type(parts[0])(*(np.concatenate(fields)[order] for fields in zip(*parts, strict=True)))

    def typical_targets(self) -> dict[str, float]:
        """Returns the typical return that trajectories ask for, by task."""
        return {task: target for sampler in self.samplers for task, target in sampler.typical_targets().items()}


def chains(
    config: Config,
    stores: Sequence[TrajectoryStore],
    *,
    grow: Sequence[int] = (),
    met: float | Literal["annealed"] | None = None,
    **chain,
) -> Sampler:
    """Returns the sampler of a config's training chains. In map tasks, they are visits to the places of a world."""
    goals = None if met is None else GoalSampling(met=met)
    growth = Growth(tuple(grow), round(config.chain.grow_until * config.train.updates))
    samplers = []
    for store in stores:
        common = {"seed": config.seed, "split": "train", "held_out": config.data.held_out, "growth": growth}
        task = goal_task(store.task)
        if task is not None and task.sign_size:
            of_map = {name: chain[name] for name in ("trajectories", "best") if name in chain}
            samplers.append(WorldSampler(store, **common, **of_map))
        else:
            samplers.append(ChainSampler(store, **common, goals=goals, **chain))
    return samplers[0] if len(samplers) == 1 else MixedSampler(samplers)


def transitions(config: Config, stores: Sequence[TrajectoryStore]) -> Sampler:
    """Returns the sampler of a config's training transitions."""
    held_out = config.data.held_out
    samplers = [TransitionSampler(store, seed=config.seed, split="train", held_out=held_out) for store in stores]
    return samplers[0] if len(samplers) == 1 else MixedSampler(samplers)
