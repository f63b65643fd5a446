"""The groups of results that may be averaged, and their names in summary, plot and report."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any, NamedTuple

from agents.identity import differences
from agents.results import ORACLE, Goal, Result

Player = tuple[str, str, str, str, int]  # (task, agent, series, settings_id, updates)

FOREIGN = " (foreign context)"  # suffix of the control's name


class Cell(NamedTuple):
    """The key of a summary row. agent: its name in the summary. control_of: for a control with foreign contexts, the
    name of the agent that it controls; else empty."""

    task: str
    mode: str
    agent: str
    context_trajectories: int
    control_of: str


def cells(results: Sequence[Result]) -> dict[Cell, list[Result]]:
    """Returns the episodes behind each row of the summary."""
    names = _names(results)
    found: dict[Cell, dict[tuple[Goal, int], Result]] = {}
    for result in results:
        agent = names[player(result)]
        if result.places:
            agent = f"{agent}, {result.places:,} places"
        if result.met:
            agent = f"{agent}, p = {Fraction(result.met).limit_denominator(1 << 20)}"
        control_of = agent if result.context == "foreign" else ""
        called = agent + FOREIGN if control_of else agent
        cell = Cell(result.task, result.mode, called, result.context_trajectories, control_of)
        # Keyed by episode, so that the oracle of two experiments on the same goals counts once.
        found.setdefault(cell, {})[result.goal, result.episode_index] = result
    return {key: list(episodes.values()) for key, episodes in found.items()}


def player(result: Result) -> Player:
    """Returns the key of results that may be averaged. updates is 0 for the oracle and for best checkpoints."""
    is_any = result.agent == ORACLE or result.settings.get("evaluate.checkpoint") == "best"
    updates = 0 if is_any else result.checkpoint_step
    return result.task, result.agent, result.series, result.settings_id, updates


def named(results: Sequence[Result]) -> list[Result]:
    """Returns the results with their agents renamed as in the summary, series and settings included."""
    names = _names(results)
    return [replace(result, agent=names[player(result)]) for result in results]


def _names(results: Sequence[Result]) -> dict[Player, str]:
    """Returns the name of each player. Within a task, names are distinct, except that all oracles share a name."""
    series: dict[tuple[str, str], dict[str, dict[str, Mapping[str, Any]]]] = {}
    for result in results:
        of_agent = series.setdefault((result.task, result.agent), {})
        of_agent.setdefault(result.series, {})[result.settings_id] = result.settings
    players = {player(result) for result in results}
    told = {(*of, one): differences(found) for of, runs in series.items() for one, found in runs.items()}
    updates: dict[tuple[str, ...], set[int]] = {}
    for *of, done in players:
        updates.setdefault(tuple(of), set()).add(done)
    arms = _arms(series)
    names = {}
    for task, agent, one, key, done in players:
        arm = arms.get((task, one))
        parts = [one] * (arm is None and len(series[task, agent]) > 1) + [told[task, agent, one][key]]
        parts += [f"{done:,} updates"] * (len(updates[task, agent, one, key]) > 1)
        parts = [part for part in parts if part]
        called = agent if agent == ORACLE else arm or agent
        is_plain = agent == ORACLE or not parts
        names[task, agent, one, key, done] = called if is_plain else f"{called} [{'; '.join(parts)}]"
    return names


def _arms(series: Mapping[tuple[str, str], Mapping[str, Any]]) -> dict[tuple[str, str], str]:
    """Returns {(task, series): arm} for the tasks whose series are all named "<sweep>/<arm>", with distinct arms.
    series: the series of each (task, agent)."""
    of_task: dict[str, list[str]] = {}
    for (task, agent), found in series.items():
        of_task.setdefault(task, []).extend(found if agent != ORACLE else ())
    arms = {task: [one.partition("/")[2] for one in found] for task, found in of_task.items()}
    return {
        (task, one): arm
        for task, found in of_task.items()
        if all(arms[task]) and len(set(arms[task])) == len(found)
        for one, arm in zip(found, arms[task], strict=True)
    }
