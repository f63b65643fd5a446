"""IQL, implicit Q-learning (Kostrikov et al. 2021, arXiv 2110.06169): the critic evaluates only actions of the data.

    L(value)    = mean |tau - [u < 0]| u^2                               u = min_i Q'_i(s, a) - V(s)
    L(critic)   = mean sum_i (Q_i(s, a) - r - gamma d V(s'))^2
    L(policy)   = - mean min(exp(beta u), 100) log pi(a | s)

tau is the setting `expectile`, beta the setting `temperature`. pi(s) is a normal distribution with a mean in (-1, 1)
and a learnt standard deviation that does not depend on s. ExoRL does not include IQL: the settings are the paper's, the
networks those of the other agents.
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from agents.actor_critic import ActorCritic, Critic, ObservationMLP, temporal_difference
from agents.agent import Metrics, Scales
from agents.gaussian import Gaussian
from agents.model_config import ModelConfig
from data import TransitionBatch

LARGEST_WEIGHT = 100.0
LOG_STD_RANGE = (-5.0, 2.0)


class Actor(nnx.Module):
    """A Gaussian over actions, with a standard deviation that is a parameter of its own."""

    def __init__(self, scales: Scales, action_size: int, model: ModelConfig, *, rngs: nnx.Rngs):
        self.mean = ObservationMLP(scales, action_size, model, rngs=rngs)
        self.log_std = nnx.Param(jnp.zeros(action_size))

    def __call__(self, observation: Float[Array, "*B O"]) -> Gaussian:
        mean = jnp.tanh(self.mean(observation))
        return Gaussian(mean, jnp.broadcast_to(jnp.clip(self.log_std[...], *LOG_STD_RANGE), mean.shape))


class IQL(ActorCritic):
    """Imitates the better actions of the data, and evaluates no actions outside the data. Settings: `agent.iql`."""

    def networks(self, rngs: nnx.Rngs) -> dict[str, nnx.Module]:
        model = self.config.model
        return {
            "actor": Actor(self.scales, self.action_size, model, rngs=rngs),
            "critic": Critic(self.scales, self.action_size, model, rngs=rngs),
            "value": ObservationMLP(self.scales, 1, model, rngs=rngs),
        }

    def losses(
        self, trainable: SimpleNamespace, frozen: SimpleNamespace, batch: TransitionBatch
    ) -> tuple[dict[str, Array], Metrics]:
        settings = self.settings
        value = frozen.target(batch.observation, batch.action).min(axis=0)
        advantage = value - trainable.value(batch.observation)[:, 0]
        weight = jnp.where(advantage < 0, 1.0 - settings.expectile, settings.expectile)
        target = batch.reward + settings.discount * batch.discount * frozen.value(batch.next_observation)[:, 0]
        preferred = jnp.minimum(jnp.exp(settings.temperature * jax.lax.stop_gradient(advantage)), LARGEST_WEIGHT)
        losses = {
            "action": -(preferred * trainable.actor(batch.observation).log_probability(batch.action)).mean(),
            "critic": temporal_difference(trainable.critic(batch.observation, batch.action), target),
            "value": (weight * jnp.square(advantage)).mean(),
        }
        return losses, {"value/target": target.mean()}

    def policy(self, actor: nnx.Module, observation: Array, key: Array | None) -> Array:
        return actor(observation).act(key)
