"""What every intrinsic reward offers: networks that learn, a memory that they do not learn, a loss, a payment."""

from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Float32

from agents.section import Section
from rlring.language_model import TrainState


class Sizes(NamedTuple):
    """Numbers in an observation and in an action, and of units in a hidden layer."""

    observation: int
    action: int
    width: int


class Transitions(NamedTuple):
    """B transitions of n steps each: from s, by a and what was done after it, to s'."""

    observation: Float[Array, "*B O"]
    action: Float[Array, "*B A"]
    reward: Float[Array, "*B"]
    """What the task paid on the way, discounted."""
    discount: Float[Array, "*B"]
    """Of what comes after s': gamma^n, 0 where the episode ended."""
    next_observation: Float[Array, "*B O"]
    skill: Float[Array, "*B Z"]
    """What the agent meant to do, one of its own; Z is 0 where it has none."""


class BonusState(NamedTuple):
    """What a bonus has learnt."""

    learnt: TrainState
    memory: Any
    """Running statistics, a queue."""


class Bonus:
    """An intrinsic reward. Its subclasses say what it learns and what it pays.

    As in URLB one payment is made for a transition of n steps, after the update of its batch.
    """

    skill_name: ClassVar[str | None] = None
    """The key of the skill in the episodes."""
    skill_size = 0
    skill_every: int | None = None
    """Steps until another skill is drawn; None: one an episode."""
    values = 1
    """Numbers that the critic estimates of an action."""

    def __init__(self, settings: Any, sizes: Sizes, learning_rate: float):
        self.settings, self.sizes, self.learning_rate = settings, sizes, learning_rate
        self.graph = nnx.graphdef(nnx.eval_shape(lambda key: self.networks(nnx.Rngs(key)), jax.random.key(0)))

    def networks(self, rngs: nnx.Rngs) -> nnx.Module:
        """Returns what learns, with new weights."""
        raise NotImplementedError

    def loss(self, networks: Any, batch: Transitions, key: Array) -> Float[Array, ""]:
        """Returns the loss of a batch."""
        raise NotImplementedError

    def reward(self, networks: Any, memory: Any, batch: Transitions, key: Array) -> tuple[Float[Array, " B"], Any]:
        """Returns what is paid for each transition, and the memory after it."""
        raise NotImplementedError

    def memory(self) -> Any:
        """Returns the memory before the first update."""
        return ()

    def settle(self, networks: Any) -> None:
        """Changes what follows the networks and does not learn itself, after an update, in place."""

    def optimizer(self) -> optax.GradientTransformation:
        return optax.adam(self.learning_rate)

    def value(self, outputs: Float[Array, "*B U"], skill: Float[Array, "*B Z"]) -> Float[Array, "*B"]:
        """Returns the value that the critic's numbers say."""
        return outputs[..., 0]

    def draw_skill(self, rng: np.random.Generator) -> Float32[np.ndarray, " Z"]:
        """Returns a new skill: one of `skill_size`, each as likely."""
        skill = np.zeros(self.skill_size, np.float32)
        if self.skill_size:
            skill[rng.integers(self.skill_size)] = 1
        return skill

    def init(self, key: Array) -> BonusState:
        """Returns the state before the first update."""
        weights = nnx.state(self.networks(nnx.Rngs(key)))
        return BonusState(TrainState(weights, self.optimizer().init(weights)), self.memory())

    def update(
        self, state: BonusState, batch: Transitions, key: Array
    ) -> tuple[BonusState, Float[Array, " B"], dict[str, Array]]:
        """Returns the state after learning from a batch, what that pays for it, and metrics."""

        def loss(weights: nnx.State) -> Array:
            return self.loss(nnx.merge(self.graph, weights), batch, key)

        value, gradients = jax.value_and_grad(loss)(state.learnt.weights)
        learnt = state.learnt.updated(self.optimizer(), gradients)
        networks = nnx.merge(self.graph, learnt.weights)
        self.settle(networks)
        reward, memory = self.reward(networks, state.memory, batch, jax.random.fold_in(key, 1))
        learnt = TrainState(nnx.state(networks), learnt.optimizer)
        return BonusState(learnt, memory), reward, {"loss/intrinsic": value}


class NoSettings(Section):
    """Nothing to set."""


def length(x: Float[Array, "*B U"]) -> Float[Array, "*B"]:
    """Returns the Euclidean lengths; their gradient at 0 is 0."""
    return optax.safe_norm(x, 0.0, axis=-1)


def directions(x: Float[Array, "*B U"]) -> Float[Array, "*B U"]:
    """Returns the vectors at length 1."""
    return x / jnp.maximum(optax.safe_norm(x, 0.0, axis=-1, keepdims=True), 1e-12)
