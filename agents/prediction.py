"""The return that a perfect memory would earn, predicted from measured returns without any fit.

In map tasks, each of a world's M places was visited once. The agent has seen the last n visits, and is queried about
any of the M places. In tasks with rare hidden goals, each of the n trajectories of a context has reached the goal with
probability p:

    map    return(n) = prior + (known - prior) * n / M
    rare   return(n) = sum_k C(n, k) p^k (1 - p)^(n - k) r(k)

prior = r(0) is the return measured without history. known is the return measured with a history of the whole smallest
world; for rare goals, with contexts that hold the goal with probability 0.99 or more. r(k) is the return measured with
k trajectories that all have reached the goal (p = 1), interpolated linearly over log(1 + k). Where that was not
measured, r(k) = known for all k >= 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binom

from agents.results import Result

CERTAIN = 0.99
ALWAYS = 1.0  # the value of `met` with which r(k) is measured


@dataclass(frozen=True, slots=True)
class Predictor:
    """The measured returns of an agent that predictions follow from. meetings: (k, r(k)), k ascending from 0."""

    prior: float
    known: float
    meetings: tuple[tuple[int, float], ...] = ()

    def at_share(self, share: float) -> float:
        """Returns the predicted mean return when a share `share` of the episodes have the goal in their history."""
        return self.prior + (self.known - self.prior) * share

    def predict(self, result: Result) -> float:
        """Returns the predicted mean return under the context of a result (`is_predicted`)."""
        seen = result.context_trajectories
        if result.places or not self.meetings:
            return self.at_share(share_known(result))
        met = np.arange(seen + 1)
        numbers, returns = np.array(self.meetings).T
        return float(binom.pmf(met, seen, result.met) @ np.interp(np.log1p(met), np.log1p(numbers), returns))


def is_predicted(result: Result) -> bool:
    """Whether the probability that the history holds the goal is known for this result."""
    return result.context != "foreign" and bool(result.places or result.met)


def share_known(result: Result) -> float:
    """Returns the probability that the goal is in the history of a result (`is_predicted`)."""
    seen = result.context_trajectories
    return seen / result.places if result.places else 1.0 - (1.0 - result.met) ** seen


def is_known(result: Result) -> float:
    """Returns 1 if the goal is in the history of a result (`is_predicted`), else 0; its probability where the result
    does not say."""
    return share_known(result) if result.age is None else float(result.age < result.context_trajectories)


def make_predictor(results: Sequence[Result]) -> Predictor | None:
    """Returns the predictor from an agent's results on one task, or None where prior or known was not measured."""
    predicted = [result for result in results if is_predicted(result)]
    smallest = min((result.places for result in predicted), default=0)
    prior = [result.return_ for result in predicted if result.context_trajectories == 0]
    known = [result.return_ for result in predicted if result.places == smallest and share_known(result) >= CERTAIN]
    if not (prior and known):
        return None
    return Predictor(float(np.mean(prior)), float(np.mean(known)), _meetings(predicted, float(np.mean(prior))))


def _meetings(results: Sequence[Result], prior: float) -> tuple[tuple[int, float], ...]:
    """Returns the (k, r(k)) measured with contexts whose trajectories all have reached the goal."""
    found: dict[int, list[float]] = {}
    for result in results:
        if result.met == ALWAYS and result.context_trajectories:
            found.setdefault(result.context_trajectories, []).append(result.return_)
    measured = sorted((number, float(np.mean(returns))) for number, returns in found.items())
    return ((0, prior), *measured) if measured else ()
