"""Statistics of returns: the rows of summary.csv, and the expected maximum of independent episodes."""

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
from agents.prediction import ALWAYS, Predictor, is_predicted, make_predictor
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
        statistic: Reduction of the episodes of a goal to one number: "first", "mean", "last" or "max".
        iqm: Interquartile mean of these numbers over goals and seeds; ci_low and ci_high are its 95 % interval.
        mean: Mean of the same numbers; mean_ci_low and mean_ci_high are its 95 % interval.
        seeds: Number of training seeds.
        groups: Number of goals (of the seed with the most).
        episodes: Number of all episodes behind the row.
        episodes_per_group: Number of episodes of a goal (of the goal with the most). Where it is 1, first, mean, last
            and max are the same number.
        interval_over: What was resampled. The intervals cover no other variation.
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
    """The mean that a perfect memory would earn (`agents.prediction`), for map tasks and rare goals; else NaN."""
    control_of: str = field(default="", metadata={"is_written": False})
    """For the control with foreign contexts, the name in the summary of the agent that it controls; else empty."""


def summarize(
    results: Sequence[Result], *, statistics: Sequence[str] = STATISTICS, resamples: int = RESAMPLES
) -> list[SummaryRow]:
    """Returns the rows of summary.csv, sorted by task, mode, agent, context and statistic.

    Only the seeds of one series (`Result.series`) are averaged. These results get separate rows:

    - the control of an agent with foreign contexts: "<agent> (foreign context)";
    - an agent in several series: "<agent> [<series>]", or its name in the sweep where that is unique;
    - other settings: "<agent> [evaluate.target=8.0]", naming the settings that differ;
    - checkpoints after another number of updates: "<agent> [5 updates]", unless each run's best one was asked for.

    The oracle depends on the task alone and appears once. Raises ConfigError for an unknown statistic.
    """
    rows, predictors = [], _predictors(results)
    for (task, mode, agent, trajectories, control_of), members in sorted(cells(results).items()):
        episodes = [len(returns) for returns in _returns(members).values()]
        estimates: dict[tuple[float, ...], Estimate] = {}
        for statistic in statistics:
            values = reduced(members, statistic)
            numbers = tuple(values.values())
            if numbers not in estimates:  # with one episode per goal, all four statistics are equal
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
                    predicted=_predicted(predictors, members[0]),
                    control_of=control_of,
                )
            )
    return rows


def write_summary(path: Path, rows: Sequence[SummaryRow]) -> None:
    """Writes summary.csv: a header and one line per row. Numbers have 6 significant digits. A missing interval is
    "nan", a missing prediction an empty field."""
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
    """Returns the caveats about these rows, one sentence or more each."""
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
    """Returns the expected largest return of `draws` independent episodes of a policy that learns nothing from its
    context, estimated from the context-free episodes among `results`. The intervals are over these episodes.

    Episodes of all goals are pooled. Where some goals are easier than others, this overestimates the expected maximum,
    so a curve above this line is above the true one as well. Raises ConfigError when there are fewer context-free
    episodes than `draws`.
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


def _predictors(results: Sequence[Result]) -> dict[Player, Predictor | None]:
    """Returns the predictor (`agents.prediction`) for each player with predictable results."""
    by_player: dict[Player, list[Result]] = {}
    for result in results:
        if is_predicted(result):
            by_player.setdefault(player(result), []).append(result)
    return {key: make_predictor(members) for key, members in by_player.items()}


def _predicted(predictors: dict[Player, Predictor | None], member: Result) -> float:
    if member.met == ALWAYS:
        return math.nan  # the predictions are made from these results
    found = predictors.get(player(member)) if is_predicted(member) else None
    return math.nan if found is None else found.predict(member)


def _returns(results: Sequence[Result]) -> dict[Goal, list[float]]:
    """Returns the episode returns of each goal, in the order of play."""
    goals: dict[Goal, list[float]] = {}
    for result in sorted(results, key=lambda result: (result.goal[:3], result.episode_index)):
        goals.setdefault(result.goal, []).append(result.return_)
    return goals


def reduced(results: Sequence[Result], statistic: str) -> dict[Goal, float]:
    """Returns the statistic of each goal's episode returns. Raises ConfigError for an unknown statistic."""
    if statistic not in STATISTICS:
        raise ConfigError(f"unknown statistic {statistic!r}; choose from {', '.join(STATISTICS)}")
    return {goal: _REDUCTIONS[statistic](returns) for goal, returns in _returns(results).items()}


def strata_of(values: Mapping[Goal, float]) -> Strata:
    """Returns the bootstrap strata, one per training seed: values [goals], or [worlds, queries] padded with NaN."""
    seeds: dict[int, dict[tuple[int, int], list[float]]] = {}
    for goal, value in values.items():
        seeds.setdefault(goal.seed, {}).setdefault(goal.unit, []).append(value)
    width = max(len(unit) for units in seeds.values() for unit in units.values())
    if width == 1:
        return [np.array([value for (value,) in seeds[seed].values()]) for seed in sorted(seeds)]
    return [
        np.array([unit + [math.nan] * (width - len(unit)) for unit in seeds[seed].values()]) for seed in sorted(seeds)
    ]
