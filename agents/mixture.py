"""A mixture of Gaussians over actions (Bishop 1994, Mixture Density Networks), for multimodal data.

    p(a)  = sum_c w_c prod_j N(a_j; m_cj, s_cj^2)                       c = 1 .. agent.mixture
    loss  = - log p(a) / A

A is the size of an action. Each component covers all entries of an action. A sample is drawn from component c with
probability w_c. Without sampling, the action (`mean`) is the mean m_c of the component of greatest weight: the mean of
the mixture may lie between its modes, where there are no data.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from agents.gaussian import Gaussian, GaussianHead, bounded


class Mixture(NamedTuple):
    """A mixture of C Gaussians. The weights sum to 1."""

    log_weight: Float[Array, "*S C"]
    means: Float[Array, "*S C A"]
    log_stds: Float[Array, "*S C A"]

    @property
    def mean(self) -> Float[Array, "*S A"]:
        """The mean of the component of greatest weight."""
        return self.component(jnp.argmax(self.log_weight, axis=-1)).mean

    def component(self, which: Array) -> Gaussian:
        """Returns the component with index `which` [*S] for each feature vector."""

        def one(values: Array) -> Array:
            return jnp.take_along_axis(values, which[..., None, None], axis=-2)[..., 0, :]

        return Gaussian(one(self.means), one(self.log_stds))

    def log_probability(self, action: Float[Array, "*S A"]) -> Float[Array, "*S"]:
        of_each = Gaussian(self.means, self.log_stds).log_probability(action[..., None, :])
        return jax.nn.logsumexp(self.log_weight + of_each, axis=-1)

    def act(self, key: Array | None) -> Float[Array, "*S A"]:
        """Returns an action in [-1, 1]: sampled, or the mean when there is no key."""
        if key is None:
            return jnp.clip(self.mean, -1.0, 1.0)
        which, noise = jax.random.split(key)
        return self.component(jax.random.categorical(which, self.log_weight)).act(noise)


class MixtureHead(nnx.Module):
    """Maps features to a mixture of Gaussians over actions, in float32."""

    def __init__(self, width: int, action_size: int, modes: int, *, rngs: nnx.Rngs):
        self.shape = (modes, action_size)
        size = modes * action_size
        project = nnx.Linear(width, modes + 2 * size, kernel_init=nnx.initializers.normal(0.01), rngs=rngs)
        # The means start apart: components that start alike would stay alike.
        means = jax.random.uniform(rngs.params(), (size,), minval=-1.0, maxval=1.0)
        project.bias[...] = project.bias[...].at[modes : modes + size].set(means)
        self.project = project

    def __call__(self, features: Float[Array, "*S D"]) -> Mixture:
        modes, size = self.shape[0], self.shape[0] * self.shape[1]
        weight, means, log_std = jnp.split(self.project(features.astype(jnp.float32)), [modes, modes + size], axis=-1)
        means, log_std = (x.reshape(*x.shape[:-1], *self.shape) for x in (means, log_std))
        return Mixture(jax.nn.log_softmax(weight), means, bounded(log_std))


def action_head(width: int, action_size: int, modes: int | None, *, rngs: nnx.Rngs) -> GaussianHead | MixtureHead:
    """Returns the action head with `modes` (`agent.mixture`) components, or a single Gaussian for None."""
    if modes is None:
        return GaussianHead(width, action_size, rngs=rngs)
    return MixtureHead(width, action_size, modes, rngs=rngs)
