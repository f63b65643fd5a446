"""The sources of episodes: uniform actions, or a learner that acts and learns online."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Float32

from agents.actor_critic import EDGE
from agents.cli import Diverged
from agents.explore.bonus import Sizes
from agents.explore.config import BONUSES, ExploreConfig, LearnerConfig
from agents.explore.learner import Learner
from agents.explore.replay import Replay
from agents.section import Section
from data import Trajectory
from data.collect import roll_out, start, step_through
from data.dmc import Environment

_EPISODE, _SAMPLE = 0xE1, 0xE2  # the use of random numbers, part of their seeds


class Random:
    """Acts uniformly, as `data.collect --policy uniform` does. An episode is one simulator call where possible."""

    state: Any = ()

    def __init__(self, config: ExploreConfig, environment: Environment, on_steps: Callable[[int], object]):
        self.config, self.environment, self.on_steps = config, environment, on_steps

    def episode(self, index: int, steps: int) -> tuple[Trajectory, dict[str, float]]:
        """Returns episode `index`, which begins after `steps` steps, and no metrics."""
        trajectory = roll_out(self.environment, "uniform", self.config.seed, index)
        self.on_steps(trajectory.length)
        return trajectory, {}

    def remember(self, index: int, trajectory: Trajectory) -> None:
        """Does nothing: there is no replay."""


class Learning:
    """Acts with the learner's policy, which is trained meanwhile on the earlier episodes.

    All random numbers depend only on the seed and on the step or the episode that uses them. So an episode depends only
    on the learner's state at its beginning and on the earlier episodes.
    """

    def __init__(self, config: ExploreConfig, environment: Environment, on_steps: Callable[[int], object]):
        self.config, self.environment, self.on_steps = config, environment, on_steps
        settings = config.learner
        observation, action = environment.observation_space.shape, environment.action_space.shape
        sizes = Sizes(observation[0], action[0], settings.width)
        self.learner = make_learner(config.algorithm, config.algorithm_settings, settings, sizes)
        self.bonus = self.learner.bonus
        self.key = jax.random.key(config.seed)
        self.state = self.learner.init(self.key)
        self.replay = Replay(
            sizes,
            self.bonus.skill_size,
            environment.episode_steps,
            capacity=settings.replay,
            nstep=settings.nstep,
            discount=settings.discount,
        )
        self._period = settings.update_every * settings.updates_per_call
        self._name = f"{config.task}, {config.algorithm}, seed {config.seed}"

    def episode(self, index: int, steps: int) -> tuple[Trajectory, dict[str, float]]:
        """Returns episode `index`, which begins after `steps` steps, and the means of the updates' metrics."""
        self._before, self._metrics, self._skills = steps, [], []
        self._policy = self.learner.policy(self.state)
        self._rng = np.random.default_rng((_EPISODE, self.config.seed, index))
        shape = self.environment.episode_steps, self.bonus.sizes.action
        self._noise = self.config.learner.noise * self._rng.standard_normal(shape, np.float32)
        self._uniform = self._rng.uniform(-1, 1, shape).astype(np.float32)
        self._source = f"{self._name}, episode {index}"
        observation, info = start(self.environment, self.config.seed, index)
        trajectory = step_through(self.environment, observation, info, self._act, self._source)
        if self.bonus.skill_name:
            # As in URLB's files: one row per observation, with the skill of the action that led to it.
            trajectory.extras[self.bonus.skill_name] = np.stack(self._skills[:1] + self._skills)
        self.remember(index, trajectory)
        metrics = jax.tree.map(lambda *values: float(np.mean(values)), *self._metrics) if self._metrics else {}
        bad = [name for name, value in metrics.items() if not np.isfinite(value)]
        if bad:
            raise diverged(", ".join(bad), self._source)
        return trajectory, metrics

    def remember(self, index: int, trajectory: Trajectory) -> None:
        """Adds an episode to the replay."""
        name = self.bonus.skill_name
        skill = trajectory.extras[name][1:] if name else np.zeros((trajectory.length, 0), np.float32)
        self.replay.add(index, trajectory, skill)

    def _act(
        self, step: int, observation: Float32[np.ndarray, " O"], physics: Float[np.ndarray, " P"]
    ) -> Float32[np.ndarray, " A"]:
        self._learn(self._before + step)
        every = self.bonus.skill_every
        if step == 0 or (every is not None and step % every == 0):
            self._skill = self.bonus.draw_skill(self._rng)
        self._skills.append(self._skill)
        self.on_steps(1)
        if self._before + step < self.config.learner.seed_steps:
            return self._uniform[step]
        action = self._policy(np.concatenate([observation, self._skill])) + self._noise[step]
        if not np.isfinite(action).all():
            raise diverged("an action", self._source)
        return np.clip(action, -EDGE, EDGE)

    def _learn(self, now: int) -> None:
        settings = self.config.learner
        if now < settings.seed_steps or now % self._period or self.replay.is_empty:
            return
        rng = np.random.default_rng((_SAMPLE, self.config.seed, now))
        batches = self.replay.sample(rng, settings.updates_per_call, settings.batch)
        key = jax.random.fold_in(self.key, now)
        self.state, metrics = self.learner.update(self.state, batches, key)
        self._policy = self.learner.policy(self.state)
        self._metrics.append(metrics)


@lru_cache(maxsize=1)
def make_learner(algorithm: str, of_algorithm: Section, settings: LearnerConfig, sizes: Sizes) -> Learner:
    """Returns the learner, cached so that a process compiles it once."""
    return Learner(settings, BONUSES[algorithm](of_algorithm, sizes, settings.learning_rate))


def diverged(what: str, where: str) -> Diverged:
    """Returns the error for values `what` that are not finite."""
    return Diverged(f"{what} is not a number in {where}. Lower learner.learning_rate, and choose another --out.")


Explorer = Random | Learning


def make_explorer(config: ExploreConfig, environment: Environment, on_steps: Callable[[int], object]) -> Explorer:
    """Returns the explorer of a config. on_steps: called with the number of steps made since its last call."""
    kind = Random if config.algorithm == "random" else Learning
    return kind(config, environment, on_steps)
