"""Algorithm Distillation: predicts the next action of a learner (Laskin et al. 2022, arXiv 2210.14215).

A chain is the learning history of an agent: its trajectories in the order of time, which improve. A causal Transformer
predicts each action from everything before it, without returns to go:

    loss = - sum_t log p(a_t | s_<=t, a_<t, r_<t) / (A T)         over all T timesteps of the batch

A is the size of an action. At test time the agent continues its own history, and improves as the learners did.

Settings: chain.sort is "time": random episodes of a store, which holds a learner's episodes in their order, are chained
in that order. Where the task hides a goal, chain.met is "annealed": more and more trajectories of a chain come to rest
at the goal (Zisman et al. 2023, arXiv 2312.12275). agent.window and agent.tokens have their usual meaning; chain.target
and agent.loss_on are not used.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from agents.agent import Timesteps, real
from agents.agentic_transformer import AgenticTransformer
from data import ChainBatch


class AlgorithmDistillation(AgenticTransformer):
    """An Agentic Transformer without returns to go, whose loss weighs all actions equally."""

    def visible_inputs(self, timesteps: Timesteps) -> Timesteps:
        return timesteps._replace(return_to_go=jnp.zeros_like(timesteps.return_to_go))

    def weight(self, batch: ChainBatch) -> Float[Array, "B M"]:
        return real(batch)
