"""Is more history better, and as much better as it must be? Differences between contexts that were asked the same.

All compare returns of the same goals (of a map, of the same queries) under the same training seeds, so that what makes
one goal easier than another drops out.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from agents.bootstrap import RESAMPLES, Interval, intervals, mean_weights
from agents.cells import cells, player
from agents.cli import ConfigError
from agents.prediction import CERTAIN, is_known, is_predicted, share_known
from agents.results import Goal, Result
from agents.statistics import reduced, strata_of

PERMUTATIONS = 10_000


class Trend(NamedTuple):
    """How much the mean return rises when the history doubles, and the chance of as steep a rise by luck."""

    slope: float
    p_value: float


class Compared(NamedTuple):
    """One context of an agent beside none."""

    agent: str
    task: str
    context_trajectories: int
    context_tokens: int
    more: Interval
    """Mean return less that without history, paired by goal."""
    beyond: Interval | None
    """Mean return less the predicted one, in shares of known - prior (`gap`)."""
    rise: Trend | None
    """Of all contexts of the agent together."""


def compared(results: Sequence[Result], *, resamples: int = RESAMPLES) -> list[Compared]:
    """Returns every prompted context beside none, agent by agent as the summary calls them; those alone whose goals
    were asked without history too."""
    curves: dict[tuple[str, str, str], dict[int, list[Result]]] = {}
    for (task, mode, agent, seen, control_of), members in sorted(cells(results).items()):
        if mode == "prompted":
            curves.setdefault((task, agent, control_of), {})[seen] = members
    rows = []
    for (task, agent, control_of), curve in curves.items():
        reference = curves.get((task, control_of or agent, ""), {})
        rise = trend([result for members in curve.values() for result in members])
        rows += [
            _beside(agent, members, reference[0], results, rise, resamples)
            for seen, members in sorted(curve.items())
            if seen and 0 in reference and _asked(members) == _asked(reference[0])
        ]
    return rows


def _asked(results: Sequence[Result]) -> set[Goal]:
    return {result.goal for result in results}


def _beside(
    agent: str, members: list[Result], none: list[Result], results: Sequence[Result], rise: Trend | None, resamples: int
) -> Compared:
    whole = [result for result in results if player(result) == player(members[0]) and result.mode == "prompted"]
    beyond = gap(whole, members, resamples=resamples) if is_predicted(members[0]) else None
    tokens = round(float(np.mean([result.context_tokens for result in members])))
    more = difference(members, none, resamples=resamples)
    return Compared(agent, members[0].task, members[0].context_trajectories, tokens, more, beyond, rise)


def difference(a: Sequence[Result], b: Sequence[Result], *, resamples: int = RESAMPLES) -> Interval:
    """Returns the mean return of `a` less that of `b`, paired by goal, with its 95 % interval.

    ConfigError when `a` has other goals or seeds than `b`.
    """
    ours, theirs = reduced(a, "mean"), reduced(b, "mean")
    if not ours or ours.keys() != theirs.keys():
        raise ConfigError(
            f"a difference needs the same goals and seeds on both sides; got {len(ours)} and {len(theirs)}, of which "
            f"{len(ours.keys() & theirs.keys())} are shared. Evaluate both contexts with the same groups and seeds."
        )
    return _mean({goal: ours[goal] - theirs[goal] for goal in ours}, resamples)


def gap(results: Sequence[Result], one: Sequence[Result], *, resamples: int = RESAMPLES) -> Interval | None:
    """Returns the mean return of `one` context less that of a memory that forgets nothing (`agents.prediction`), in
    shares of known - prior, with its 95 % interval; None where prior or known was not measured for the same goals, and
    for rare goals, of which no result says how many of its context have met them.

    results: all of the agent on this task, `one` among them. Prior and known are those of the very goals asked, and are
    drawn with them; and so, where the results say so, is whether the history holds what was asked.
    """
    if any(result.met for result in one):
        return None
    smallest = min(result.places for result in results)
    without = [r for r in results if r.context_trajectories == 0]
    whole = [r for r in results if r.places == smallest and r.context == "own" and share_known(r) >= CERTAIN]
    prior, known, measured = (reduced(part, "mean") for part in (without, whole, one))
    if not measured or not measured.keys() <= prior.keys() & known.keys():
        return None
    share = {result.goal: is_known(result) for result in one}
    scale = float(np.mean([known[key] - prior[key] for key in measured]))
    if scale <= 0:
        return None
    beyond = {key: (measured[key] - prior[key] - share[key] * (known[key] - prior[key])) / scale for key in measured}
    return _mean(beyond, resamples)


def trend(results: Sequence[Result], *, permutations: int = PERMUTATIONS) -> Trend | None:
    """Returns how the mean return of one agent rises with its history, tested by permuting the contexts of every goal
    (of a map, of every world); None where there are not two contexts of the same goals.

    The slope is by least squares over log2(1 + trajectories), so that no history has a place on the axis.
    """
    contexts: dict[int, list[Result]] = {}
    for result in results:
        contexts.setdefault(result.context_trajectories, []).append(result)
    values = {seen: reduced(members, "mean") for seen, members in sorted(contexts.items())}
    shared = sorted(set.intersection(*(set(of) for of in values.values()))) if values else []
    if len(values) < 2 or not shared:
        return None
    x = np.log2([seen + 1 for seen in values])
    x -= x.mean()
    columns = [strata_of({goal: of[goal] for goal in shared}) for of in values.values()]
    units = np.stack([np.concatenate([_summed(part) for part in column]) for column in columns], axis=1)
    return Trend(float(units.sum(axis=0) @ x / (x @ x) / len(shared)), _p_value(units, x, permutations))


def _summed(part: Float[np.ndarray, "..."]) -> Float[np.ndarray, " units"]:
    return part if part.ndim == 1 else np.nansum(part, axis=1)


def _p_value(units: Float[np.ndarray, "units contexts"], x: Float[np.ndarray, " contexts"], permutations: int) -> float:
    """Returns the share of permutations of each unit's values that rise as steeply as they are, themselves counted."""
    random, measured = np.random.default_rng(0), float((units @ x).sum())
    steep = 0
    for _ in range(permutations):
        steep += float((random.permuted(units, axis=1) @ x).sum()) >= measured - 1e-9 * abs(measured)
    return (1 + steep) / (1 + permutations)


def _mean(values: dict[Goal, float], resamples: int) -> Interval:
    return intervals(strata_of(values), [mean_weights], resamples=resamples)[0]
