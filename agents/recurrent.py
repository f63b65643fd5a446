"""The recurrent agent, a baseline with a memory of fixed size: recurrent cells in place of attention."""

from typing import Any, Protocol

import jax
from flax import nnx
from jaxtyping import Array, Bool, Float

from agents.agent import Params, Scales, Timesteps
from agents.agentic_transformer import AgenticTransformer
from agents.config import Config
from agents.gated_delta import GatedDelta
from agents.gaussian import Distribution
from agents.gru import GRU
from agents.mixture import action_head
from agents.tokens import Tokenizer
from data import ChainBatch

State = tuple[Any, ...]  # the state of each layer, arrays [B, ...]


class Cell(Protocol):
    """The recurrent part of a layer."""

    outputs: int
    """Output size per token, the H of `read`."""

    def initial_state(self, batch: int) -> Any:
        """Returns the initial state of `batch` rows."""
        ...

    def read(
        self, x: Float[Array, "B T D"], begins: Bool[Array, "B T"], is_real: Bool[Array, "B T"], state: Any
    ) -> tuple[Float[Array, "B T H"], Any]:
        """Returns the output of each token, and the state after the last one. Where `begins` is True, a chain begins
        and the state is reset first. Where `is_real` is False, the token is padding and leaves the state unchanged."""
        ...


class RecurrentNetwork(nnx.Module):
    """Tokenizer, recurrent layers on a residual stream, and action head."""

    def __init__(self, config: Config, scales: Scales, action_size: int, episode_steps: int, *, rngs: nnx.Rngs):
        width, layers = config.model.width, range(config.model.layers)
        self.tokenizer = Tokenizer(
            "fused", scales, action_size=action_size, width=width, episode_steps=episode_steps, rngs=rngs
        )
        self.norms = nnx.List([nnx.RMSNorm(width, rngs=rngs) for _ in layers])
        self.cells = nnx.List([make_cell(config, rngs=rngs) for _ in layers])
        self.outputs = nnx.List([nnx.Linear(cell.outputs, width, rngs=rngs) for cell in self.cells])
        self.norm = nnx.RMSNorm(width, rngs=rngs)
        self.head = action_head(width, action_size, config.agent.mixture, rngs=rngs)

    def initial_state(self, batch: int) -> State:
        """Returns the initial state of `batch` rows."""
        return tuple(cell.initial_state(batch) for cell in self.cells)

    def __call__(
        self, x: Float[Array, "B T D"], begins: Bool[Array, "B T"], is_real: Bool[Array, "B T"], state: State
    ) -> tuple[Distribution, State]:
        """Returns the action distribution at every token, and the state after them (`Cell.read`)."""
        states = []
        for norm, cell, output, before in zip(self.norms, self.cells, self.outputs, state, strict=True):
            y, after = cell.read(norm(x), begins, is_real, before)
            x = x + output(y)
            states.append(after)
        return self.head(self.norm(x)), tuple(states)


def make_cell(config: Config, *, rngs: nnx.Rngs) -> Cell:
    """Returns a new cell of the kind `agent.cell` (None: a GRU)."""
    if config.agent.cell == "delta":
        return GatedDelta(config.model.width, config.model.heads, rngs=rngs)
    return GRU(config.model.width, rngs=rngs)


class RecurrentAgent(AgenticTransformer):
    """The Agentic Transformer with recurrent layers in place of the Transformer: same chains, same loss."""

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
        x, position, segment = network.tokenizer(Timesteps.from_batch(batch))
        return network(x, position == 0, segment >= 0, network.initial_state(len(x)))
