"""CRR, critic-regularized regression (Wang et al. 2020, arXiv 2006.15134): imitation weighted by advantage.

    A(s, a)     = Q(s, a) - 1/m sum_j Q(s, a_j)                          a_j ~ pi(s),  Q = min_i Q_i
    L(policy)   = - mean f(A(s, a)) log pi(a | s)
    f(A)        = 1 where A > 0, else 0                                  weight "indicator"
                  min(exp(A / temperature), 20)                          weight "exp"

pi(s) is a normal distribution with the standard deviation `noise`. The critic is trained as in `agents.td3`. Except for
the number of samples m, ExoRL and the paper agree.
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from agents.actor_critic import ANY, clip_straight_through, normal, repeated
from agents.td3 import TD3
from data import TransitionBatch

LARGEST_WEIGHT = 20.0


class CRR(TD3):
    """A Gaussian policy of fixed width that imitates actions weighted by their advantage. Settings: `agent.crr`."""

    def policy_loss(self, trainable: SimpleNamespace, frozen: SimpleNamespace, batch: TransitionBatch) -> Array:
        settings = self.settings
        mean = jnp.tanh(trainable.actor(batch.observation))
        samples = (settings.samples, self.action_size)
        noise = jnp.clip(settings.noise * normal(batch.key, ANY, samples), -settings.noise_clip, settings.noise_clip)
        tried = clip_straight_through(jax.lax.stop_gradient(mean)[:, None] + noise)
        value = frozen.critic(repeated(batch.observation, settings.samples), tried).min(axis=0).mean(axis=-1)
        advantage = frozen.critic(batch.observation, batch.action).min(axis=0) - value
        return -(self.weight(advantage) * self.log_probability(mean, batch.action)).mean()

    def weight(self, advantage: Float[Array, " B"]) -> Float[Array, " B"]:
        """Returns the imitation weight f(A) of each advantage."""
        if self.settings.weight == "indicator":
            return (advantage > 0).astype(advantage.dtype)
        return jnp.minimum(jnp.exp(advantage / self.settings.temperature), LARGEST_WEIGHT)

    def log_probability(self, mean: Float[Array, "B A"], action: Float[Array, "B A"]) -> Float[Array, " B"]:
        """Returns log pi(a | s)."""
        return jax.scipy.stats.norm.logpdf(action, mean, self.settings.noise).sum(axis=-1)

    def policy(self, actor: nnx.Module, observation: Array, key: Array | None) -> Array:
        mean = jnp.tanh(actor(observation))
        noise = 0.0 if key is None else self.settings.noise * jax.random.normal(key, mean.shape)
        return jnp.clip(mean + noise, -1.0, 1.0)
