"""Gaussian distributions over actions, and the loss of actions. `agents.mixture` has the multimodal distribution."""

from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

# A standard deviation below exp(-1.5) = 0.22 gains nothing for actions in [-1, 1]. With a bound of exp(-5), the few
# exactly predictable actions (of a body at rest) dominated the likelihood.
LOG_STD_RANGE = (-1.5, 0.5)


class Distribution(Protocol):
    """A distribution over actions for each feature vector of [*S, D]."""

    @property
    def mean(self) -> Float[Array, "*S A"]:
        """The action taken when actions are not sampled."""
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
    """Maps features to a Gaussian over actions, in float32."""

    def __init__(self, width: int, action_size: int, *, rngs: nnx.Rngs):
        self.project = nnx.Linear(width, 2 * action_size, kernel_init=nnx.initializers.normal(0.01), rngs=rngs)

    def __call__(self, features: Float[Array, "*S D"]) -> Gaussian:
        mean, log_std = jnp.split(self.project(features.astype(jnp.float32)), 2, axis=-1)
        return Gaussian(mean, bounded(log_std))


def bounded(log_std: Float[Array, "*S A"]) -> Float[Array, "*S A"]:
    """Returns the values mapped smoothly into LOG_STD_RANGE. Clipping would give zero gradients outside the range."""
    low, high = LOG_STD_RANGE
    return low + (high - low) * jax.nn.sigmoid(log_std + 1.0)


def action_loss(
    policy: Distribution, action: Array, weight: Array, whole: Array | None = None
) -> tuple[Array, dict[str, Array]]:
    """Returns the weighted mean negative log-likelihood of `action` per action entry, and metrics.

    Args:
        policy: distributions [B, M].
        action: [B, M, A].
        weight: [B, M], the weight of each action.
        whole: weights of the whole batch when this is a micro-batch of it. The loss and the metrics are then the
            micro-batch's share of those of the whole batch.

    Arrays are global: XLA sums over the devices.
    """
    total = jnp.maximum((weight if whole is None else whole).sum(), 1.0)
    loss = -(policy.log_probability(action) * weight).sum() / (total * action.shape[-1])
    error = (jnp.square(policy.mean - action).mean(axis=-1) * weight).sum() / total
    return loss, {"loss/action": loss, "action/mean_squared_error": error}
