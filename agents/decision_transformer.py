"""Decision Transformer: one trajectory, conditioned on the return to go (Chen et al. 2021, arXiv 2106.01345).

    RTG_t = sum_{k>=t} r_k
    loss  = - sum_t log p(a_t | RTG_<=t, s_<=t, a_<t) / (A T)           over the T timesteps of the batch

A is the size of an action. The paper predicts the action itself, with a squared error: that is the loss of a Gaussian
of fixed width, and its mean is the prediction.

Settings: agent.window is the paper's context length K, in timesteps; agent.tokens defines the tokens. [chain] is not
used.
"""

from jaxtyping import Array

from agents.agent import Metrics, Params, Sampler, real
from agents.gaussian import action_loss
from agents.return_conditioned import ReturnConditionedAgent
from agents.samplers import chains
from data import ChainBatch, TrajectoryStore


class DecisionTransformer(ReturnConditionedAgent):
    """Predicts actions from the last `agent.window` steps of the current episode, and no other trajectory."""

    context = False

    def sampler(self, stores: list[TrajectoryStore]) -> Sampler:
        return chains(self.config, stores, trajectories=1, sort="time", target="own")

    def loss(self, params: Params, batch: ChainBatch, whole: ChainBatch | None = None) -> tuple[Array, Metrics]:
        whole = batch if whole is None else whole
        loss, metrics = action_loss(self.features(params, batch), batch.action, real(batch), real(whole))
        return loss, metrics | {"loss/last_trajectory": loss}  # the chain has one trajectory only
