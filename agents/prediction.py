"""What a memory that forgets nothing would earn, with nothing fitted.

On a map each of a world's M places was visited once; having seen the last n visits, the agent is asked about any of
the M. In the dark with rare goals each of the n trajectories of a context has met the goal with chance p:

    map    return(n) = prior + (known - prior) * n / M
    rare   return(n) = sum_k C(n, k) p^k (1 - p)^(n - k) r(k)

prior, r(0): measured without history. known: measured where all of the smallest world was seen. r(k): measured with k
trajectories that all have met the goal (p = 1), and between two such k on a straight line over log(1 + k); where that
was not measured, r is `known` from the first meeting on, measured where at least 99 of 100 contexts hold one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binom

from agents.results import Result

CERTAIN = 0.99
ALWAYS = 1.0  # the chance of a meeting with which r(k) is measured


@dataclass(frozen=True, slots=True)
class Line:
    """What was measured of an agent, from which all else follows. meetings: (k, r(k)), k rising from 0."""

    prior: float
    known: float
    meetings: tuple[tuple[int, float], ...] = ()

    def at(self, share: float) -> float:
        """Returns the return where the goal is in the history of such a share of the episodes."""
        return self.prior + (self.known - self.prior) * share

    def of(self, result: Result) -> float:
        """Returns the return of a predicted result, on average."""
        seen = result.context_trajectories
        if result.places or not self.meetings:
            return self.at(share_known(result))
        met = np.arange(seen + 1)
        numbers, returns = np.array(self.meetings).T
        return float(binom.pmf(met, seen, result.met) @ np.interp(np.log1p(met), np.log1p(numbers), returns))


def is_predicted(result: Result) -> bool:
    """Whether it is known how often the goal is in a history such as this result's."""
    return result.context != "foreign" and bool(result.places or result.met)


def share_known(result: Result) -> float:
    """Returns the chance that the goal is in the history of a predicted result."""
    seen = result.context_trajectories
    return seen / result.places if result.places else 1.0 - (1.0 - result.met) ** seen


def is_known(result: Result) -> float:
    """Returns whether the goal is in the history of a predicted result, 1 or 0; its chance where the result does not
    say."""
    return share_known(result) if result.age is None else float(result.age < result.context_trajectories)


def line(results: Sequence[Result]) -> Line | None:
    """Returns the line of an agent's results on one task; None where prior or known was not measured."""
    predicted = [result for result in results if is_predicted(result)]
    smallest = min((result.places for result in predicted), default=0)
    prior = [result.return_ for result in predicted if result.context_trajectories == 0]
    known = [result.return_ for result in predicted if result.places == smallest and share_known(result) >= CERTAIN]
    if not (prior and known):
        return None
    return Line(float(np.mean(prior)), float(np.mean(known)), _meetings(predicted, float(np.mean(prior))))


def _meetings(results: Sequence[Result], prior: float) -> tuple[tuple[int, float], ...]:
    """Returns (k, r(k)) where contexts of trajectories that all have met the goal were measured."""
    found: dict[int, list[float]] = {}
    for result in results:
        if result.met == ALWAYS and result.context_trajectories:
            found.setdefault(result.context_trajectories, []).append(result.return_)
    measured = sorted((number, float(np.mean(returns))) for number, returns in found.items())
    return ((0, prior), *measured) if measured else ()
