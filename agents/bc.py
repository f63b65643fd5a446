"""BC-10%: behaviour cloning of the best tenth of the data with an MLP, a standard baseline."""

import itertools

import jax
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array

from agents.agent import Metrics, Params, Sampler, Scales, Timesteps, real
from agents.config import Config
from agents.gaussian import action_loss
from agents.mixture import action_head
from agents.optimizer import make_optimizer
from agents.samplers import chains
from agents.standardizer import Standardizer
from data import ChainBatch, TrajectoryStore


class Perceptron(nnx.Module):
    """An MLP from an observation to a distribution over actions."""

    def __init__(self, config: Config, scales: Scales, action_size: int, *, rngs: nnx.Rngs):
        self.standardized = Standardizer.of(scales)
        sizes = [self.standardized.size] + [config.model.width] * config.model.layers
        self.layers = nnx.List([nnx.Linear(i, o, rngs=rngs) for i, o in itertools.pairwise(sizes)])
        self.head = action_head(config.model.width, action_size, config.agent.mixture, rngs=rngs)

    def __call__(self, observation: Array):
        x = self.standardized(observation)
        for layer in self.layers:
            x = jax.nn.gelu(layer(x))
        return self.head(x)


class BehaviourCloning:
    """Imitates the trajectories of highest return, which make up `agent.top_fraction` of the timesteps (the "%BC" of
    Chen et al. 2021). It has no memory, and acts on the current observation alone.
    """

    context = False
    tokens_per_timestep = 1
    longest_episode = None

    def __init__(self, config: Config, scales: Scales, action_size: int, episode_steps: int, mesh: Mesh | None):
        self.config = config

        def network(key: Array) -> Perceptron:
            return Perceptron(config, scales, action_size, rngs=nnx.Rngs(key))

        self._network = network
        self.graph = nnx.split(nnx.eval_shape(network, jax.random.key(0)))[0]

    def sampler(self, stores: list[TrajectoryStore]) -> Sampler:
        best = self.config.agent.top_fraction
        return chains(self.config, stores, trajectories=1, sort="time", target="own", best=best)

    def timestep_order(self, timesteps: int) -> None:
        return None

    def init(self, key: Array) -> Params:
        return jax.jit(lambda key: nnx.split(self._network(key))[1])(key)

    def optimizer(self) -> optax.GradientTransformation:
        return make_optimizer(self.config)

    def loss(self, params: Params, batch: ChainBatch, whole: ChainBatch | None = None) -> tuple[Array, Metrics]:
        policy = nnx.merge(self.graph, params)(batch.observation)
        return action_loss(policy, batch.action, real(batch), real(whole or batch))

    def start(self, params: Params, prompt: ChainBatch, steps: int) -> None:
        return None

    def act(self, params: Params, memory: None, now: Timesteps, key: Array | None) -> tuple[Array, None]:
        return nnx.merge(self.graph, params)(now.observation).act(key), None
