"""Disagreement (Pathak et al. 2019, arXiv 1906.04161): the variance of an ensemble of forward models.

    L   = mean_k mean |s' - f_k(s, a)|                  k = 1 .. models
    r   = mean_i var_k f_k(s, a)_i                      (equation 1)

As in URLB, the loss is the distance and not its square, the variance is the unbiased one, and the models are trained on
the same batches: they differ only in their initial weights.
"""

from typing import Annotated, Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float
from pydantic import Field

from agents.explore.bonus import Bonus, Transitions, length
from agents.explore.networks import MLP
from agents.section import Section


class DisagreementSettings(Section):
    models: Annotated[int, Field(ge=2, le=1024)] = 5


class Networks(nnx.Module):
    def __init__(self, sizes: tuple[int, ...], models: int, *, rngs: nnx.Rngs):
        self.models = nnx.List([MLP(sizes, rngs=rngs) for _ in range(models)])


class Disagreement(Bonus):
    """Rewards the variance of several predictions. Settings: `disagreement`."""

    def networks(self, rngs: nnx.Rngs) -> nnx.Module:
        observation, action, width = self.sizes
        return Networks((observation + action, width, observation), self.settings.models, rngs=rngs)

    def predictions(self, networks: Any, batch: Transitions) -> Float[Array, "K B O"]:
        """Returns the next observation that each of the K models predicts."""
        x = jnp.concatenate([batch.observation, batch.action], axis=-1)
        return jnp.stack([model(x) for model in networks.models])

    def loss(self, networks: Any, batch: Transitions, key: Array) -> Array:
        return length(batch.next_observation[None] - self.predictions(networks, batch)).mean()

    def reward(self, networks: Any, memory: Any, batch: Transitions, key: Array) -> tuple[Float[Array, " B"], Any]:
        return self.predictions(networks, batch).var(axis=0, ddof=1).mean(axis=-1), memory
