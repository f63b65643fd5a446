"""What a memory that forgets nothing would earn, with nothing fitted.

On a map each of a world's M places was visited once; having seen the last n visits, the agent is asked about any of
the M. In the dark with rare goals each of the n trajectories of a context has met the goal with chance p:

    map    return(n) = prior + (known - prior) * n / M
    rare   return(n) = prior + (known - prior) * (1 - (1 - p)^n)

prior: measured without history. known: measured where the goal is in the history: where all of the smallest world was
seen; where, of all chances, at least 99 of 100 contexts hold it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from agents.results import Result

CERTAIN = 0.99


@dataclass(frozen=True, slots=True)
class Line:
    """The two numbers of an agent, measured, from which all others follow."""

    prior: float
    known: float

    def at(self, share: float) -> float:
        """Returns the return where the goal is in the history of such a share of the episodes."""
        return self.prior + (self.known - self.prior) * share


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
    return Line(float(np.mean(prior)), float(np.mean(known))) if prior and known else None
