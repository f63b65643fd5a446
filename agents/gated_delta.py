"""Linear attention with the gated delta rule (Yang, Kautz and Hatamizadeh 2024, arXiv 2412.06464; the delta rule:
Schlag, Irie and Schmidhuber 2021, arXiv 2102.11174).

The state of each head is a matrix S, which maps keys to values. Each token decays S, removes the old value of its key,
writes its new value, and reads with its query:

    S_t = a_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T         o_t = S_t^T q_t

    k, q  = silu(W x), normalised to length 1    v = silu(W x)    b = sigmoid(W x)    a = sigmoid(W x + c)
    y     = rms_norm(o) * silu(W x)                                                   for each head

Each W is a weight matrix of its own. Keys and values have 2 D entries (D: model.width), so a layer's state of N heads
has N (2 D)^2 entries. The paper's short convolution and feed-forward layer are left out, since a fused token holds a
whole timestep.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.lax.linalg import triangular_solve
from jaxtyping import Array, Bool, Float

STATE = 2  # size of keys and values, in multiples of the width
CHUNK = 64  # tokens per chunk; the backward pass keeps the states between chunks and recomputes the rest
KEEPS = 9.0  # initial c: the state decays by 1/e in e^9 = 8,100 tokens

State = Float[Array, "B N H H"]


class Written(NamedTuple):
    """Queries, keys, values, log decay (log a) and write strength (b) of the tokens of a chunk."""

    q: Float[Array, "B N C H"]
    k: Float[Array, "B N C H"]
    v: Float[Array, "B N C H"]
    log_a: Float[Array, "B N C"]
    b: Float[Array, "B N C"]


class GatedDelta(nnx.Module):
    """The gated delta rule as a `Cell` (agents.recurrent), which reads tokens chunk by chunk."""

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs):
        self.heads, self.head_size = heads, STATE * width
        self.query, self.key, self.value, self.gate = (
            nnx.Linear(width, self.outputs, use_bias=False, rngs=rngs) for _ in range(4)
        )
        self.keep = nnx.Linear(width, heads, bias_init=nnx.initializers.constant(KEEPS), rngs=rngs)
        self.write = nnx.Linear(width, heads, rngs=rngs)
        self.norm = nnx.RMSNorm(self.head_size, rngs=rngs)

    @property
    def outputs(self) -> int:
        return self.heads * self.head_size

    def initial_state(self, batch: int) -> State:
        return jnp.zeros((batch, self.heads, self.head_size, self.head_size))

    def read(
        self, x: Float[Array, "B T D"], begins: Bool[Array, "B T"], is_real: Bool[Array, "B T"], state: State
    ) -> tuple[Float[Array, "B T H"], State]:
        B, T, _ = x.shape
        size = max(1, min(CHUNK, T))
        chunks = -(-T // size)

        def chunked(leaf: Array) -> Array:
            padded = jnp.pad(leaf, [(0, 0), (0, chunks * size - T)] + [(0, 0)] * (leaf.ndim - 2))
            return jnp.swapaxes(padded.reshape(B, chunks, size, *leaf.shape[2:]), 0, 1)

        @jax.checkpoint
        def step(state, chunk):
            x, begins, is_real = chunk
            read, state = read_chunk(self._written(x, is_real), begins & is_real, state)
            y = self.norm(read) * self._heads(self.gate, x)
            return state, jnp.swapaxes(y, 1, 2).reshape(*x.shape[:2], -1)

        state, y = jax.lax.scan(step, state, tuple(map(chunked, (x, begins, is_real))))
        return jnp.swapaxes(y, 0, 1).reshape(B, chunks * size, self.outputs)[:, :T], state

    def _written(self, x: Float[Array, "B C D"], is_real: Bool[Array, "B C"]) -> Written:
        """Returns the projections of the tokens. Padding neither writes to the state nor decays it (b = 0, a = 1)."""
        q, k, v = (self._heads(project, x) for project in (self.query, self.key, self.value))
        real = is_real[:, None]
        log_a = jnp.where(real, jax.nn.log_sigmoid(jnp.swapaxes(self.keep(x), 1, 2)), 0.0)
        b = jnp.where(real, jax.nn.sigmoid(jnp.swapaxes(self.write(x), 1, 2)), 0.0)
        return Written(unit(q), unit(k), v, log_a, b)

    def _heads(self, project: nnx.Linear, x: Float[Array, "B C D"]) -> Float[Array, "B N C H"]:
        y = jax.nn.silu(project(x)).reshape(*x.shape[:2], self.heads, self.head_size)
        return jnp.swapaxes(y, 1, 2)


def read_chunk(written: Written, begins: Bool[Array, "B C"], state: State) -> tuple[Float[Array, "B N C H"], State]:
    """Returns the output o of the tokens of a chunk, and the state after it. `begins` marks the first token of a chain,
    which starts from an empty state.

    This is the paper's chunkwise form. G is the cumulative product of a within a chain. u is the value that a token
    adds to the state at its key. All u solve one triangular system (the UT transform):

        S_t = G_t S_0 + sum_{j<=t} (G_t / G_j) k_j u_j^T
        u_t + b_t sum_{j<t} (G_t / G_j) (k_t . k_j) u_j = b_t (v_t - G_t S_0^T k_t)
    """
    q, k, v, log_a, b = written
    size = begins.shape[1]
    chain = jnp.cumsum(begins, axis=1)
    is_before = (chain[:, :, None] == chain[:, None, :]) & jnp.tri(size, dtype=bool)[None]
    log_G = jnp.cumsum(log_a, axis=2)
    ratio_BNCC = jnp.exp(jnp.where(is_before[:, None], log_G[..., :, None] - log_G[..., None, :], -jnp.inf))
    of_state_BNC1 = jnp.where((chain == 0)[:, None], jnp.exp(log_G), 0.0)[..., None]

    both = jnp.concatenate([k, q], axis=2)
    k_S, q_S = jnp.split(both @ state, 2, axis=2)
    k_k, q_k = jnp.split(both @ k.mT, 2, axis=2)
    eye = jnp.broadcast_to(jnp.eye(size), k_k.shape)
    system = b[..., None] * ratio_BNCC * k_k  # below its diagonal, which is 1
    inverse_BNCC = triangular_solve(system, eye, left_side=True, lower=True, unit_diagonal=True)
    u = inverse_BNCC @ (b[..., None] * (v - of_state_BNC1 * k_S))
    read = of_state_BNC1 * q_S + (ratio_BNCC * q_k) @ u
    after = of_state_BNC1[..., -1:, :] * state + (ratio_BNCC[..., -1, :, None] * k).mT @ u
    return read, after


def unit(x: Float[Array, "*S H"]) -> Float[Array, "*S H"]:
    """Returns the vectors normalised to length 1."""
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-6)
