"""Active pre-training (Liu and Abbeel 2021, arXiv 2103.04551) on features of a curiosity module: URLB's "APT (ICM)".

    z       = trunk(s)
    L       = mean |z(s') - f(z(s), a)| + mean |a - g(z(s), z(s'))|         (Pathak et al. 2017, arXiv 1705.05363)
    r       = log(1 + 1/k sum_j max(|z - z_j| - clip, 0))                   j: the k nearest in the batch

The features hold what actions affect. As in URLB, the nearest neighbour is the state itself, at distance 0.
"""

from typing import Annotated, Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float
from pydantic import Field

from agents.explore.bonus import Bonus, Transitions, length
from agents.explore.networks import MLP, Trunk
from agents.explore.particles import entropy
from agents.section import Section, Size


class ICMAPTSettings(Section):
    representation: Size = 512
    """Size of a feature vector."""
    neighbours: Size = 12
    clip: Annotated[float, Field(ge=0, le=1e30)] = 0.0
    """Subtracted from each distance."""


class Networks(nnx.Module):
    def __init__(self, observation: int, action: int, representation: int, width: int, *, rngs: nnx.Rngs):
        self.trunk = Trunk(observation, representation, rngs=rngs)
        self.forward = MLP((representation + action, width, representation), rngs=rngs)
        self.backward = MLP((2 * representation, width, action), rngs=rngs)


class ICMAPT(Bonus):
    """Rewards the distance to the nearest neighbours in the batch. Settings: `icm_apt`."""

    def networks(self, rngs: nnx.Rngs) -> nnx.Module:
        sizes = self.sizes
        return Networks(sizes.observation, sizes.action, self.settings.representation, sizes.width, rngs=rngs)

    def loss(self, networks: Any, batch: Transitions, key: Array) -> Array:
        z, following = networks.trunk(batch.observation), networks.trunk(batch.next_observation)
        predicted = networks.forward(jnp.concatenate([z, batch.action], axis=-1))
        action = jnp.tanh(networks.backward(jnp.concatenate([z, following], axis=-1)))
        return length(following - predicted).mean() + length(batch.action - action).mean()

    def reward(self, networks: Any, memory: Any, batch: Transitions, key: Array) -> tuple[Float[Array, " B"], Any]:
        z = networks.trunk(batch.observation)
        return entropy(z, self.settings.neighbours, self.settings.clip)[0], memory
