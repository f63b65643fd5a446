"""A recurrent agent, the baseline whose memory has a fixed size: gated recurrent units in the place of attention."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from agents.agent import Params, Scales, Timesteps
from agents.agentic_transformer import AgenticTransformer
from agents.config import Config
from agents.gaussian import Distribution
from agents.mixture import action_head
from agents.tokens import Tokenizer
from data import ChainBatch

STATE = 2  # numbers of a layer's state for each of the width: its weights are then about as many as a Transformer's

State = tuple[Float[Array, "B H"], ...]  # of each layer


class RecurrentNetwork(nnx.Module):
    """Tokenizer, layers of gated recurrent units (Cho et al. 2014, 1406.1078) on a residual stream, and action head."""

    def __init__(self, config: Config, scales: Scales, action_size: int, episode_steps: int, *, rngs: nnx.Rngs):
        width, layers = config.model.width, range(config.model.layers)
        self.state_size = STATE * width
        self.tokenizer = Tokenizer(
            "fused", scales, action_size=action_size, width=width, episode_steps=episode_steps, rngs=rngs
        )
        self.norms = nnx.List([nnx.RMSNorm(width, rngs=rngs) for _ in layers])
        self.cells = nnx.List([nnx.GRUCell(width, self.state_size, rngs=rngs) for _ in layers])
        self.outputs = nnx.List([nnx.Linear(self.state_size, width, rngs=rngs) for _ in layers])
        self.norm = nnx.RMSNorm(width, rngs=rngs)
        self.head = action_head(width, action_size, config.agent.mixture, rngs=rngs)

    def empty(self, batch: int) -> State:
        """Returns the state of rows that have seen nothing."""
        return tuple(jnp.zeros((batch, self.state_size)) for _ in self.cells)

    def __call__(
        self, x: Float[Array, "B T D"], begins: Bool[Array, "B T"], is_there: Bool[Array, "B T"], state: State
    ) -> tuple[Distribution, State]:
        """Returns the action distribution at every token, and the state after them. A token that begins a chain finds
        an empty state; one that is not there leaves it as it is."""
        states = []
        for norm, cell, output, carry in zip(self.norms, self.cells, self.outputs, state, strict=True):

            def step(carry, token, cell=cell):
                x, begins, is_there = token
                after, y = cell(jnp.where(begins[:, None], 0.0, carry), x)
                return jnp.where(is_there[:, None], after, carry), y

            tokens = jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), (norm(x), begins, is_there))
            carry, y = jax.lax.scan(step, carry, tokens)
            x = x + output(jnp.swapaxes(y, 0, 1))
            states.append(carry)
        return self.head(self.norm(x)), tuple(states)


class RecurrentAgent(AgenticTransformer):
    """Learns from the chains of the Agentic Transformer, and remembers of them what its state holds."""

    def network(self, key: Array) -> RecurrentNetwork:
        return RecurrentNetwork(self.config, self.scales, self.action_size, self.longest_episode, rngs=nnx.Rngs(key))

    def features(self, params: Params, batch: ChainBatch) -> Distribution:
        return self._read(params, batch)[0]

    def start(self, params: Params, prompt: ChainBatch, steps: int) -> State:
        return self._read(params, prompt)[1]

    def act(self, params: Params, memory: State, now: Timesteps, key: Array | None) -> tuple[Array, State]:
        network = nnx.merge(self.graph, params)
        x, _, segment = network.tokenizer(now.at(0))
        policy, memory = network(x, segment < 0, segment == 0, memory)
        return jax.tree.map(lambda field: field[:, 0], policy).act(key), memory

    def _read(self, params: Params, batch: ChainBatch) -> tuple[Distribution, State]:
        network = nnx.merge(self.graph, params)
        x, position, segment = network.tokenizer(Timesteps.of(batch))
        return network(x, position == 0, segment >= 0, network.empty(len(x)))
