"""TD3 without exploration (Fujimoto et al. 2018, arXiv 1802.09477), as in ExoRL's table of offline algorithms.

    y           = r + gamma d min_i Q'_i(s', pi(s') + e')                e, e' ~ clip(N(0, noise^2), -c, c)
    L(critic)   = mean sum_i (Q_i(s, a) - y)^2                           i = 1, 2
    L(policy)   = - mean min_i Q_i(s, pi(s) + e)

Q' is the target network, c the setting `noise_clip`. As in ExoRL, the policy is updated in every step (paper: every
second one), by the smaller estimate (paper: the first) at an action with noise (paper: without). Nothing keeps the
policy near the data: on exploratory data this does no harm, on a few demonstrations the algorithm fails.
"""

from types import SimpleNamespace

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from agents.actor_critic import (
    NEXT,
    NOW,
    ActorCritic,
    Critic,
    ObservationMLP,
    clip_straight_through,
    normal,
    temporal_difference,
)
from agents.agent import Metrics
from data import TransitionBatch


class TD3(ActorCritic):
    """A deterministic policy that maximises the smaller of two critics. Settings: `agent.td3`."""

    def networks(self, rngs: nnx.Rngs) -> dict[str, nnx.Module]:
        model = self.config.model
        return {
            "actor": ObservationMLP(self.scales, self.action_size, model, rngs=rngs),
            "critic": Critic(self.scales, self.action_size, model, rngs=rngs),
        }

    def losses(
        self, trainable: SimpleNamespace, frozen: SimpleNamespace, batch: TransitionBatch
    ) -> tuple[dict[str, Array], Metrics]:
        next_action = self.noisy(jnp.tanh(frozen.actor(batch.next_observation)), batch, NEXT)
        value = frozen.target(batch.next_observation, next_action).min(axis=0)
        target = batch.reward + self.settings.discount * batch.discount * value
        loss = temporal_difference(trainable.critic(batch.observation, batch.action), target)
        return {"action": self.policy_loss(trainable, frozen, batch), "critic": loss}, {"value/target": target.mean()}

    def policy_loss(self, trainable: SimpleNamespace, frozen: SimpleNamespace, batch: TransitionBatch) -> Array:
        """Returns the loss of the policy."""
        mean = jnp.tanh(trainable.actor(batch.observation))
        return -frozen.critic(batch.observation, self.noisy(mean, batch, NOW)).min(axis=0).mean()

    def noisy(self, mean: Float[Array, "B A"], batch: TransitionBatch, use: int) -> Float[Array, "B A"]:
        """Returns `mean` with clipped noise for each transition. use: NOW or NEXT, which noise to draw."""
        settings = self.settings
        noise = settings.noise * normal(batch.key, use, (self.action_size,))
        return clip_straight_through(mean + jnp.clip(noise, -settings.noise_clip, settings.noise_clip))

    def policy(self, actor: nnx.Module, observation: Array, key: Array | None) -> Array:
        return jnp.tanh(actor(observation))  # noise is used in training only
