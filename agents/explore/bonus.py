"""The base class of intrinsic rewards: networks, a memory that is not trained, a loss, and the reward."""

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
    """Sizes of observations, actions and hidden layers."""

    observation: int
    action: int
    width: int


class Transitions(NamedTuple):
    """B n-step transitions: from s, by a and the n - 1 actions after it, to s'."""

    observation: Float[Array, "*B O"]
    action: Float[Array, "*B A"]
    reward: Float[Array, "*B"]
    """Discounted sum of the task's rewards over the n steps."""
    discount: Float[Array, "*B"]
    """Discount of the value of s': gamma^n, or 0 where the episode terminated."""
    next_observation: Float[Array, "*B O"]
    skill: Float[Array, "*B Z"]
    """Skill that the agent followed. Z is 0 for algorithms without skills."""


class BonusState(NamedTuple):
    """The state of an intrinsic reward."""

    learnt: TrainState
    memory: Any
    """Untrained state, such as running statistics or a queue."""


class Bonus:
    """An intrinsic reward. Subclasses define its networks, loss and reward.

    As in URLB, an n-step transition gets one intrinsic reward, computed after the update on its batch.
    """

    skill_name: ClassVar[str | None] = None
    """The key of the skill in the episode files. None: no skills."""
    skill_size = 0
    skill_every: int | None = None
    """Steps until a new skill is drawn. None: one skill per episode."""
    critic_outputs = 1
    """Number of critic outputs per action."""

    def __init__(self, settings: Any, sizes: Sizes, learning_rate: float):
        self.settings, self.sizes, self.learning_rate = settings, sizes, learning_rate
        self.graph = nnx.graphdef(nnx.eval_shape(lambda key: self.networks(nnx.Rngs(key)), jax.random.key(0)))

    def networks(self, rngs: nnx.Rngs) -> nnx.Module:
        """Returns the networks with newly initialised weights."""
        raise NotImplementedError

    def loss(self, networks: Any, batch: Transitions, key: Array) -> Float[Array, ""]:
        """Returns the loss of the networks on a batch."""
        raise NotImplementedError

    def reward(self, networks: Any, memory: Any, batch: Transitions, key: Array) -> tuple[Float[Array, " B"], Any]:
        """Returns the reward of each transition, and the updated memory."""
        raise NotImplementedError

    def initial_memory(self) -> Any:
        """Returns the initial memory."""
        return ()

    def after_update(self, networks: Any) -> None:
        """Updates untrained weights in place after an update, such as target networks."""

    def optimizer(self) -> optax.GradientTransformation:
        return optax.adam(self.learning_rate)

    def value(self, outputs: Float[Array, "*B U"], skill: Float[Array, "*B Z"]) -> Float[Array, "*B"]:
        """Returns the value of an action from the critic's outputs."""
        return outputs[..., 0]

    def draw_skill(self, rng: np.random.Generator) -> Float32[np.ndarray, " Z"]:
        """Returns a new skill, by default a uniformly drawn one-hot vector of size `skill_size`."""
        skill = np.zeros(self.skill_size, np.float32)
        if self.skill_size:
            skill[rng.integers(self.skill_size)] = 1
        return skill

    def init(self, key: Array) -> BonusState:
        """Returns the initial state."""
        weights = nnx.state(self.networks(nnx.Rngs(key)))
        return BonusState(TrainState(weights, self.optimizer().init(weights)), self.initial_memory())

    def update(
        self, state: BonusState, batch: Transitions, key: Array
    ) -> tuple[BonusState, Float[Array, " B"], dict[str, Array]]:
        """Updates on a batch. Returns the new state, the batch's rewards under it, and metrics."""

        def loss(weights: nnx.State) -> Array:
            return self.loss(nnx.merge(self.graph, weights), batch, key)

        value, gradients = jax.value_and_grad(loss)(state.learnt.weights)
        learnt = state.learnt.updated(self.optimizer(), gradients)
        networks = nnx.merge(self.graph, learnt.weights)
        self.after_update(networks)
        reward, memory = self.reward(networks, state.memory, batch, jax.random.fold_in(key, 1))
        learnt = TrainState(nnx.state(networks), learnt.optimizer)
        return BonusState(learnt, memory), reward, {"loss/intrinsic": value}


class NoSettings(Section):
    """The settings of algorithms that have none."""


def length(x: Float[Array, "*B U"]) -> Float[Array, "*B"]:
    """Returns the Euclidean norms. Their gradient at 0 is 0."""
    return optax.safe_norm(x, 0.0, axis=-1)


def directions(x: Float[Array, "*B U"]) -> Float[Array, "*B U"]:
    """Returns the vectors normalised to length 1."""
    return x / jnp.maximum(optax.safe_norm(x, 0.0, axis=-1, keepdims=True), 1e-12)
