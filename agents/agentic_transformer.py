"""Agentic Transformer: chains of whole trajectories, worst to best (Liu and Abbeel 2023, arXiv 2305.16554).

A chain holds N trajectories of one task, sorted by return. All of them ask for the return R* of the best one (section 3
of the paper), and a causal Transformer predicts each action from all that came before it in the chain:

    RTG_t = R* - sum_{k<t} r_k                                          within each trajectory
    loss  = - sum_t w_t log p(a_t | RTG_<=t, s_<=t, a_<t, r_<t) / (A sum_t w_t)         over all timesteps of the batch

At test time, asking for a high return after a context of failures is then what training looked like.

Settings: [chain] says what a chain is; agent.loss_on and agent.loss_elsewhere the weights w; agent.tokens and
agent.window what a token is and how far it sees. The paper's completion flag is no input here.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from agents.agent import Metrics, Params, Sampler, real
from agents.gaussian import action_loss
from agents.return_conditioned import ReturnConditionedAgent
from agents.samplers import chains
from data import ChainBatch, TrajectoryStore


class AgenticTransformer(ReturnConditionedAgent):
    """Learns to go from the bad trajectories of its context to one better than all of them."""

    def sampler(self, stores: list[TrajectoryStore]) -> Sampler:
        chain = self.config.chain
        return chains(self.config, stores, **chain.model_dump(exclude={"grow_until"}))

    def loss(self, params: Params, batch: ChainBatch, whole: ChainBatch | None = None) -> tuple[Array, Metrics]:
        whole = batch if whole is None else whole
        policy = self.features(params, batch)
        loss, metrics = action_loss(policy, batch.action, self.weight(batch), self.weight(whole))
        # The last trajectory alone shows whether the context helps: many actions before it cannot be predicted.
        of_last, _ = action_loss(policy, batch.action, batch.last, whole.last)
        return loss, metrics | {"loss/last_trajectory": of_last}

    def weight(self, batch: ChainBatch) -> Float[Array, "B M"]:
        """Returns how much each action counts."""
        every = real(batch)
        last = jnp.maximum(batch.last, self.config.agent.loss_elsewhere * every)
        return {"last": last, "all": every, "all+last": every + batch.last}[self.config.agent.loss_on]
