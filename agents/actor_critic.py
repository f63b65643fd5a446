"""The base class of the actor-critic agents: networks, random numbers of losses, the update, and acting.

An update takes one step of all networks at once. Each network is updated with the others held fixed, by a separate
optimizer (`agents.optimizer`). Then the weights w' of the target network move towards the weights w of the critic:

    w' <- w' + rate (w - w')

Networks and settings are ExoRL's (Yarats et al. 2022, arXiv 2201.13425), so that these agents differ only in their
losses. They learn from transitions (s, a, r, d, s'). d is 0 only at true terminations. A time limit is not a
termination: the value of the next state still counts there.
"""

from collections.abc import Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, UInt32

from agents.agent import Metrics, Params, Sampler, Scales, Timesteps
from agents.config import Config
from agents.model_config import ModelConfig
from agents.optimizer import make_optimizer, with_target
from agents.samplers import transitions
from agents.standardizer import Standardizer
from data import ChainBatch, TrajectoryStore, TransitionBatch

NOW, NEXT, ANY = range(3)  # the use of a random draw: the action at s, the action at s', other actions
EDGE = 1.0 - 1e-6


class MLP(nnx.Module):
    """An MLP: linear, layer norm, tanh; then `model.layers` - 1 times linear, ReLU; then linear. Orthogonal weights."""

    def __init__(self, inputs: int, outputs: int, model: ModelConfig, *, rngs: nnx.Rngs):
        linear = partial(nnx.Linear, kernel_init=nnx.initializers.orthogonal(), rngs=rngs)
        self.first = linear(inputs, model.width)
        self.norm = nnx.LayerNorm(model.width, epsilon=1e-5, rngs=rngs)
        self.hidden = nnx.List([linear(model.width, model.width) for _ in range(model.layers - 1)])
        self.last = linear(model.width, outputs)

    def __call__(self, x: Float[Array, "*B I"]) -> Float[Array, "*B U"]:
        x = jnp.tanh(self.norm(self.first(x)))
        for layer in self.hidden:
            x = jax.nn.relu(layer(x))
        return self.last(x)


class ObservationMLP(nnx.Module):
    """An MLP (`MLP`) on standardised observations."""

    def __init__(self, scales: Scales, outputs: int, model: ModelConfig, *, rngs: nnx.Rngs):
        self.standardized = Standardizer.of(scales)
        self.layers = MLP(self.standardized.size, outputs, model, rngs=rngs)

    def __call__(self, observation: Float[Array, "*B O"]) -> Float[Array, "*B U"]:
        return self.layers(self.standardized(observation))


class Critic(nnx.Module):
    """Two estimates Q_1, Q_2 of the value of an action. Their minimum limits overestimation (Fujimoto et al. 2018)."""

    def __init__(self, scales: Scales, action_size: int, model: ModelConfig, *, rngs: nnx.Rngs):
        self.standardized = Standardizer.of(scales)
        size = self.standardized.size + action_size
        self.pair = nnx.List([MLP(size, 1, model, rngs=rngs) for _ in range(2)])

    def __call__(self, observation: Float[Array, "*B O"], action: Float[Array, "*B A"]) -> Float[Array, "2 *B"]:
        x = jnp.concatenate([self.standardized(observation), action], axis=-1)
        return jnp.stack([one(x)[..., 0] for one in self.pair])


