"""Recorded episodes of a trained agent: the same goals without a context and with the longest one."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import numpy as np

from agents.episodes import Condition, conditions
from agents.evaluate import make_prompt
from agents.goals import held_out_goals
from agents.rollout import initial_rollout_state, make_environments, play
from data.environment_batch import EnvironmentBatch

if TYPE_CHECKING:
    from agents.evaluate import TrainedAgent

GROUPS = 3


class Take(NamedTuple):
    """One episode."""

    states: np.ndarray  # f64[M+1, P]
    extras: Mapping[str, np.ndarray]
    """Random draws of the episode, such as its goal."""
    total: float
    """The return."""


class Scene(NamedTuple):
    """Episodes of one task under one context."""

    task: str
    label: str
    takes: list[Take]


class Recorder(EnvironmentBatch):
    """A batch of environments that records the physics states of the current episodes."""

    def reset(self, *arguments, **options) -> np.ndarray:
        """Starts new episodes and new recordings (`EnvironmentBatch.reset`)."""
        observation = super().reset(*arguments, **options)
        self.states, self.extras = [self.physics_states()], [one.extras() for one in self.environments]
        return observation

    def step(self, actions):
        """Takes a step and records the states after it (`EnvironmentBatch.step`)."""
        taken = super().step(actions)
        self.states.append(self.physics_states())
        return taken

    def takes(self, returns: Sequence[float], steps: Sequence[int]) -> list[Take]:
        """Returns the recorded episodes, cut to their numbers of steps."""
        states = np.stack(self.states, axis=1)
        rows = zip(states, self.extras, returns, steps, strict=True)
        return [Take(of_row[: count + 1], extras, float(total)) for of_row, extras, total, count in rows]


def played_scenes(loaded: "TrainedAgent") -> list[Scene]:
    """Returns episodes of the evaluation's first goals, for every task except map tasks: without a context and with the
    longest one. For tasks evaluated in mode self only, returns the first and the last episode.

    Goals and starts are those of the evaluation. Sampled actions differ, since they depend on the number of rows.
    """
    settings = loaded.config.evaluate
    few = settings.model_copy(update={"groups": min(GROUPS, settings.groups)})
    loaded = loaded._replace(config=loaded.config.model_copy(update={"evaluate": few}))
    chosen = _chosen(list(conditions(loaded.config)))
    act, start = jax.jit(loaded.agent.act, donate_argnums=1), jax.jit(loaded.agent.start, static_argnums=2)
    return [scene for condition in chosen for scene in _played(loaded, condition, act, start)]


def _chosen(asked: Sequence[Condition]) -> list[Condition]:
    chosen = []
    for task in dict.fromkeys(condition.task for condition in asked):
        own = [condition for condition in asked if condition.task == task and condition.context != "foreign"]
        prompted = sorted((c for c in own if c.mode == "prompted"), key=lambda condition: condition.trajectories)
        chosen += list(dict.fromkeys([prompted[0], prompted[-1]])) if prompted else own
    return chosen


def _played(loaded: "TrainedAgent", condition: Condition, act, start) -> list[Scene]:
    settings = loaded.config.evaluate
    environments = make_environments(loaded, condition.task, settings.groups, kind=Recorder)
    goals = held_out_goals(condition.task, settings.seed, settings.groups)
    target = loaded.meta.targets[condition.task] if settings.target == "typical" else float(settings.target)
    prompt = make_prompt(loaded, condition, goals, target)
    episodes = condition.episodes if condition.mode == "self" else 1
    memory = start(loaded.params, prompt, episodes * environments.episode_steps)
    state = initial_rollout_state(loaded, condition, prompt, memory)
    scenes = []
    for episode in range(episodes):
        returns, steps, state = play(loaded, condition, environments, act, state, episode=episode, target=target)
        if episode in (0, episodes - 1):
            label = f"{condition.trajectories} trajectories" if condition.trajectories else "no context"
            if condition.mode == "self":
                label = f"episode {episode + 1} of its own"
            scenes.append(Scene(condition.task, label, environments.takes(returns, steps)))
    return scenes
