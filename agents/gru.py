"""Gated recurrent units (Cho et al. 2014, arXiv 1406.1078): a state of 2 D numbers."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

STATE = 2  # numbers of the state for each of the width: its weights are then about as many as a Transformer's


class GRU(nnx.GRUCell):
    """A `Cell` (agents.recurrent) that reads one token after the other."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        super().__init__(width, STATE * width, rngs=rngs)

    @property
    def outputs(self) -> int:
        return self.hidden_features

    def empty(self, batch: int) -> Float[Array, "B H"]:
        return jnp.zeros((batch, self.hidden_features))

    def read(
        self, x: Float[Array, "B T D"], begins: Bool[Array, "B T"], is_there: Bool[Array, "B T"], state: Array
    ) -> tuple[Float[Array, "B T H"], Array]:
        def step(state, token):
            x, begins, is_there = token
            after, y = self(jnp.where(begins[:, None], 0.0, state), x)
            return jnp.where(is_there[:, None], after, state), y

        tokens = jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), (x, begins, is_there))
        state, y = jax.lax.scan(step, state, tokens)
        return jnp.swapaxes(y, 0, 1), state
