"""All agents, by their `agent.kind` in configs."""

from jax.sharding import Mesh

from agents.agent import Agent, Scales
from agents.agentic_transformer import AgenticTransformer
from agents.algorithm_distillation import AlgorithmDistillation
from agents.bc import BehaviourCloning
from agents.config import Config
from agents.cql import CQL
from agents.crr import CRR
from agents.decision_transformer import DecisionTransformer
from agents.iql import IQL
from agents.recurrent import RecurrentAgent
from agents.td3 import TD3
from agents.td3_bc import TD3BC

AGENTS = {
    "agentic_transformer": AgenticTransformer,
    "algorithm_distillation": AlgorithmDistillation,
    "decision_transformer": DecisionTransformer,
    "recurrent": RecurrentAgent,
    "bc": BehaviourCloning,
    "td3": TD3,
    "td3_bc": TD3BC,
    "crr": CRR,
    "cql": CQL,
    "iql": IQL,
}


def make_agent(config: Config, scales: Scales, action_size: int, episode_steps: int, mesh: Mesh | None) -> Agent:
    """Returns the agent of kind `agent.kind`."""
    return AGENTS[config.agent.kind](config, scales, action_size, episode_steps, mesh)
