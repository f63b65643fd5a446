"""What every agent offers."""

from typing import Any, NamedTuple, Protocol

import numpy as np
from jax import Array
from jaxtyping import Float, Int

from data import ChainBatch, TrajectoryStore

Params = Any  # a pytree of arrays
Memory = Any  # a value: what an agent carries from one step to the next
Metrics = dict[str, Array]


class Now(NamedTuple):
    """What an agent is told before it acts, one row an environment."""

    observation: Float[Array, "B O"]
    previous_action: Float[Array, "B A"]
    """Of the moment before, also across the border of two episodes; zeros at the first moment of all."""
    previous_reward: Float[Array, " B"]
    return_to_go: Float[Array, " B"]
    step: Int[Array, " B"]
    """Step within the episode, from 0."""


class Scales(NamedTuple):
    """What brings inputs near unit size; from the training data, kept in the checkpoint."""

    observation_mean: np.ndarray  # [O]
    observation_std: np.ndarray  # [O], 1 where an observation never changed
    return_to_go: float
    """The largest return that chains ask for."""


class Sampler(Protocol):
    """Where batches come from: a pure function of (seed, step, row, place)."""

    moments: int

    def sample(self, step: int, rows: np.ndarray, places: np.ndarray) -> ChainBatch:
        """Returns of these rows the moments at these places; padding where there is no such place."""
        ...


class Agent(Protocol):
    """An algorithm: how it learns from chains, and how it acts. It holds no weights."""

    context: bool
    """Whether it can use trajectories other than the one it is in."""
    tokens_per_moment: int
    longest_episode: int | None
    """Steps of the longest episode that it can be in; None: any."""

    def sampler(self, stores: list[TrajectoryStore]) -> Sampler:
        """Returns the source of its training batches."""
        ...

    def order(self, moments: int) -> np.ndarray | None:
        """Returns the order and padding (-1) of moments in which it wants its batches; None for as they are."""
        ...

    def init(self, key: Array) -> Params: ...

    def loss(self, params: Params, batch: ChainBatch, whole: ChainBatch | None = None) -> tuple[Array, Metrics]:
        """Returns the loss of a global batch, or its share of that of the `whole` batch that it is a part of."""
        ...

    def start(self, params: Params, prompt: ChainBatch, steps: int) -> Memory:
        """Returns the memory of a context (`prompt` may hold no moments) with room for `steps` more moments."""
        ...

    def act(self, params: Params, memory: Memory, now: Now, key: Array | None) -> tuple[Float[Array, "B A"], Memory]:
        """Returns actions in [-1, 1], sampled with `key` or the distribution's mean without, and the memory after
        them."""
        ...
