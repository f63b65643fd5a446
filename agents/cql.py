"""CQL, conservative Q-learning (Kumar et al. 2020, arXiv 2006.04779): a critic that gives low values to actions outside
the data.

    y           = r + gamma d min_i Q'_i(s', a')                         a' ~ pi(s')
    gap         = mean sum_i (log sum_j exp Q_i(s, a_j) - Q_i(s, a))
    L(critic)   = mean sum_i (Q_i(s, a) - y)^2 + alpha gap
    L(policy)   = mean (k log pi(a~ | s) - min_i Q_i(s, a~))             a~ ~ pi(s)
    L(k)        = - mean log k (log pi(a~ | s) - A)                      A the size of an action

The a_j are the data's action, `samples` uniform actions, `samples` actions of pi(s) and as many of pi(s'); no gradient
flows through them. This is ExoRL's estimate, for which its alpha was chosen; the paper weighs each action by its
density. pi(s) is a normal distribution squashed by tanh. k is the entropy temperature, learnt such that the entropy
is -A (Haarnoja et al. 2018).
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from agents.actor_critic import (
    ANY,
    NEXT,
    NOW,
    ActorCritic,
    Critic,
    ObservationMLP,
    normal,
    repeated,
    temporal_difference,
    uniform,
)
from agents.agent import Metrics
from data import TransitionBatch

LOG_STD_RANGE = (-10.0, 2.0)


class Temperature(nnx.Module):
    """The learnt entropy temperature, as its logarithm."""

    def __init__(self):
        self.log = nnx.Param(jnp.zeros(()))


class CQL(ActorCritic):
    """Soft actor-critic with a critic that prefers the actions of the data. Settings: `agent.cql`."""

    def networks(self, rngs: nnx.Rngs) -> dict[str, nnx.Module]:
        model = self.config.model
        return {
            "actor": ObservationMLP(self.scales, 2 * self.action_size, model, rngs=rngs),
            "critic": Critic(self.scales, self.action_size, model, rngs=rngs),
            "temperature": Temperature(),
        }

    def losses(
        self, trainable: SimpleNamespace, frozen: SimpleNamespace, batch: TransitionBatch
    ) -> tuple[dict[str, Array], Metrics]:
        settings, size, count = self.settings, self.action_size, self.settings.samples
        noise = {use: normal(batch.key, use, (1 + count, size)) for use in (NOW, NEXT)}
        now, next_ = (
            drawn(frozen.actor(repeated(observation, 1 + count)), noise[use])[0]
            for use, observation in ((NOW, batch.observation), (NEXT, batch.next_observation))
        )
        value = frozen.target(batch.next_observation, next_[:, 0]).min(axis=0)
        target = batch.reward + settings.discount * batch.discount * value

        others = jnp.concatenate([uniform(batch.key, ANY, (count, size)), now[:, 1:], next_[:, 1:]], axis=1)
        of_data = trainable.critic(batch.observation, batch.action)
        of_others = trainable.critic(repeated(batch.observation, 3 * count), others)
        every = jnp.concatenate([of_others, of_data[..., None]], axis=-1)
        gap = (jax.nn.logsumexp(every, axis=-1) - of_data).sum(axis=0).mean()

        action, log_probability = drawn(trainable.actor(batch.observation), noise[NOW][:, 0])
        worth = frozen.critic(batch.observation, action).min(axis=0)
        surplus = jax.lax.stop_gradient(log_probability) - size
        losses = {
            "action": (jnp.exp(frozen.temperature.log[...]) * log_probability - worth).mean(),
            "critic": temporal_difference(of_data, target) + settings.alpha * gap,
            "temperature": -(trainable.temperature.log[...] * surplus).mean(),
        }
        return losses, {"value/target": target.mean(), "value/gap": gap, "action/entropy": -log_probability.mean()}

    def policy(self, actor: nnx.Module, observation: Array, key: Array | None) -> Array:
        raw = actor(observation)
        shape = (len(raw), self.action_size)
        return drawn(raw, jnp.zeros(shape) if key is None else jax.random.normal(key, shape))[0]


def drawn(raw: Float[Array, "*B 2A"], noise: Float[Array, "*B A"]) -> tuple[Float[Array, "*B A"], Float[Array, "*B"]]:
    """Returns the action tanh(x), x = mean + std * noise, and its log-probability log N(x) - sum log(1 - tanh(x)^2)."""
    mean, log_std = jnp.split(raw, 2, axis=-1)
    log_std = jnp.clip(log_std, *LOG_STD_RANGE)
    x = mean + jnp.exp(log_std) * noise
    of_normal = -0.5 * jnp.square(noise) - log_std - 0.5 * jnp.log(2 * jnp.pi)
    narrowing = 2.0 * (jnp.log(2.0) - x - jax.nn.softplus(-2.0 * x))
    return jnp.tanh(x), (of_normal - narrowing).sum(axis=-1)
