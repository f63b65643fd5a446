"""Decision Transformer: one trajectory, each step told the return that follows (Chen et al. 2021, arXiv 2106.01345).

    RTG_t = sum_{k>=t} r_k
    loss  = - sum_t log p(a_t | RTG_<=t, s_<=t, a_<t) / (A T)           over the T timesteps of the batch

The mean of p is the paper's prediction, whose squared error is the loss of a Gaussian of fixed width.

Settings: agent.window is the paper's K, steps that a token sees; agent.tokens what a token is. [chain] is not used.
"""

from jaxtyping import Array

from agents.agent import Metrics, Params, Sampler, real
from agents.gaussian import action_loss
from agents.return_conditioned import ReturnConditionedAgent
from agents.samplers import chains
from data import ChainBatch, TrajectoryStore


class DecisionTransformer(ReturnConditionedAgent):
    """Sees the last `agent.window` steps of the episode it is in, and no other trajectory."""

    context = False

    def sampler(self, stores: list[TrajectoryStore]) -> Sampler:
        return chains(self.config, stores, trajectories=1, sort="time", target="own")

    def loss(self, params: Params, batch: ChainBatch, whole: ChainBatch | None = None) -> tuple[Array, Metrics]:
        whole = batch if whole is None else whole
        loss, metrics = action_loss(self.features(params, batch), batch.action, real(batch), real(whole))
        return loss, metrics | {"loss/last_trajectory": loss}  # there is no other one