class ActorCritic:
    """An agent whose policy learns from a critic. Subclasses define the networks and the losses.

    It has no memory, and acts on the current observation alone.
    """

    context = False
    tokens_per_timestep = 1
    longest_episode = None

    def __init__(self, config: Config, scales: Scales, action_size: int, episode_steps: int, mesh: Mesh | None):
        self.config, self.scales, self.action_size = config, scales, action_size
        self.settings: Any = config.agent.value_settings
        abstract = nnx.eval_shape(lambda key: self.networks(nnx.Rngs(key)), jax.random.key(0))
        self.graphs = {name: nnx.split(network)[0] for name, network in abstract.items()}

    def networks(self, rngs: nnx.Rngs) -> dict[str, nnx.Module]:
        """Returns the trained networks by name, with newly initialised weights; "actor" and "critic" are required."""
        raise NotImplementedError

    def losses(
        self, trainable: SimpleNamespace, frozen: SimpleNamespace, batch: TransitionBatch
    ) -> tuple[dict[str, Array], Metrics]:
        """Returns the losses of a batch [B] by name, the policy's loss as "action", and further metrics.

        trainable, frozen: the networks by name, and the critic's target network as `target`. Gradients flow through
        `trainable` only.
        """
        raise NotImplementedError

    def policy(self, actor: nnx.Module, observation: Float[Array, "B O"], key: Array | None) -> Float[Array, "B A"]:
        """Returns actions in [-1, 1]: sampled with `key`, or the policy's mean without."""
        raise NotImplementedError

    def optimizer(self) -> optax.GradientTransformation:
        optimizers = {name: make_optimizer(self.config) for name in self.graphs}
        return with_target(optimizers, self.settings.target_rate)

    def sampler(self, stores: list[TrajectoryStore]) -> Sampler:
        return transitions(self.config, stores)

    def timestep_order(self, timesteps: int) -> None:
        return None

    def init(self, key: Array) -> Params:
        def initial(key: Array) -> Params:
            weights = {name: nnx.split(network)[1] for name, network in self.networks(nnx.Rngs(key)).items()}
            return weights | {"target": weights["critic"]}

        return jax.jit(initial)(key)

    def loss(self, params: Params, batch: TransitionBatch, whole: None = None) -> tuple[Array, Metrics]:
        batch = TransitionBatch(*(x.reshape(-1, *x.shape[2:]) for x in batch))
        losses, metrics = self.losses(self._merged(params), self._merged(jax.lax.stop_gradient(params)), batch)
        return sum(losses.values()), {f"loss/{name}": loss for name, loss in losses.items()} | metrics

    def start(self, params: Params, prompt: ChainBatch, steps: int) -> None:
        return None

    def act(self, params: Params, memory: None, now: Timesteps, key: Array | None) -> tuple[Array, None]:
        return self.policy(nnx.merge(self.graphs["actor"], params["actor"]), now.observation, key), None

    def _merged(self, params: Mapping[str, nnx.State]) -> SimpleNamespace:
        graphs = self.graphs | {"target": self.graphs["critic"]}
        return SimpleNamespace(**{name: nnx.merge(graph, params[name]) for name, graph in graphs.items()})


def temporal_difference(value: Float[Array, "2 B"], target: Float[Array, " B"]) -> Float[Array, ""]:
    """Returns the mean squared error of `value` to `target`, summed over both estimates."""
    return jnp.square(value - target[None]).sum(axis=0).mean()


def repeated(observation: Float[Array, "B O"], samples: int) -> Float[Array, "B samples O"]:
    """Returns each observation repeated `samples` times."""
    return jnp.broadcast_to(observation[:, None], (len(observation), samples, observation.shape[-1]))


def normal(key: UInt32[Array, "B 2"], use: int, shape: tuple[int, ...]) -> Float[Array, "B *shape"]:
    """Returns standard normal numbers. They depend on each transition's key and `use` alone, on any mesh."""
    return _drawn(jax.random.normal, key, use, shape)


def uniform(key: UInt32[Array, "B 2"], use: int, shape: tuple[int, ...]) -> Float[Array, "B *shape"]:
    """Returns numbers uniform in [-1, 1), which depend on the same as those of `normal`."""
    return _drawn(partial(jax.random.uniform, minval=-1.0, maxval=1.0), key, use, shape)


def _drawn(draw: Any, key: Array, use: int, shape: tuple[int, ...]) -> Array:
    def one(bits: Array) -> Array:
        return draw(jax.random.fold_in(jax.random.wrap_key_data(bits, impl="threefry2x32"), use), shape)

    return jax.vmap(one)(key)


def clip_straight_through(action: Float[Array, "*B A"]) -> Float[Array, "*B A"]:
    """Returns actions clipped into (-1, 1), with the gradient of the identity, as in ExoRL."""
    return action + jax.lax.stop_gradient(jnp.clip(action, -EDGE, EDGE) - action)
