"""Gated recurrent units (Cho et al. 2014, arXiv 1406.1078), with a state of 2 D entries (D: model.width)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

STATE = 2  # size of the state in multiples of the width; a layer then has about as many weights as a Transformer's


class GRU(nnx.GRUCell):
    """A GRU as a `Cell` (agents.recurrent), which reads token by token."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        super().__init__(width, STATE * width, rngs=rngs)

    @property
    def outputs(self) -> int:
        return self.hidden_features

    def initial_state(self, batch: int) -> Float[Array, "B H"]:
        return jnp.zeros((batch, self.hidden_features))

    def read(
        self, x: Float[Array, "B T D"], begins: Bool[Array, "B T"], is_real: Bool[Array, "B T"], state: Array
    ) -> tuple[Float[Array, "B T H"], Array]:
        def step(state, token):
            x, begins, is_real = token
            after, y = self(jnp.where(begins[:, None], 0.0, state), x)
            return jnp.where(is_real[:, None], after, state), y

        tokens = jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), (x, begins, is_real))
        state, y = jax.lax.scan(step, state, tokens)
        return jnp.swapaxes(y, 0, 1), state
