"""Particle-based entropy: distances to the nearest neighbours in a batch (URLB's `PBE` and `RMS`)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Running(NamedTuple):
    """Running mean and variance of all numbers seen (Chan et al. 1979). The initial mean is 0, the variance 1 and the
    count 1e-4."""

    mean: Float[Array, ""]
    variance: Float[Array, ""]
    count: Float[Array, ""]

    @classmethod
    def new(cls) -> "Running":
        return cls(jnp.zeros(()), jnp.ones(()), jnp.full((), 1e-4))

    def seen(self, x: Float[Array, " N"]) -> "Running":
        """Returns the statistics updated with the numbers `x`."""
        n, more = self.count, float(x.size)
        delta = x.mean() - self.mean
        total = n + more
        variance = (self.variance * n + x.var(ddof=1) * more + delta**2 * n * more / total) / total
        return Running(self.mean + delta * more / total, variance, total)


def neighbours(x: Float[Array, "B U"], others: Float[Array, "N U"], k: int) -> Float[Array, "B k"]:
    """Returns the distances to the k nearest of `others`, ascending. A vector in `others` is its own nearest."""
    # XLA fuses the differences with the sum. A formula with inner products would lose small distances to rounding.
    squares = jnp.square(x[:, None] - others[None]).sum(axis=-1)
    nearest, _ = jax.lax.top_k(-squares, k)
    return jnp.sqrt(-nearest)


def entropy(
    x: Float[Array, "B U"], k: int, clip: float, running: Running | None = None
) -> tuple[Float[Array, " B"], Running | None]:
    """Returns log(1 + mean_j max(d_j - clip, 0)) for each vector, and the updated `running`. d_j are the distances to
    its k nearest neighbours in the batch.

    With `running`, distances are first divided by the mean of all distances so far, these included (Liu and Abbeel
    2021, arXiv 2103.04551, with the constant 1).
    """
    distances = neighbours(x, x, k)
    if running is not None:
        running = running.seen(distances.reshape(-1))
        distances = distances / running.mean
    return jnp.log1p(jnp.maximum(distances - clip, 0.0).mean(axis=-1)), running
