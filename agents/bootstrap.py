"""Interquartile means and expected maxima of numbers, and bootstrap intervals around them.

Every statistic here is a weighted mean of the *sorted* values (an L-statistic), so a resample is sorted once for all of
them. Interquartile mean and stratified bootstrap follow Agarwal et al. 2021 (arXiv:2108.13264).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

RESAMPLES = 10_000
CHUNK = 1 << 20  # values resampled at a time: 8 MB

Weights = Callable[[int], Float[np.ndarray, " n"]]  # number of values -> the weight of each when sorted
Strata = Sequence[Float[np.ndarray, "goals"] | Float[np.ndarray, "worlds queries"]]
"""One array per training seed: a value per goal, or in map tasks a row per world. Worlds are drawn as a whole, since
their queries share a history. NaN marks a missing value."""


class Interval(NamedTuple):
    """A number and its 95 % percentile bootstrap interval. low and high are NaN where there is nothing to resample."""

    value: float
    low: float
    high: float


class Estimate(NamedTuple):
    """Interquartile mean and mean of the same values.

    over: what was resampled: "goals" or "worlds", "seeds", both (such as "goals and seeds"), "episodes" or "nothing".
    The intervals cover no other variation.
    """

    iqm: Interval
    mean: Interval
    over: str


def mean_weights(n: int) -> Float[np.ndarray, " n"]:
    """Returns the weights of the mean, 1/n each."""
    return np.full(n, 1 / n)


def interquartile_weights(n: int) -> Float[np.ndarray, " n"]:
    """Returns the weights of the interquartile mean: the lowest and the highest n // 4 values have weight 0, as in
    scipy.stats.trim_mean(values, 0.25).
    """
    cut = n // 4
    weights = np.zeros(n)
    weights[cut : n - cut] = 1 / (n - 2 * cut)
    return weights


def maximum_weights(n: int, draws: int) -> Float[np.ndarray, " n"]:
    """Returns the probability of each of n sorted values to be the largest of `draws` drawn without replacement:
    C(i-1, draws-1) / C(n, draws) for the i-th. The weighted mean is the unbiased estimate of the expected maximum.
    Needs 1 <= draws <= n.
    """
    assert 1 <= draws <= n, (draws, n)
    rank = np.arange(n, draws, -1, dtype=np.float64)
    from_the_largest = np.cumprod(np.concatenate([[draws / n], (rank - draws) / (rank - 1)]))
    return np.concatenate([np.zeros(draws - 1), from_the_largest[::-1]])


def interquartile_maximum_weights(n: int, draws: int) -> Float[np.ndarray, " n"]:
    """Returns the weights of the interquartile mean of the maximum of `draws`: the middle half of its distribution."""
    edges = np.concatenate([[0.0], np.cumsum(maximum_weights(n, draws))])
    return np.diff(np.clip(edges, 0.25, 0.75)) / 0.5


def bootstrap(
    strata: Strata, weights: Sequence[Weights], *, resample_seeds: bool = True, resamples: int = RESAMPLES
) -> Float[np.ndarray, "statistics resamples"]:
    """Returns each statistic of every resample. Stratum s holds one value for every goal of training seed s.

    Goals (in map tasks, worlds) are drawn with replacement within each seed, as many as the seed has. All seeds of a
    resample share the draw. Where the seeds were tested on the same goals, their values are correlated, and independent
    draws would give too narrow an interval; where the goals differ, sharing changes nothing on average. Seeds are drawn
    with replacement too, unless `resample_seeds` is False: the interval then holds for these seeds only.

    The random numbers depend on the shapes alone, so equal values give equal intervals.
    """
    draws = _draws(strata, resample_seeds, resamples)
    return np.concatenate([_weigh(_take(strata, draw), weights) for draw in draws], axis=1)


def intervals(
    strata: Strata, weights: Sequence[Weights], *, resample_seeds: bool = True, resamples: int = RESAMPLES
) -> list[Interval]:
    """Returns each statistic of all values together, with its interval (see `bootstrap`)."""
    values = _weigh(_whole(strata), weights)[:, 0]
    if resampled_parts(strata, resample_seeds) == "nothing":
        return [Interval(float(value), np.nan, np.nan) for value in values]
    resampled = bootstrap(strata, weights, resample_seeds=resample_seeds, resamples=resamples)
    lows, highs = np.quantile(resampled, [0.025, 0.975], axis=1)
    return [Interval(*map(float, numbers)) for numbers in zip(values, lows, highs, strict=True)]


def estimate(strata: Strata, *, resample_seeds: bool = True, resamples: int = RESAMPLES) -> Estimate:
    """Returns the interquartile mean and the mean over all goals and seeds, with 95 % intervals (see `bootstrap`)."""
    weights = (interquartile_weights, mean_weights)
    iqm, mean = intervals(strata, weights, resample_seeds=resample_seeds, resamples=resamples)
    return Estimate(iqm, mean, resampled_parts(strata, resample_seeds))


def resampled_parts(strata: Strata, resample_seeds: bool) -> str:
    """Returns what a bootstrap of these strata resamples: "goals" or "worlds", "seeds", both, or "nothing"."""
    parts = []
    if max(len(stratum) for stratum in strata) > 1:
        parts.append("goals" if strata[0].ndim == 1 else "worlds")
    if resample_seeds and len(strata) > 1:
        parts.append("seeds")
    return " and ".join(parts) or "nothing"


class _Draw(NamedTuple):
    seed: Int[np.ndarray, "chunk seeds"]
    place: Float[np.ndarray, "chunk goals"]  # in [0, 1): position in a stratum, as a share of its length


def _draws(strata: Strata, resample_seeds: bool, resamples: int) -> Iterator[_Draw]:
    random = np.random.default_rng(0)
    seeds, goals = len(strata), max(len(stratum) for stratum in strata)
    chunk = max(1, CHUNK // (seeds * goals * strata[0][:1].size))
    for start in range(0, resamples, chunk):
        rows = min(chunk, resamples - start)
        seed = random.integers(seeds, size=(rows, seeds)) if resample_seeds else np.tile(np.arange(seeds), (rows, 1))
        yield _Draw(seed, random.random((rows, goals)))


def _take(strata: Strata, draw: _Draw) -> Float[np.ndarray, "chunk values"]:
    """Returns the resampled values, each row sorted. Rows end with NaN where a drawn seed has fewer goals than the
    largest stratum.
    """
    sizes = np.array([len(stratum) for stratum in strata])
    start = np.cumsum(sizes) - sizes
    drawn_sizes = sizes[draw.seed][:, :, None]
    places = (draw.place[:, None, :] * drawn_sizes).astype(np.int32)
    values = np.concatenate(strata)[start[draw.seed][:, :, None] + places]
    if sizes.min() < sizes.max():
        values[np.broadcast_to(np.arange(sizes.max()) >= drawn_sizes, places.shape)] = np.nan
    return np.sort(values.reshape(len(values), -1), axis=1)


def _whole(strata: Strata) -> Float[np.ndarray, "1 values"]:
    return np.sort(np.concatenate(strata), axis=None)[None]


def _weigh(
    values: Float[np.ndarray, "rows values"], weights: Sequence[Weights]
) -> Float[np.ndarray, "statistics rows"]:
    """Returns the weighted means of each sorted row, NaN excluded."""
    counts = np.isfinite(values).sum(axis=1)
    means = np.empty((len(weights), len(values)))
    for count in np.unique(counts):
        rows = counts == count
        means[:, rows] = np.stack([weight(int(count)) for weight in weights]) @ values[rows, :count].T
    return means
