"""Comparisons between contexts: whether returns rise with the history, and whether they rise as predicted.

All comparisons are paired: both sides have the same goals (in map tasks, the same queries) and training seeds, so that
differences in difficulty between goals cancel.
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
    """slope: rise of the mean return per doubling of the history. p_value: one-sided, from a permutation test."""

    slope: float
    p_value: float


class Compared(NamedTuple):
    """One context of an agent, compared with no context."""

    agent: str
    task: str
    context_trajectories: int
    context_tokens: int
    more: Interval
    """Mean return minus the mean return without history, paired by goal."""
    beyond: Interval | None
    """Mean return minus the predicted one, as a share of known - prior (`excess_over_prediction`)."""
    rise: Trend | None
    """The trend over all contexts of the agent."""


def compared(results: Sequence[Result], *, resamples: int = RESAMPLES) -> list[Compared]:
    """Returns the comparison of every prompted context with no context, agent by agent, named as in the summary.
    Contexts whose goals were not also evaluated without history are left out."""
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
    beyond = excess_over_prediction(whole, members, resamples=resamples) if is_predicted(members[0]) else None
    tokens = round(float(np.mean([result.context_tokens for result in members])))
    more = difference(members, none, resamples=resamples)
    return Compared(agent, members[0].task, members[0].context_trajectories, tokens, more, beyond, rise)


def difference(a: Sequence[Result], b: Sequence[Result], *, resamples: int = RESAMPLES) -> Interval:
    """Returns the mean return of `a` minus that of `b`, paired by goal, with its 95 % interval.

    Raises ConfigError when `a` and `b` do not have the same goals and seeds.
    """
    ours, theirs = reduced(a, "mean"), reduced(b, "mean")
    if not ours or ours.keys() != theirs.keys():
        raise ConfigError(
            f"a difference needs the same goals and seeds on both sides; got {len(ours)} and {len(theirs)}, of which "
            f"{len(ours.keys() & theirs.keys())} are shared. Evaluate both contexts with the same groups and seeds."
        )
    return _mean({goal: ours[goal] - theirs[goal] for goal in ours}, resamples)


def excess_over_prediction(
    results: Sequence[Result], one: Sequence[Result], *, resamples: int = RESAMPLES
) -> Interval | None:
    """Returns the mean return of one context minus that of a perfect memory (`agents.prediction`), as a share of
    known - prior, with its 95 % interval. None where prior or known was not measured for the same goals, and for rare
    goals, where results do not say how many trajectories of the context reached the goal.

    Args:
        results: all results of the agent on this task, those of `one` included.
        one: the results of the context.

    Prior and known are measured on the same goals and resampled together with them. So is whether the history holds the
    queried place, where the results say so.
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
    """Returns how the mean return of one agent rises with its history, tested by permuting the contexts within every
    goal (in map tasks, within every world). None where there are no two contexts with the same goals.

    The slope is a least-squares fit over log2(1 + trajectories), which is defined for an empty history too.
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
    """Returns the share of permutations within units that rise as steeply as the data; the data count as one."""
    random, measured = np.random.default_rng(0), float((units @ x).sum())
    steep = 0
    for _ in range(permutations):
        steep += float((random.permuted(units, axis=1) @ x).sum()) >= measured - 1e-9 * abs(measured)
    return (1 + steep) / (1 + permutations)


def _mean(values: dict[Goal, float], resamples: int) -> Interval:
    return intervals(strata_of(values), [mean_weights], resamples=resamples)[0]
