"""What every agent offers."""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jaxtyping import Float, Int

from data import ChainBatch, TrajectoryStore

Params = Any  # a pytree of arrays
Memory = Any  # a value: what an agent carries from one step to the next
Batch = Any  # what a sampler gives and a loss takes: a ChainBatch or a TransitionBatch, arrays [B, M, ...]
Metrics = dict[str, Array]


class Timesteps(NamedTuple):
    """What is known just before each action: at every timestep of a chain [B, M], or at one of each row [B]."""

    observation: Float[Array, "*B O"]
    previous_action: Float[Array, "*B A"]
    """Of the timestep before, also across the border of two episodes; zeros at the first timestep of all."""
    previous_reward: Float[Array, "*B"]
    return_to_go: Float[Array, "*B"]
    step: Int[Array, "*B"]
    """Step within the episode, from 0."""
    position: Int[Array, "*B"] | None = None
    """Index of the timestep in its chain. None while acting: the agent's memory knows it."""
    segment: Int[Array, "*B"] | None = None
    """Index of the chain in its row, or -1 for padding. None while acting."""

    @classmethod
    def of(cls, batch: ChainBatch) -> "Timesteps":
        """Returns what was known at every timestep of a batch."""
        return cls(*(jnp.asarray(getattr(batch, name)) for name in cls._fields))

    def at(self, position: Int[Array, ""] | int) -> "Timesteps":
        """Returns one timestep of each row, [B], as a chain of one, [B, 1], at this position."""
        fields = [field[:, None] for field in self[:-2]]
        rows = self.observation.shape[0]
        return Timesteps(*fields, jnp.full((rows, 1), position, jnp.int32), jnp.zeros((rows, 1), jnp.int32))


class Scales(NamedTuple):
    """What brings inputs near unit size; from the training data, kept in the checkpoint."""

    observation_mean: np.ndarray  # [O]
    observation_std: np.ndarray  # [O], 1 where an observation never changed
    return_to_go: float
    """The largest return that chains ask for."""


@runtime_checkable
class Sampler(Protocol):
    """Where batches come from: a pure function of (seed, step, row, place)."""

    timesteps: int

    def sample(self, step: int, rows: np.ndarray, places: np.ndarray) -> Batch:
        """Returns of these rows the timesteps at these places; padding where there is no such place."""
        ...

    def typical_targets(self) -> dict[str, float]:
        """Returns the typical return that its chains ask for, by task."""
        ...


@runtime_checkable
class Agent(Protocol):
    """An algorithm: how it learns from chains or transitions, and how it acts. It holds no weights."""

    context: bool
    """Whether it can use trajectories other than the one it is in."""
    tokens_per_timestep: int
    longest_episode: int | None
    """Steps of the longest episode that it can be in; None: any."""

    def sampler(self, stores: list[TrajectoryStore]) -> Sampler:
        """Returns the source of its training batches."""
        ...

    def order(self, timesteps: int) -> np.ndarray | None:
        """Returns the order and padding (-1) of timesteps in which it wants its batches; None for as they are."""
        ...

    def init(self, key: Array) -> Params: ...

    def optimizer(self) -> optax.GradientTransformation:
        """Returns what makes an update of a gradient: `agents.optimizer`."""
        ...

    def loss(self, params: Params, batch: Batch, whole: Batch | None = None) -> tuple[Array, Metrics]:
        """Returns the loss of a global batch, or its share of that of the `whole` batch that it is a part of. Metrics
        hold "loss/action", that of the policy."""
        ...

    def start(self, params: Params, prompt: ChainBatch, steps: int) -> Memory:
        """Returns the memory of a context (`prompt` may hold no timesteps) with room for `steps` more timesteps."""
        ...

    def act(
        self, params: Params, memory: Memory, now: Timesteps, key: Array | None
    ) -> tuple[Float[Array, "B A"], Memory]:
        """Returns actions in [-1, 1] for one timestep of each row, sampled with `key` or the distribution's mean
        without, and the memory after them."""
        ...


def real(batch: ChainBatch) -> Float[Array, "B M"]:
    """Returns 1 at every timestep that is there, and 0 at padding."""
    return (batch.segment >= 0).astype(jnp.float32)
