"""TD3+BC (Fujimoto and Gu 2021, arXiv 2106.06860): TD3 with a behaviour cloning term.

    L(policy)   = - lambda mean min_i Q_i(s, pi(s) + e) + mean (pi(s) - a)^2
    lambda      = alpha / mean |min_i Q_i(s, pi(s) + e)|

The means are over the batch, and in the squared term also over the entries of an action. No gradient flows through
lambda. The rest is as in `agents.td3`, after ExoRL; the paper uses the first critic's value, without noise.
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
from jaxtyping import Array

from agents.actor_critic import NOW
from agents.td3 import TD3
from data import TransitionBatch


class TD3BC(TD3):
    """A deterministic policy that stays near the actions of the data. Settings: `agent.td3_bc`."""

    def policy_loss(self, trainable: SimpleNamespace, frozen: SimpleNamespace, batch: TransitionBatch) -> Array:
        mean = jnp.tanh(trainable.actor(batch.observation))
        value = frozen.critic(batch.observation, self.noisy(mean, batch, NOW)).min(axis=0)
        weight = self.settings.alpha / jnp.abs(jax.lax.stop_gradient(value)).mean()
        return jnp.square(mean - batch.action).mean() - weight * value.mean()
