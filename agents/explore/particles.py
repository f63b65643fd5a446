"""Entropy of a batch by its particles: how far each is from its nearest neighbours (URLB's `PBE` and `RMS`)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Running(NamedTuple):
    """Mean and variance of all numbers seen so far (Chan et al. 1979); it begins with mean 0, variance 1, and a count
    of 1e-4."""

    mean: Float[Array, ""]
    variance: Float[Array, ""]
    count: Float[Array, ""]

    @classmethod
    def new(cls) -> "Running":
        return cls(jnp.zeros(()), jnp.ones(()), jnp.full((), 1e-4))

    def seen(self, x: Float[Array, " N"]) -> "Running":
        """Returns the statistics with N more numbers."""
        n, more = self.count, float(x.size)
        delta = x.mean() - self.mean
        total = n + more
        variance = (self.variance * n + x.var(ddof=1) * more + delta**2 * n * more / total) / total
        return Running(self.mean + delta * more / total, variance, total)


def neighbours(x: Float[Array, "B U"], others: Float[Array, "N U"], k: int) -> Float[Array, "B k"]:
    """Returns the distances to the k nearest of the others, ascending. A vector that is among them is its own first."""
    # By differences, which XLA adds up as it makes them: products would round the short distances away.
    squares = jnp.square(x[:, None] - others[None]).sum(axis=-1)
    nearest, _ = jax.lax.top_k(-squares, k)
    return jnp.sqrt(-nearest)


def entropy(
    x: Float[Array, "B U"], k: int, clip: float, running: Running | None = None
) -> tuple[Float[Array, " B"], Running | None]:
    """Returns log(1 + mean_j max(d_j - clip, 0)) of the k distances of each vector to its nearest in the batch.

    With `running`, distances are first divided by the mean of all so far, theirs included (Liu and Abbeel 2021, arXiv
    2103.04551, with the constant 1).
    """
    distances = neighbours(x, x, k)
    if running is not None:
        running = running.seen(distances.reshape(-1))
        distances = distances / running.mean
    return jnp.log1p(jnp.maximum(distances - clip, 0.0).mean(axis=-1)), running
