"""Honest numbers about returns: what summary.csv says, and what a maximum gains by luck alone."""

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np

from agents.bootstrap import (
    RESAMPLES,
    Estimate,
    Strata,
    Weights,
    estimate,
    interquartile_maximum_weights,
    intervals,
    maximum_weights,
)
from agents.cells import Player, cells, player
from agents.cli import ConfigError
from agents.prediction import ALWAYS, Line, is_predicted, line
from agents.results import ORACLE, Goal, Result
from data.atomic_file import atomic_file

STATISTICS = ("first", "mean", "last", "max")

_REDUCTIONS: dict[str, Callable[[list[float]], float]] = {
    "first": lambda returns: returns[0],
    "mean": lambda returns: sum(returns) / len(returns),
    "last": lambda returns: returns[-1],
    "max": max,
}


@dataclass(frozen=True, slots=True)
class SummaryRow:
    """One line of summary.csv.

    Attributes:
        statistic: How the episodes of a goal become one number. ci_low and ci_high belong to the iqm of these numbers.
        groups: Goals (of the seed with the most).
        episodes: All episodes behind the row.
        episodes_per_group: Of the goal with the most; where it is 1, first, mean, last and max are the same number.
        interval_over: What was resampled: all that the intervals speak of.
    """

    agent: str
    task: str
    mode: str
    context_trajectories: int
    context_tokens: int
    statistic: str
    iqm: float
    ci_low: float
    ci_high: float
    seeds: int
    episodes: int
    mean: float
    mean_ci_low: float
    mean_ci_high: float
    groups: int
    episodes_per_group: int
    interval_over: str
    predicted: float = math.nan
    """Of a map, and where goals are rare: the mean that follows from prior and known (`agents.prediction`)."""
    control_of: str = field(default="", metadata={"is_written": False})
    """The agent whose mismatched-goal control this is, as the summary calls it; empty elsewhere."""


def summarize(
    results: Sequence[Result], *, statistics: Sequence[str] = STATISTICS, resamples: int = RESAMPLES
) -> list[SummaryRow]:
    """Returns the rows of summary.csv, sorted by task, mode, agent, context and statistic.

    The foreign-context control of an agent appears as "<agent> (foreign context)". An agent that occurs in several
    experiments appears once for each, as "<agent> [<experiment>]": they are never averaged; the seeds of one sweep are
    (`Result.series`). Nor are results of other settings, which appear as "<agent> [evaluate.target=8.0]", by what
    differs, or of checkpoints after another number of updates, which appear as "<agent> [5 updates]", unless the best
    one of each run was asked for. The oracle, which depends on the task alone, appears once. ConfigError for a
    statistic that is none of STATISTICS.
    """
    rows, lines = [], _lines(results)
    for (task, mode, agent, trajectories, control_of), members in sorted(cells(results).items()):
        episodes = [len(returns) for returns in _returns(members).values()]
        estimates: dict[tuple[float, ...], Estimate] = {}
        for statistic in statistics:
            values = reduced(members, statistic)
            numbers = tuple(values.values())
            if numbers not in estimates:  # with one episode a goal, all four statistics are the same numbers
                estimates[numbers] = estimate(strata_of(values), resamples=resamples)
            iqm, mean, over = estimates[numbers]
            seeds = [goal.seed for goal in values]
            rows.append(
                SummaryRow(
                    agent=agent,
                    task=task,
                    mode=mode,
                    context_trajectories=trajectories,
                    context_tokens=round(sum(result.context_tokens for result in members) / len(members)),
                    statistic=statistic,
                    iqm=iqm.value,
                    ci_low=iqm.low,
                    ci_high=iqm.high,
                    seeds=len(set(seeds)),
                    episodes=len(members),
                    mean=mean.value,
                    mean_ci_low=mean.low,
                    mean_ci_high=mean.high,
                    groups=max(seeds.count(seed) for seed in set(seeds)),
                    episodes_per_group=max(episodes),
                    interval_over=over,
                    predicted=_predicted(lines, members[0]),
                    control_of=control_of,
                )
            )
    return rows


