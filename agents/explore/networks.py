"""The networks of URLB's agents, initialised with orthogonal weights and zero biases."""

from collections.abc import Sequence
from itertools import pairwise

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


def linear(inputs: int, outputs: int, *, rngs: nnx.Rngs, use_bias: bool = True) -> nnx.Linear:
    """Returns a linear layer with orthogonal weights."""
    return nnx.Linear(inputs, outputs, use_bias=use_bias, kernel_init=nnx.initializers.orthogonal(), rngs=rngs)


class MLP(nnx.Module):
    """Linear layers of the given sizes, with a ReLU between any two."""

    def __init__(self, sizes: Sequence[int], *, rngs: nnx.Rngs):
        self.layers = nnx.List([linear(*pair, rngs=rngs) for pair in pairwise(sizes)])

    def __call__(self, x: Float[Array, "*B I"]) -> Float[Array, "*B U"]:
        for layer in list(self.layers)[:-1]:
            x = jax.nn.relu(layer(x))
        return self.layers[-1](x)


class Trunk(nnx.Module):
    """A linear layer, layer norm, tanh."""

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        self.linear = linear(inputs, outputs, rngs=rngs)
        self.norm = nnx.LayerNorm(outputs, epsilon=1e-5, rngs=rngs)

    def __call__(self, x: Float[Array, "*B I"]) -> Float[Array, "*B U"]:
        return jnp.tanh(self.norm(self.linear(x)))


class Actor(nnx.Module):
    """The policy network: the mean action, in (-1, 1)."""

    def __init__(self, inputs: int, actions: int, width: int, *, rngs: nnx.Rngs):
        self.trunk = Trunk(inputs, width, rngs=rngs)
        self.head = MLP((width, width, actions), rngs=rngs)

    def __call__(self, seen: Float[Array, "*B I"]) -> Float[Array, "*B A"]:
        return jnp.tanh(self.head(self.trunk(seen)))


class Critic(nnx.Module):
    """Two Q heads on a shared trunk, with `outputs` outputs each."""

    def __init__(self, inputs: int, actions: int, outputs: int, width: int, *, rngs: nnx.Rngs):
        self.trunk = Trunk(inputs + actions, width, rngs=rngs)
        self.heads = nnx.List([MLP((width, width, outputs), rngs=rngs) for _ in range(2)])

    def __call__(self, seen: Float[Array, "*B I"], action: Float[Array, "*B A"]) -> Float[Array, "2 *B U"]:
        x = self.trunk(jnp.concatenate([seen, action], axis=-1))
        return jnp.stack([head(x) for head in self.heads])
