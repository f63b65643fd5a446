"""Diversity is all you need (Eysenbach et al. 2018, arXiv 1802.06070): skills that their states reveal.

    L   = - mean log q(z | s')
    r   = scale (log q(z | s') - log p(z))              p uniform (equation 3)

q is a classifier of the skill z. As in URLB, a new skill is drawn every `every` steps; in the paper, a skill lasts for
an episode.
"""

from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from agents.explore.bonus import Bonus, Transitions
from agents.explore.networks import MLP
from agents.section import Positive, Section, Size


class DIAYNSettings(Section):
    skills: Size = 16
    every: Size = 50
    """Steps until a new skill is drawn."""
    scale: Positive = 1.0


class DIAYN(Bonus):
    """Rewards states that reveal the skill. Settings: `diayn`."""

    skill_name = "skill"

    @property
    def skill_size(self) -> int:
        return self.settings.skills

    @property
    def skill_every(self) -> int:
        return self.settings.every

    def networks(self, rngs: nnx.Rngs) -> nnx.Module:
        width = self.sizes.width
        return MLP((self.sizes.observation, width, width, self.settings.skills), rngs=rngs)

    def log_probability(self, networks: Any, batch: Transitions) -> Float[Array, " B"]:
        """Returns log q(z | s')."""
        return (jax.nn.log_softmax(networks(batch.next_observation), axis=-1) * batch.skill).sum(axis=-1)

    def loss(self, networks: Any, batch: Transitions, key: Array) -> Array:
        return -self.log_probability(networks, batch).mean()

    def reward(self, networks: Any, memory: Any, batch: Transitions, key: Array) -> tuple[Float[Array, " B"], Any]:
        surplus = self.log_probability(networks, batch) + np.log(self.settings.skills)
        return self.settings.scale * surplus, memory
