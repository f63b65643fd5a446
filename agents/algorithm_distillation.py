"""Algorithm Distillation: predicts what a learner does next (Laskin et al. 2022, arXiv 2210.14215).

A chain is the history of a learner, trajectory after trajectory in the order of time, each better than the last. A
causal Transformer predicts each action from all that came before, and is told no return:

    loss = - sum_t log p(a_t | s_<=t, a_<t, r_<t) / (A T)         over all T timesteps of the batch

At test time it goes on with its own history: whoever predicts a learner that improves, improves.

Settings: chain.sort is "time": of a store that holds the episodes of one training in their order, random ones in that
order. Where the task hides a goal chain.met is "annealed": ever more trajectories come to rest there (Zisman et al.
2023, arXiv 2312.12275). agent.window and agent.tokens as everywhere; chain.target and agent.loss_on are not used.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from agents.agent import Timesteps, real
from agents.agentic_transformer import AgenticTransformer
from data import ChainBatch


class AlgorithmDistillation(AgenticTransformer):
    """Reads chains as the Agentic Transformer does, but for the return asked for, and learns every action alike."""

    def known(self, timesteps: Timesteps) -> Timesteps:
        return timesteps._replace(return_to_go=jnp.zeros_like(timesteps.return_to_go))

    def weight(self, batch: ChainBatch) -> Float[Array, "B M"]:
        return real(batch)
