"""Agentic Transformer: chains of whole trajectories, worst to best (Liu and Abbeel 2023, arXiv 2305.16554).

A chain holds N trajectories of one task, sorted by return. All of them ask for the return R* of the best one (section 3
of the paper). A causal Transformer predicts each action from everything before it in the chain:

    RTG_t = R* - sum_{k<t} r_k                                          within each trajectory
    loss  = - sum_t w_t log p(a_t | RTG_<=t, s_<=t, a_<t, r_<t) / (A sum_t w_t)         over all timesteps of the batch

A is the size of an action. At test time, the agent is asked for a high return after a context of worse trajectories,
as in training.

Settings: [chain] defines the chains; agent.loss_on and agent.loss_elsewhere the weights w; agent.tokens and
agent.window the tokens and the attention window. The paper's completion flag is not an input here.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from agents.agent import Metrics, Params, Sampler, real
from agents.gaussian import action_loss
from agents.return_conditioned import ReturnConditionedAgent
from agents.samplers import chains
from data import ChainBatch, TrajectoryStore


class AgenticTransformer(ReturnConditionedAgent):
    """Predicts actions from a chain of trajectories that improve, each conditioned on the best one's return."""

    def sampler(self, stores: list[TrajectoryStore]) -> Sampler:
        chain = self.config.chain
        return chains(self.config, stores, **chain.model_dump(exclude={"grow_until"}))

    def loss(self, params: Params, batch: ChainBatch, whole: ChainBatch | None = None) -> tuple[Array, Metrics]:
        whole = batch if whole is None else whole
        policy = self.features(params, batch)
        loss, metrics = action_loss(policy, batch.action, self.weight(batch), self.weight(whole))
        # Only the last trajectory shows whether the context helps: many actions before it are unpredictable.
        of_last, _ = action_loss(policy, batch.action, batch.last, whole.last)
        return loss, metrics | {"loss/last_trajectory": of_last}

    def weight(self, batch: ChainBatch) -> Float[Array, "B M"]:
        """Returns the loss weight of each action."""
        every = real(batch)
        last = jnp.maximum(batch.last, self.config.agent.loss_elsewhere * every)
        return {"last": last, "all": every, "all+last": every + batch.last}[self.config.agent.loss_on]
