"""What a perfect memory would earn on a map, with nothing fitted.

Each of a world's M places was visited once; having seen the last n visits, the agent is asked about any of the M:

    return(n) = prior + (known - prior) * n / M

prior: measured with no history. known: measured where all of the smallest world was seen.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from agents.results import Result


@dataclass(frozen=True, slots=True)
class Line:
    """The two numbers of an agent, measured, from which all others follow."""

    prior: float
    known: float
    places: int  # of the world in which `known` was measured

    def at(self, seen: int, places: int) -> float:
        """Returns the return of an agent that has seen so many of so many places and forgets none."""
        return self.prior + (self.known - self.prior) * seen / places


def line(results: Sequence[Result]) -> Line | None:
    """Returns the line of an agent's results on one map; None where prior or known was not measured."""
    own = [result for result in results if result.places and result.context != "foreign"]
    smallest = min((result.places for result in own), default=0)
    prior = [result.return_ for result in own if result.context_trajectories == 0]
    known = [result.return_ for result in own if result.context_trajectories == result.places == smallest]
    return Line(float(np.mean(prior)), float(np.mean(known)), smallest) if prior and known else None
