"""Agentic Transformer: chains of whole trajectories, worst to best (Liu and Abbeel 2023, arXiv 2305.16554)."""

from agents.agent import Sampler
from agents.return_conditioned import ReturnConditionedAgent
from agents.samplers import chains
from data import TrajectoryStore


class AgenticTransformer(ReturnConditionedAgent):
    """Learns to go from the bad trajectories of its context to one better than all of them.

    Every trajectory of a chain asks for the chain's best return, RTG_t = R* - sum_{k<t} r_k (section 3 of the paper),
    so at test time asking for a high return after a context of failures is what training looked like.
    """

    def sampler(self, stores: list[TrajectoryStore]) -> Sampler:
        chain = self.config.chain
        return chains(self.config, stores, **chain.model_dump(exclude={"grow_until"}))
