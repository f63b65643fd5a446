"""A recurrent agent, the baseline whose memory has a fixed size: a recurrent cell in the place of attention."""

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

State = tuple[Any, ...]  # of each layer, arrays [B, ...]


class Cell(Protocol):
    """What a layer remembers by."""

    outputs: int
    """Numbers that it tells of each token, the H of `read`."""

    def empty(self, batch: int) -> Any:
        """Returns the state of rows that have seen nothing."""
        ...

    def read(
        self, x: Float[Array, "B T D"], begins: Bool[Array, "B T"], is_there: Bool[Array, "B T"], state: Any
    ) -> tuple[Float[Array, "B T H"], Any]:
        """Returns what each token reads, and the state after them. A token that begins a chain finds an empty state;
        one that is not there leaves it as it is."""
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

    def empty(self, batch: int) -> State:
        """Returns the state of rows that have seen nothing."""
        return tuple(cell.empty(batch) for cell in self.cells)

    def __call__(
        self, x: Float[Array, "B T D"], begins: Bool[Array, "B T"], is_there: Bool[Array, "B T"], state: State
    ) -> tuple[Distribution, State]:
        """Returns the action distribution at every token, and the state after them (`Cell.read`)."""
        states = []
        for norm, cell, output, before in zip(self.norms, self.cells, self.outputs, state, strict=True):
            y, after = cell.read(norm(x), begins, is_there, before)
            x = x + output(y)
            states.append(after)
        return self.head(self.norm(x)), tuple(states)


def make_cell(config: Config, *, rngs: nnx.Rngs) -> Cell:
    """Returns a new cell of the kind that `agent.cell` names; None: a GRU."""
    if config.agent.cell == "delta":
        return GatedDelta(config.model.width, config.model.heads, rngs=rngs)
    return GRU(config.model.width, rngs=rngs)


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
