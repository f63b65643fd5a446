"""Active pre-training with successor features (Liu and Abbeel 2021, arXiv 2108.13956): covers states in ways that a
skill vector selects.

    phi     = f(s') / |f(s')|
    L       = - mean <phi, z>                                   z: the skill, a vector of length 1
    r       = log(1 + 1/k sum_j max(d_j / mean d - clip, 0)) + <phi, z>
    Q(s, a) = <psi(s, a, z), z>                                 psi: the successor features, the critic's outputs

d_j are the distances of f(s') to its k nearest neighbours in the batch, mean d is the mean of all distances so far. A
new skill is drawn every `every` steps.
"""

from typing import Annotated, Any

import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32
from pydantic import Field

from agents.explore.bonus import Bonus, Transitions, directions
from agents.explore.networks import MLP
from agents.explore.particles import Running, entropy
from agents.section import Section, Size


class APSSettings(Section):
    features: Size = 10
    """Size of a skill and of the features of a state."""
    every: Size = 5
    """Steps until a new skill is drawn."""
    neighbours: Size = 12
    clip: Annotated[float, Field(ge=0, le=1e30)] = 1e-4


class APS(Bonus):
    """Rewards the distance to the nearest neighbours, and features along the skill. Settings: `aps`."""

    skill_name = "task"

    @property
    def skill_size(self) -> int:
        return self.settings.features

    @property
    def skill_every(self) -> int:
        return self.settings.every

    @property
    def critic_outputs(self) -> int:
        return self.settings.features

    def value(self, outputs: Float[Array, "2 B U"], skill: Float[Array, "B U"]) -> Float[Array, "2 B"]:
        return (outputs * skill[None]).sum(axis=-1)

    def draw_skill(self, rng: np.random.Generator) -> Float32[np.ndarray, " Z"]:
        vector = rng.normal(size=self.settings.features)
        return (vector / np.linalg.norm(vector)).astype(np.float32)

    def networks(self, rngs: nnx.Rngs) -> nnx.Module:
        width = self.sizes.width
        return MLP((self.sizes.observation, width, width, self.settings.features), rngs=rngs)

    def initial_memory(self) -> Running:
        return Running.new()

    def loss(self, networks: Any, batch: Transitions, key: Array) -> Array:
        return -_along(networks(batch.next_observation), batch.skill).mean()

    def reward(self, networks: Any, memory: Running, batch: Transitions, key: Array) -> tuple[Array, Running | None]:
        features = networks(batch.next_observation)
        surprise, memory_after = entropy(features, self.settings.neighbours, self.settings.clip, memory)
        return surprise + _along(features, batch.skill), memory_after


def _along(features: Float[Array, "B U"], skill: Float[Array, "B U"]) -> Float[Array, " B"]:
    return (directions(features) * skill).sum(axis=-1)
