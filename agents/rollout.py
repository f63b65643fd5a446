"""Plays the episodes of one condition, all groups in lock step."""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from agents.agent import Memory, Timesteps
from agents.cli import ConfigError, Diverged
from agents.goals import held_out_goals
from data import ChainBatch
from data.environment_batch import EnvironmentBatch

if TYPE_CHECKING:
    from agents.episodes import Condition
    from agents.evaluate import TrainedAgent


Batch = TypeVar("Batch", bound=EnvironmentBatch)


class RolloutState(NamedTuple):
    """The state between two episodes, on which the next one depends. A pytree."""

    memory: Memory
    key: Array
    """The data of a random key (`jax.random.key_data`)."""
    previous_action: Array
    previous_reward: Array


class EpisodeOutcome(NamedTuple):
    """The outcome of one episode of every row."""

    returns: np.ndarray  # f64[G]
    steps: np.ndarray  # i64[G]
    after: RolloutState


def make_environments(loaded: "TrainedAgent", task: str, rows: int, *, kind: type[Batch] = EnvironmentBatch) -> Batch:
    """Returns `rows` environments of a task for an evaluation.

    Raises ConfigError when their episodes are longer than the agent supports (`Agent.longest_episode`).
    """
    asked, known = loaded.config.evaluate.episode_steps, loaded.agent.longest_episode
    environments = kind(task, rows, episode_steps=asked)
    if known is not None and environments.episode_steps > known:
        raise ConfigError(
            f"{loaded.config.name} learnt from episodes of up to {known} steps, and those of {task} here have "
            f"{environments.episode_steps}: of the later ones it knows nothing. Train it on whole episodes, or play "
            f"as long as it learnt: evaluate.episode_steps={known}."
        )
    return environments


def initial_rollout_state(
    loaded: "TrainedAgent", condition: "Condition", prompt: ChainBatch, memory: Memory
) -> RolloutState:
    """Returns the state before the first episode. Its random key depends only on the seeds and the condition."""
    met = f"/{condition.met}" if condition.met else ""
    label = [ord(letter) for letter in f"{condition.mode}/{condition.trajectories}/{condition.context}{met}"]
    seeds = [loaded.config.evaluate.seed, loaded.config.seed, *label]
    key = jax.random.key(int(np.random.SeedSequence(seeds).generate_state(1)[0]))
    action, reward = (jnp.asarray(last_of(values, prompt)) for values in (prompt.action, prompt.reward))
    return RolloutState(memory, jax.random.key_data(key), action, reward)


def play(
    loaded: "TrainedAgent",
    condition: "Condition",
    environments: EnvironmentBatch,
    act: Callable,
    before: RolloutState,
    *,
    episode: int,
    target: float,
) -> EpisodeOutcome:
    """Plays episode `episode` of every group. Goals and starts depend on `evaluate.seed` alone, so they are the same
    for every agent and every context length. The memory of `before` is donated. target: the return asked for."""
    settings, groups = loaded.config.evaluate, loaded.config.evaluate.groups
    goals = held_out_goals(condition.task, settings.seed, groups)
    observation = environments.reset([(settings.seed, group, episode) for group in range(groups)], goals)
    return episode_of_all(loaded, environments, act, before, observation, target=target)


def episode_of_all(
    loaded: "TrainedAgent",
    environments: EnvironmentBatch,
    act: Callable,
    before: RolloutState,
    observation: np.ndarray,
    *,
    target: float | None,
) -> EpisodeOutcome:
    """Plays an episode in every row of `environments`, which were just reset to `observation` [rows, O]. The memory of
    `before` is donated. target: the return asked for; None: the return to go is 0 in every step."""
    rows = len(observation)
    memory, key, action, reward = before
    key = jax.random.wrap_key_data(key)
    return_to_go = np.full(rows, target or 0.0, np.float32)
    total, steps = np.zeros(rows), np.zeros(rows, int)
    for step in range(environments.episode_steps):
        running = ~environments.over
        if not running.any():
            break
        now = Timesteps(observation, action, reward, return_to_go, np.full(rows, step, np.int32))
        key, sampling = jax.random.split(key)
        action, memory = act(loaded.params, memory, now, sampling if loaded.config.evaluate.sample else None)
        check_action(loaded, action, running, step)
        taken = environments.step(np.asarray(action))
        observation, reward = taken.observation, taken.reward.astype(np.float32)
        if target is not None:
            return_to_go = return_to_go - reward
        total += taken.reward
        steps += running
    return EpisodeOutcome(
        total, steps, RolloutState(memory, jax.random.key_data(key), jnp.asarray(action), jnp.asarray(reward))
    )


def check_action(loaded: "TrainedAgent", action: Array, running: np.ndarray, step: int) -> None:
    """Raises Diverged when an action of a running episode is not finite."""
    if not np.isfinite(np.asarray(action)[running]).all():
        raise Diverged(
            f"{loaded.config.name}, checkpoint of update {loaded.step}, acts NaN in step {step} of an episode: its "
            "weights, or what it is told (evaluate.target), are beyond all numbers. Play another checkpoint "
            "(evaluate.checkpoint=best), or train it with a lower optimizer.learning_rate."
        )


def last_of(values: np.ndarray, prompt: ChainBatch) -> np.ndarray:
    """Returns the values [B, ...] at each row's last real timestep, from values [B, M, ...]; zeros for empty rows."""
    if not values.shape[1]:
        return np.zeros((len(values), *values.shape[2:]), np.float32)
    position = np.where(prompt.segment >= 0, prompt.position, -1)
    last = position.argmax(axis=1)
    chosen = values[np.arange(len(values)), last]
    return np.where((position.max(axis=1) >= 0).reshape(-1, *[1] * (chosen.ndim - 1)), chosen, 0).astype(np.float32)
