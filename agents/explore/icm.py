"""Curiosity (Pathak et al. 2017, arXiv 1705.05363), as in URLB: the prediction error of a forward model.

    L   = mean |s' - f(s, a)| + mean |a - g(s, s')|
    r   = log(1 + scale |s' - f(s, a)|)

f is the forward model, g the inverse model. URLB predicts the observation itself, with the distance and not its square,
and the reward is a logarithm. The paper predicts features learnt by g, and the reward is half the squared error
(equation 6).
"""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from agents.explore.bonus import Bonus, Transitions, length
from agents.explore.networks import MLP
from agents.section import Positive, Section


class ICMSettings(Section):
    scale: Positive = 1.0


class Networks(nnx.Module):
    def __init__(self, observation: int, action: int, width: int, *, rngs: nnx.Rngs):
        self.forward = MLP((observation + action, width, observation), rngs=rngs)
        self.backward = MLP((2 * observation, width, action), rngs=rngs)


class ICM(Bonus):
    """Rewards the error of predicting the next observation. Settings: `icm`."""

    def networks(self, rngs: nnx.Rngs) -> nnx.Module:
        return Networks(*self.sizes, rngs=rngs)

    def error(self, networks: Any, batch: Transitions) -> Float[Array, " B"]:
        """Returns the distance between the predicted and the next observation."""
        predicted = networks.forward(jnp.concatenate([batch.observation, batch.action], axis=-1))
        return length(batch.next_observation - predicted)

    def loss(self, networks: Any, batch: Transitions, key: Array) -> Array:
        both = jnp.concatenate([batch.observation, batch.next_observation], axis=-1)
        action = jnp.tanh(networks.backward(both))
        return self.error(networks, batch).mean() + length(batch.action - action).mean()

    def reward(self, networks: Any, memory: Any, batch: Transitions, key: Array) -> tuple[Float[Array, " B"], Any]:
        return jnp.log1p(self.settings.scale * self.error(networks, batch)), memory