def write_summary(path: Path, rows: Sequence[SummaryRow]) -> None:
    """Writes summary.csv: a header and a line a row; numbers with 6 digits, "nan" where there is no interval,
    nothing where there is no prediction."""
    text = io.StringIO()
    names = [one.name for one in fields(SummaryRow) if one.metadata.get("is_written", True)]
    writer = csv.DictWriter(text, names, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    for row in rows:
        values = asdict(row).items()
        written = {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in values}
        writer.writerow(written | ({"predicted": ""} if math.isnan(row.predicted) else {}))
    with atomic_file(path) as file:
        file.write(text.getvalue().encode())


def summary_notes(results: Sequence[Result], rows: Sequence[SummaryRow]) -> list[str]:
    """Returns the sentences that a reader of these rows must know."""
    notes = []
    if all(row.episodes_per_group == 1 for row in rows):
        notes.append("One episode a goal: first, mean, last and max are the same number.")
    unfinished = {
        agent
        for (_, _, agent, *_), members in cells(results).items()
        if len({len(returns) for returns in _returns(members).values()}) > 1
    }
    goals = {result.settings_id for result in results if result.agent == ORACLE}
    if len(goals) > 1:
        notes.append("The oracle is of the goals of several evaluation seeds together.")
    if unfinished:
        agents = ", ".join(sorted(unfinished))
        notes.append(f"Some goals have fewer episodes than others (was the evaluation finished?): {agents}.")
    if any(row.ci_low == row.ci_high for row in rows):
        notes.append(
            "An interval without width is not certainty: the middle half of the returns was one number (often 0) in "
            "every resample. The mean beside it tells more."
        )
    seeds = max((row.seeds for row in rows if row.agent != ORACLE), default=0)
    if seeds == 1:
        notes.append("One training seed: the intervals are over what was asked, and leave out the luck of training.")
    elif 1 < seeds < 5:
        notes.append(f"With {seeds} training seeds the intervals know the luck of training only roughly.")
    return notes


def maximum_null(results: Sequence[Result], draws: int, *, resamples: int = RESAMPLES) -> Estimate:
    """Returns what the largest of `draws` episodes comes to for a policy that learns nothing from its context,
    estimated from the context-free episodes among `results`; the intervals are over these episodes.

    Episodes of all goals are pooled. Where some goals are easier than others this makes luck look greater than it is,
    so a curve above this line is above the true one. ConfigError when there are fewer context-free episodes than draws.
    """
    pooled = [result.return_ for result in results if result.context_free]
    if len(pooled) < draws:
        raise ConfigError(
            f"the null line of a maximum of {draws} episodes needs as many context-free ones; got {len(pooled)}. "
            "Evaluate 0 trajectories on more goals."
        )
    weights: tuple[Weights, Weights] = (
        lambda n: interquartile_maximum_weights(n, draws),
        lambda n: maximum_weights(n, draws),
    )
    iqm, mean = intervals([np.array(pooled, dtype=np.float64)], weights, resamples=resamples)
    return Estimate(iqm, mean, "episodes")


def _lines(results: Sequence[Result]) -> dict[Player, Line | None]:
    """Returns the line of each agent on each map."""
    by_player: dict[Player, list[Result]] = {}
    for result in results:
        if is_predicted(result):
            by_player.setdefault(player(result), []).append(result)
    return {key: line(members) for key, members in by_player.items()}


def _predicted(lines: dict[Player, Line | None], member: Result) -> float:
    if member.met == ALWAYS:
        return math.nan  # what the others are predicted from
    found = lines.get(player(member)) if is_predicted(member) else None
    return math.nan if found is None else found.of(member)


def _returns(results: Sequence[Result]) -> dict[Goal, list[float]]:
    """Returns the returns of each goal, in the order they were played."""
    goals: dict[Goal, list[float]] = {}
    for result in sorted(results, key=lambda result: (result.goal[:3], result.episode_index)):
        goals.setdefault(result.goal, []).append(result.return_)
    return goals


def reduced(results: Sequence[Result], statistic: str) -> dict[Goal, float]:
    """Returns one number for each goal."""
    if statistic not in STATISTICS:
        raise ConfigError(f"unknown statistic {statistic!r}; choose from {', '.join(STATISTICS)}")
    return {goal: _REDUCTIONS[statistic](returns) for goal, returns in _returns(results).items()}


def strata_of(values: Mapping[Goal, float]) -> Strata:
    """Returns what the bootstrap draws from: of every training seed its goals, or its worlds of several queries."""
    seeds: dict[int, dict[tuple[int, int], list[float]]] = {}
    for goal, value in values.items():
        seeds.setdefault(goal.seed, {}).setdefault(goal.unit, []).append(value)
    width = max(len(unit) for units in seeds.values() for unit in units.values())
    if width == 1:
        return [np.array([value for (value,) in seeds[seed].values()]) for seed in sorted(seeds)]
    return [
        np.array([unit + [math.nan] * (width - len(unit)) for unit in seeds[seed].values()]) for seed in sorted(seeds)
    ]
