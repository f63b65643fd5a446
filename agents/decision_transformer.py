"""Decision Transformer: one trajectory, each step told the return that follows (Chen et al. 2021, arXiv 2106.01345)."""

from agents.agent import Sampler
from agents.return_conditioned import ReturnConditionedAgent
from agents.samplers import chains
from data import TrajectoryStore


class DecisionTransformer(ReturnConditionedAgent):
    """Sees the last `agent.window` steps of the episode it is in, and no other trajectory."""

    context = False

    def sampler(self, stores: list[TrajectoryStore]) -> Sampler:
        return chains(self.config, stores, trajectories=1, sort="time", target="own")
