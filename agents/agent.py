"""The interface of all agents, and the types that it uses."""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jaxtyping import Float, Int

from data import ChainBatch, TrajectoryStore

Params = Any  # a pytree of arrays
Memory = Any  # what an agent carries from one step to the next, such as a KV cache
Batch = Any  # a ChainBatch or a TransitionBatch, arrays [B, M, ...]
Metrics = dict[str, Array]


class Timesteps(NamedTuple):
    """The inputs known just before each action: [B, M] for every timestep of a chain, or [B] for one per row."""

    observation: Float[Array, "*B O"]
    previous_action: Float[Array, "*B A"]
    """Action of the previous timestep, also across episode boundaries; zeros at the first timestep of a chain."""
    previous_reward: Float[Array, "*B"]
    return_to_go: Float[Array, "*B"]
    step: Int[Array, "*B"]
    """Index of the timestep in its episode, from 0."""
    position: Int[Array, "*B"] | None = None
    """Index of the timestep in its chain. None while acting: the agent's memory holds it."""
    segment: Int[Array, "*B"] | None = None
    """Index of the chain in its row, or -1 for padding. None while acting."""

    @classmethod
    def from_batch(cls, batch: ChainBatch) -> "Timesteps":
        """Returns the inputs at every timestep of a batch, [B, M]."""
        return cls(*(jnp.asarray(getattr(batch, name)) for name in cls._fields))

    def at(self, position: Int[Array, ""] | int) -> "Timesteps":
        """Returns one timestep per row, [B], as chains of length 1, [B, 1], at the given position."""
        fields = [field[:, None] for field in self[:-2]]
        rows = self.observation.shape[0]
        return Timesteps(*fields, jnp.full((rows, 1), position, jnp.int32), jnp.zeros((rows, 1), jnp.int32))


class Scales(NamedTuple):
    """Normalisation statistics of the inputs, from the training data. Checkpoints keep them."""

    observation_mean: np.ndarray  # [O]
    observation_std: np.ndarray  # [O], 1 where an entry never changed
    return_to_go: float
    """The typical return of a trajectory (the largest over the tasks), at least 1. It divides returns to go."""


@runtime_checkable
class Sampler(Protocol):
    """The source of batches. Each batch is a pure function of (seed, step, rows, places)."""

    timesteps: int

    def sample(self, step: int, rows: np.ndarray, places: np.ndarray) -> Batch:
        """Returns the timesteps `places` [M] (-1: padding) of the batch rows `rows` [B]."""
        ...

    def typical_targets(self) -> dict[str, float]:
        """Returns the typical return that the chains ask for, by task."""
        ...


@runtime_checkable
class Agent(Protocol):
    """An algorithm: how it learns from chains or transitions, and how it acts. An agent holds no weights."""

    context: bool
    """Whether it can use trajectories other than the current one as context."""
    tokens_per_timestep: int
    longest_episode: int | None
    """Steps of the longest episode that it supports. None: no limit."""

    def sampler(self, stores: list[TrajectoryStore]) -> Sampler:
        """Returns the sampler of the training batches."""
        ...

    def timestep_order(self, timesteps: int) -> np.ndarray | None:
        """Returns the order in which batches hold their timesteps, -1 for padding. None: the natural order."""
        ...

    def init(self, key: Array) -> Params: ...

    def optimizer(self) -> optax.GradientTransformation:
        """Returns the optimizer (`agents.optimizer`)."""
        ...

    def loss(self, params: Params, batch: Batch, whole: Batch | None = None) -> tuple[Array, Metrics]:
        """Returns the loss of a global batch, and metrics. Where `batch` is a micro-batch of `whole`, returns its share
        of the loss of `whole`. The metric "loss/action" is the loss of the policy."""
        ...

    def start(self, params: Params, prompt: ChainBatch, steps: int) -> Memory:
        """Returns the memory after `prompt` (which may be empty), with room for `steps` more timesteps."""
        ...

    def act(
        self, params: Params, memory: Memory, now: Timesteps, key: Array | None
    ) -> tuple[Float[Array, "B A"], Memory]:
        """Returns one action in [-1, 1] per row, and the new memory. Actions are sampled with `key`; without a key they
        are the mean of the distribution."""
        ...


def real(batch: ChainBatch) -> Float[Array, "B M"]:
    """Returns 1 at real timesteps, and 0 at padding."""
    return (batch.segment >= 0).astype(jnp.float32)
