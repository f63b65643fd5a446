"""Standardisation of observations, the same for all agents."""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float

from agents.agent import Scales

LIMIT = 10.0  # standard deviations


@dataclass(frozen=True)
class Standardizer:
    """Subtracts the mean of the data, divides by its standard deviation and clips at LIMIT.

    A sensor that hardly ever changed in the data, such as touch, may read hundreds of standard deviations when acting.
    Without clipping, that one entry would decide every action. The statistics are plain tuples, so that they belong to
    the model's definition and not to its weights.
    """

    mean: tuple[float, ...]
    scale: tuple[float, ...]

    @classmethod
    def of(cls, scales: Scales) -> "Standardizer":
        return cls(tuple(map(float, scales.observation_mean)), tuple(map(float, scales.observation_std)))

    @property
    def size(self) -> int:
        return len(self.mean)

    def __call__(self, observation: Float[Array, "*S O"]) -> Float[Array, "*S O"]:
        mean, scale = (jnp.broadcast_to(jnp.asarray(x), observation.shape) for x in (self.mean, self.scale))
        return jnp.clip((observation - mean) / scale, -LIMIT, LIMIT)
