"""The episodes that an evaluation needs, and which of them are in the results already."""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from agents.cli import ConfigError
from agents.config import Config
from agents.goals import foreign_goals, held_out_goals
from agents.prompts import held_out
from agents.results import Result
from agents.worlds import histories, is_map
from data import TrajectoryStore
from data.tasks import goal_task


class Condition(NamedTuple):
    """One kind of context that an agent is evaluated with."""

    task: str
    mode: str
    trajectories: int
    context: str
    """own (of the episode's goal), foreign (of another goal), or none."""
    episodes: int
    met: float = 0.0
    """Probability that a trajectory of the context has reached the goal. 0: not set (`agents.prompts.held_out`)."""


class Episode(NamedTuple):
    """The key of an episode within one run, checkpoint and settings."""

    task: str
    mode: str
    places: int
    met: float
    trajectories: int
    context: str
    group: int
    index: int


def conditions(config: Config) -> Iterator[Condition]:
    """Yields every condition that a config asks for. Map tasks have none (see `agents.worlds`)."""
    settings = config.evaluate
    for task in config.data.tasks:
        if is_map(task):
            continue  # evaluated by `agents.worlds`
        if "prompted" in settings.modes:
            hides_goal = goal_task(task) is not None
            for met, trajectories in itertools.product((hides_goal and settings.met) or [0.0], settings.contexts):
                context = "own" if trajectories else "none"
                yield Condition(task, "prompted", trajectories, context, settings.episodes, met)
                if settings.foreign and trajectories and hides_goal:
                    yield Condition(task, "prompted", trajectories, "foreign", settings.episodes, met)
        if "self" in settings.modes:
            yield Condition(task, "self", 0, "none", settings.self_episodes)


def check_contexts(config: Config, store: TrajectoryStore, *, has_context: bool = True) -> None:
    """Raises ConfigError when an evaluation asks for contexts of more trajectories than the store has held-out
    episodes, and DataError when the task has no foreign goals that are far enough away."""
    settings = config.evaluate
    asked = [condition for condition in conditions(config) if condition.task == store.task]
    if any(condition.context == "foreign" for condition in asked):
        goals = held_out_goals(store.task, settings.seed, settings.groups)
        assert goals is not None  # foreign conditions exist only for tasks with a hidden goal
        foreign_goals(store.task, settings.seed, goals)
    # With `met`, trajectories are drawn with replacement, so any number is possible.
    longest = max((one.trajectories for one in asked if has_context and not one.met), default=0)
    if not longest:
        return
    held = len(held_out(config, store).pool)
    if longest > held:
        raise ConfigError(
            f"evaluate.contexts asks for {longest} trajectories, and {store.path} holds out {held} of its "
            f"{store.episodes} episodes (data.held_out={config.data.held_out}). Ask for at most {held}, or use a store "
            "of more episodes."
        )


def episodes_of(condition: Condition, config: Config) -> set[Episode]:
    """Returns the keys of all episodes of a condition, for all groups."""
    task, mode, trajectories, context, episodes, met = condition
    groups = range(config.evaluate.groups)
    return {Episode(task, mode, 0, met, trajectories, context, group, i) for group in groups for i in range(episodes)}


def episode_of(result: Result) -> Episode:
    """Returns the key of a result's episode."""
    return Episode(
        result.task,
        result.mode,
        result.places,
        result.met,
        result.context_trajectories,
        result.context,
        result.group,
        result.episode_index,
    )


def is_complete(results: Sequence[Result], condition: Condition, config: Config) -> bool:
    """Whether every episode of a condition is among the results."""
    return episodes_of(condition, config) <= set(map(episode_of, results))


def requested_results(results: Sequence[Result], config: Config) -> list[Result]:
    """Returns those results that a config asks for, without results of other contexts, groups or episodes."""
    settings, wanted = config.evaluate, set[Episode]()
    for condition in conditions(config):
        wanted |= episodes_of(condition, config)
    for task, places, seen in histories(config):
        for context in ["none"] if not seen else ["own", "foreign"] if settings.foreign else ["own"]:
            wanted |= {
                Episode(task, "prompted", places, 0.0, seen, context, group, 0) for group in range(settings.groups)
            }
    return [result for result in results if episode_of(result) in wanted]
