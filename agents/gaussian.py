"""A Gaussian over actions: where the data went several ways, a single action would stand still in the middle.
(`agents.mixture` keeps the ways apart.)"""

from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

# Below a standard deviation of 0.22 there is nothing to win for an action in [-1, 1], and much to lose: with a bound of
# exp(-5) the likelihood of the few actions that can be foretold exactly (a body at rest) drowned all others.
LOG_STD_RANGE = (-1.5, 0.5)


class Distribution(Protocol):
    """Over actions, at every place of features [*S, D]."""

    @property
    def mean(self) -> Float[Array, "*S A"]:
        """What is done when nothing is drawn."""
        ...

    def log_probability(self, action: Float[Array, "*S A"]) -> Float[Array, "*S"]: ...

    def act(self, key: Array | None) -> Float[Array, "*S A"]:
        """Returns an action in [-1, 1]: sampled, or the mean when there is no key."""
        ...


class Gaussian(NamedTuple):
    """Independent normal distributions over the entries of an action."""

    mean: Float[Array, "*S A"]
    log_std: Float[Array, "*S A"]

    def log_probability(self, action: Float[Array, "*S A"]) -> Float[Array, "*S"]:
        z = (action - self.mean) * jnp.exp(-self.log_std)
        return jnp.sum(-0.5 * z * z - self.log_std - 0.5 * jnp.log(2 * jnp.pi), axis=-1)

    def act(self, key: Array | None) -> Float[Array, "*S A"]:
        """Returns an action in [-1, 1]: sampled, or the mean when there is no key."""
        noise = 0.0 if key is None else jnp.exp(self.log_std) * jax.random.normal(key, self.mean.shape, self.mean.dtype)
        return jnp.clip(self.mean + noise, -1.0, 1.0)


class GaussianHead(nnx.Module):
    """Maps features to a Gaussian over actions; float32, as the loss is."""

    def __init__(self, width: int, action_size: int, *, rngs: nnx.Rngs):
        self.project = nnx.Linear(width, 2 * action_size, kernel_init=nnx.initializers.normal(0.01), rngs=rngs)

    def __call__(self, features: Float[Array, "*S D"]) -> Gaussian:
        mean, log_std = jnp.split(self.project(features.astype(jnp.float32)), 2, axis=-1)
        return Gaussian(mean, bounded(log_std))


def bounded(log_std: Float[Array, "*S A"]) -> Float[Array, "*S A"]:
    """Returns it within LOG_STD_RANGE, smoothly: a clipped one would have no gradient to come back with."""
    low, high = LOG_STD_RANGE
    return low + (high - low) * jax.nn.sigmoid(log_std + 1.0)


def action_loss(
    policy: Distribution, action: Array, weight: Array, whole: Array | None = None
) -> tuple[Array, dict[str, Array]]:
    """Returns the weighted mean negative log-likelihood of `action` per action entry, with its metrics; of a part of a
    batch, with the weights of the `whole`, its share of them.

    Written on global arrays: the sum over devices is XLA's business.
    """
    total = jnp.maximum((weight if whole is None else whole).sum(), 1.0)
    loss = -(policy.log_probability(action) * weight).sum() / (total * action.shape[-1])
    error = (jnp.square(policy.mean - action).mean(axis=-1) * weight).sum() / total
    return loss, {"loss/action": loss, "action/mean_squared_error": error}
