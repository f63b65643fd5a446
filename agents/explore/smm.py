"""State marginal matching (Lee et al. 2019, arXiv 1906.05274): rare states, which skills divide up.

    L(v)    = mean_i (x - v(x))_i^2 + beta KL(code | N(0, 1))           x = (s, z), v a variational autoencoder
    L(d)    = - mean log d(z | s)
    r       = a sum_i (x - v(x))_i^2 + b log(number of skills) + c log d(z | s)

d is a classifier of the skill z. The first term estimates - log of the density of s under the skill z, the second is
- log p(z). With the third term, this is the paper's reward of a skill for a uniform target density. As in URLB, the
squared error is summed in r and averaged in L. URLB has the third term with the opposite sign, as if c were -1, and
draws skills by the rewards of a task; here, as in the paper, a skill is drawn uniformly and lasts for an episode.
"""

from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float
from pydantic import Field

from agents.explore.bonus import Bonus, Transitions
from agents.explore.networks import MLP, linear
from agents.section import Positive, Return, Section, Size


class SMMSettings(Section):
    skills: Size = 4
    code: Size = 128
    """Size of the autoencoder's code."""
    units: Size = 150
    """Hidden units of the autoencoder."""
    beta: Annotated[float, Field(ge=0, le=1e30)] = 0.5
    learning_rate: Positive = 1e-2
    """Learning rate of the autoencoder."""
    discriminator_learning_rate: Positive = 1e-3
    state: Return = 1.0
    """a: the weight of rare states."""
    skill: Return = 1.0
    """b: the weight of log(number of skills)."""
    told: Return = 1.0
    """c: the weight of states that reveal the skill."""


class Autoencoder(nnx.Module):
    def __init__(self, inputs: int, code: int, units: int, *, rngs: nnx.Rngs):
        self.encoder = MLP((inputs, units, units), rngs=rngs)
        self.mean, self.log_variance = (linear(units, code, rngs=rngs) for _ in range(2))
        self.decoder = MLP((code, units, units, inputs), rngs=rngs)

    def __call__(self, x: Float[Array, "B I"], noise: Float[Array, "B C"]) -> tuple[Array, Array, Array]:
        """Returns the reconstruction of x, and the mean and the log variance of the code."""
        features = jax.nn.relu(self.encoder(x))
        mean, log_variance = self.mean(features), self.log_variance(features)
        return self.decoder(mean + jnp.exp(0.5 * log_variance) * noise), mean, log_variance


class Networks(nnx.Module):
    def __init__(self, observation: int, width: int, settings: SMMSettings, *, rngs: nnx.Rngs):
        inputs = observation + settings.skills
        self.autoencoder = Autoencoder(inputs, settings.code, settings.units, rngs=rngs)
        self.discriminator = MLP((observation, width, width, settings.skills), rngs=rngs)


class SMM(Bonus):
    """Rewards states that are rare and reveal the skill. Settings: `smm`."""

    skill_name = "z"

    @property
    def skill_size(self) -> int:
        return self.settings.skills

    def networks(self, rngs: nnx.Rngs) -> nnx.Module:
        return Networks(self.sizes.observation, self.sizes.width, self.settings, rngs=rngs)

    def optimizer(self) -> optax.GradientTransformation:
        rates = {
            "autoencoder": self.settings.learning_rate,
            "discriminator": self.settings.discriminator_learning_rate,
        }
        return optax.partition({name: optax.adam(rate) for name, rate in rates.items()}, _part)

    def loss(self, networks: Any, batch: Transitions, key: Array) -> Array:
        error, mean, log_variance = self._described(networks, batch, key)
        divergence = -0.5 * (1 + log_variance - mean**2 - jnp.exp(log_variance)).sum(axis=-1).mean()
        return error.mean() + self.settings.beta * divergence - self._told(networks, batch).mean()

    def reward(self, networks: Any, memory: Any, batch: Transitions, key: Array) -> tuple[Float[Array, " B"], Any]:
        settings = self.settings
        rare = self._described(networks, batch, key)[0].sum(axis=-1)
        share = settings.skill * np.log(settings.skills)
        return settings.state * rare + share + settings.told * self._told(networks, batch), memory

    def _described(self, networks: Any, batch: Transitions, key: Array) -> tuple[Array, Array, Array]:
        """Returns the squared errors of the autoencoder [B, O + Z], and the mean and the log variance of its codes."""
        x = jnp.concatenate([batch.observation, batch.skill], axis=-1)
        noise = jax.random.normal(key, (len(x), self.settings.code))
        said, mean, log_variance = networks.autoencoder(x, noise)
        return jnp.square(x - said), mean, log_variance

    def _told(self, networks: Any, batch: Transitions) -> Float[Array, " B"]:
        """Returns log d(z | s)."""
        logits = networks.discriminator(batch.observation)
        return (jax.nn.log_softmax(logits, axis=-1) * batch.skill).sum(axis=-1)


def _part(weights: Any) -> Any:
    """Returns the name of the network for each weight, as optax.partition needs it."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[0].key, weights)
