"""The learner of every collector: DDPG with two critics, as in URLB (Lillicrap et al. 2015, arXiv 1509.02971).

    y           = r + gamma^n d min_i Q'_i(s', pi(s') + e')         e, e' ~ clip(N(0, noise^2), -c, c)
    L(critic)   = mean sum_i (Q_i(s, a) - y)^2                      i = 1, 2
    L(actor)    = - mean min_i Q_i(s, pi(s) + e)
    w'          <- w' + rate (w - w')

r is the reward of the bonus (`agents.explore.bonus`) for an n-step transition from s to s'. Actor and critic also see
the skill. The order of an update: train the bonus, compute r, train the critic, train the actor, update the target.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Float32

from agents.actor_critic import clip_straight_through, temporal_difference
from agents.explore.bonus import Bonus, BonusState, Transitions
from agents.explore.config import LearnerConfig
from agents.explore.networks import Actor, Critic
from rlring.language_model import TrainState


class LearnerState(NamedTuple):
    """The state of training."""

    actor: TrainState
    critic: TrainState
    target: nnx.State
    bonus: BonusState


class Learner:
    """The policy, and its updates on batches of transitions."""

    def __init__(self, settings: LearnerConfig, bonus: Bonus):
        self.settings, self.bonus = settings, bonus
        sizes, seen = bonus.sizes, bonus.sizes.observation + bonus.skill_size
        self.networks = {
            "actor": partial(Actor, seen, sizes.action, settings.width),
            "critic": partial(Critic, seen, sizes.action, bonus.critic_outputs, settings.width),
        }
        abstract = {
            name: nnx.split(nnx.eval_shape(lambda make=make: make(rngs=nnx.Rngs(0))))
            for name, make in self.networks.items()
        }
        self.graphs = {name: graph for name, (graph, _) in abstract.items()}
        self.structure = jax.tree.structure(abstract["actor"][1])
        self.optimizer = optax.adam(settings.learning_rate)
        self.init = jax.jit(self._init)
        self.mean = jax.jit(self._mean)
        self.update = jax.jit(self._updates, donate_argnums=0)

    def _init(self, key: Array) -> LearnerState:
        """Returns the initial state."""
        keys = jax.random.split(key, 3)
        actor, critic = (
            nnx.state(make(rngs=nnx.Rngs(one))) for make, one in zip(self.networks.values(), keys[:2], strict=True)
        )
        learnt = (TrainState(weights, self.optimizer.init(weights)) for weights in (actor, critic))
        return LearnerState(*learnt, jax.tree.map(jnp.copy, critic), self.bonus.init(keys[2]))

    def policy(self, state: LearnerState) -> Callable[[Float32[np.ndarray, " I"]], Float32[np.ndarray, " A"]]:
        """Returns the policy: a function from observation and skill, concatenated, to the mean action."""
        weights = jax.tree.leaves(state.actor.weights)  # flattened once: it costs more than a forward pass
        return lambda seen: np.asarray(self.mean(weights, seen))

    def _mean(self, weights: list[Array], seen: Float[Array, " I"]) -> Float[Array, " A"]:
        actor = jax.tree.unflatten(self.structure, weights)
        return nnx.merge(self.graphs["actor"], actor)(seen)

    def _updates(self, state: LearnerState, batches: Transitions, key: Array) -> tuple[LearnerState, dict[str, Array]]:
        """Returns the state after one update per batch of `batches`, [U, B, ...], and the means of the metrics."""
        keys = jax.random.split(key, len(batches.reward))
        state, metrics = jax.lax.scan(lambda state, one: self._update(state, *one), state, (batches, keys))
        return state, jax.tree.map(jnp.mean, metrics)

    def _update(self, state: LearnerState, batch: Transitions, key: Array) -> tuple[LearnerState, dict[str, Array]]:
        for_bonus, for_next, for_now = jax.random.split(key, 3)
        bonus, reward, metrics = self.bonus.update(state.bonus, batch, for_bonus)
        seen, following = (
            jnp.concatenate([x, batch.skill], axis=-1) for x in (batch.observation, batch.next_observation)
        )
        action = self._noisy(nnx.merge(self.graphs["actor"], state.actor.weights)(following), for_next)
        value = self._values(state.target, following, action, batch.skill).min(axis=0)
        target = jax.lax.stop_gradient(reward + batch.discount * value)

        def critic_loss(weights: nnx.State) -> Array:
            return temporal_difference(self._values(weights, seen, batch.action, batch.skill), target)

        critic, loss = self._step(critic_loss, state.critic)

        def actor_loss(weights: nnx.State) -> Array:
            action = self._noisy(nnx.merge(self.graphs["actor"], weights)(seen), for_now)
            return -self._values(critic.weights, seen, action, batch.skill).min(axis=0).mean()

        actor, loss_of_actor = self._step(actor_loss, state.actor)
        followed = optax.incremental_update(critic.weights, state.target, self.settings.target_rate)
        metrics |= {
            "loss/critic": loss,
            "loss/action": loss_of_actor,
            "reward/paid": reward.mean(),
            "value/target": target.mean(),
        }
        return LearnerState(actor, critic, followed, bonus), metrics

    def _step(self, loss: Callable[[nnx.State], Array], learnt: TrainState) -> tuple[TrainState, Array]:
        value, gradients = jax.value_and_grad(loss)(learnt.weights)
        return learnt.updated(self.optimizer, gradients), value

    def _values(
        self, weights: nnx.State, seen: Float[Array, "B I"], action: Float[Array, "B A"], skill: Float[Array, "B Z"]
    ) -> Float[Array, "2 B"]:
        return self.bonus.value(nnx.merge(self.graphs["critic"], weights)(seen, action), skill)

    def _noisy(self, mean: Float[Array, "B A"], key: Array) -> Float[Array, "B A"]:
        noise = self.settings.noise * jax.random.normal(key, mean.shape)
        return clip_straight_through(mean + jnp.clip(noise, -self.settings.noise_clip, self.settings.noise_clip))
