"""Random network distillation (Burda et al. 2018, arXiv 1810.12894): the error of predicting a random network.

    x       = clip((s - mean) / std, -5, 5)                     mean, std of the batch
    e(s)    = mean_i (f(x) - g(x))_i^2                          g random and fixed (section 2.2)
    L(f)    = mean e(s)
    r       = scale e(s) / std of all errors so far             (section 2.4)

As in URLB, f is trained on the replay, and s is the state before the action; the paper uses the state after it.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from agents.explore.bonus import Bonus, Transitions
from agents.explore.networks import MLP
from agents.explore.particles import Running
from agents.section import Positive, Section, Size


class RNDSettings(Section):
    representation: Size = 512
    """Output size of the networks."""
    scale: Positive = 1.0
    clip: Positive = 5.0


class Networks(nnx.Module):
    def __init__(self, sizes: tuple[int, ...], *, rngs: nnx.Rngs):
        self.predictor, self.target = MLP(sizes, rngs=rngs), MLP(sizes, rngs=rngs)


class RND(Bonus):
    """Rewards the error of predicting a random network. Settings: `rnd`."""

    def networks(self, rngs: nnx.Rngs) -> nnx.Module:
        width = self.sizes.width
        return Networks((self.sizes.observation, width, width, self.settings.representation), rngs=rngs)

    def initial_memory(self) -> Running:
        return Running.new()

    def error(self, networks: Any, observation: Float[Array, "B O"]) -> Float[Array, " B"]:
        """Returns the error e(s)."""
        mean = observation.mean(axis=0, keepdims=True)
        std = jnp.sqrt(observation.var(axis=0, keepdims=True) + 1e-5)
        x = jnp.clip((observation - mean) / std, -self.settings.clip, self.settings.clip)
        return jnp.square(jax.lax.stop_gradient(networks.target(x)) - networks.predictor(x)).mean(axis=-1)

    def loss(self, networks: Any, batch: Transitions, key: Array) -> Array:
        return self.error(networks, batch.observation).mean()

    def reward(self, networks: Any, memory: Running, batch: Transitions, key: Array) -> tuple[Array, Running]:
        error = self.error(networks, batch.observation)
        memory = memory.seen(error)
        return self.settings.scale * error / (jnp.sqrt(memory.variance) + 1e-8), memory
