"""Contexts of evaluation: drawn from held-out episodes, then padded and ordered for the agent's mesh."""

import numpy as np

from agents.agent import Agent
from agents.config import Config
from data import ChainBatch, ChainSampler, GoalSampling, TrajectoryStore
from data.tasks import goal_task

SHORTEST_PROMPT = 256  # timesteps; shorter contexts are padded to it, so that they share one compiled program


def held_out(config: Config, store: TrajectoryStore, met: float = 0.0) -> ChainSampler:
    """Returns the sampler of contexts. Each trajectory of a context has reached the goal with probability `met`. With
    `met` 0, contexts are annealed if `chain.met` is "annealed", and random otherwise."""
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


def pad_and_order(agent: Agent, prompt: ChainBatch) -> ChainBatch:
    """Returns a prompt padded to a power of two timesteps, at least SHORTEST_PROMPT, in the agent's order."""
    timesteps = prompt.position.shape[1]
    length = max(SHORTEST_PROMPT, 1 << (timesteps - 1).bit_length())
    order = agent.timestep_order(length)
    order = np.arange(length) if order is None else order
    return prompt.take(np.where(order < timesteps, order, -1))


def context_tokens(agent: Agent, prompt: ChainBatch) -> int:
    """Returns the number of tokens of the longest context in the batch."""
    return int((prompt.segment >= 0).sum(axis=1).max(initial=0)) * agent.tokens_per_timestep
