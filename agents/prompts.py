"""Contexts of evaluation: drawn from held-out episodes, padded and ordered as an agent wants them."""

import numpy as np

from agents.agent import Agent
from agents.config import Config
from data import ChainBatch, ChainSampler, GoalSampling, TrajectoryStore
from data.tasks import goal_task

SHORTEST_PROMPT = 256  # timesteps; shorter ones are padded to it, so that small contexts share one compiled program


def held_out(config: Config, store: TrajectoryStore, met: float = 0.0) -> ChainSampler:
    """Returns what draws the contexts, each trajectory of which has met the goal with chance `met` (0: as in training
    where that is annealed, else as it happens)."""
    chance = "annealed" if not met and config.chain.met == "annealed" and goal_task(store.task) else met
    return ChainSampler(
        store,
        trajectories=1,
        sort=config.chain.sort,
        seed=config.seed,
        split="held_out",
        held_out=config.data.held_out,
        goals=GoalSampling(met=chance) if chance else None,
    )


def laid_out(agent: Agent, prompt: ChainBatch) -> ChainBatch:
    """Returns a prompt padded to a power of two, in the order that the agent's mesh wants."""
    timesteps = prompt.position.shape[1]
    length = max(SHORTEST_PROMPT, 1 << (timesteps - 1).bit_length())
    order = agent.order(length)
    order = np.arange(length) if order is None else order
    return prompt.take(np.where(order < timesteps, order, -1))


def context_tokens(agent: Agent, prompt: ChainBatch) -> int:
    """Returns the tokens of the longest context in the batch."""
    return int((prompt.segment >= 0).sum(axis=1).max(initial=0)) * agent.tokens_per_timestep
