"""Differences between contexts of the same goals, how far from the prediction they are, and whether they rise."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from agents.cli import ConfigError
from agents.comparisons import compared, difference, excess_over_prediction, trend


@pytest.fixture
def played(episodes):
    """Gives a function `(returns, *, seen, ...)` of results on a map, four queries a world."""
    return lambda returns, *, seen, places=64, context=None: episodes(
        returns, trajectories=seen, places=places, queries=4, context=context
    )


def of_goals(results):
    return [replace(result, places=0, world=None) for result in results]


@pytest.fixture
def hard():
    """How much easier each of 64 queries is than others."""
    return np.random.default_rng(0).uniform(0, 10, 64)


def test_what_makes_a_goal_easy_drops_out(played, hard):
    noise = np.random.default_rng(1).normal(0, 0.3, 64)
    found = difference(played(hard + 1 + noise, seen=64), played(hard, seen=0))
    assert found.value == pytest.approx(1 + noise.mean())
    assert 0.05 < found.high - found.low < 0.3  # unpaired it would be 2
    with pytest.raises(ConfigError, match=r"got 64 and 63, of which 63 are shared"):
        difference(played(hard, seen=64), played(hard[:63], seen=0))


def test_the_interval_of_a_difference_is_that_of_a_paired_t_test(played, hard):
    noise = np.random.default_rng(2).normal(0.5, 1, 64)
    found = difference(of_goals(played(hard + noise, seen=64)), of_goals(played(hard, seen=0)))
    want = ttest_1samp(noise, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx(tuple(want), abs=0.05)


def test_who_follows_the_line_has_no_gap(played, hard):
    """Of every query a share of M = 256 is known exactly; what half a memory lacks is seen."""
    random = np.random.default_rng(3)
    prior, known = hard * 0.3, hard * 0.3 + random.uniform(2, 6, 64)
    results = played(prior, seen=0) + played(known, seen=64) + played(prior, seen=0, places=256)
    middle = played(prior + 0.5 * (known - prior), seen=128, places=256)
    results += middle + played(prior, seen=64, context="foreign")
    assert excess_over_prediction(results, middle) == pytest.approx((0, 0, 0), abs=1e-6)
    forgetful = played(prior + 0.25 * (known - prior), seen=128, places=256)
    assert excess_over_prediction(results, forgetful) == pytest.approx((-0.25, -0.25, -0.25), abs=0.05)
    assert excess_over_prediction([result for result in results if result.context_trajectories], middle) is None


def test_what_was_seen_counts_where_the_results_say_so(played, hard):
    """Of 64 queries the history holds what 20 ask for, by chance fewer than half: no gap of who forgets nothing."""
    prior, known = hard * 0.3, hard * 0.3 + 4
    ages = np.random.default_rng(5).permutation(np.r_[np.arange(20), np.arange(128, 172)])
    results = played(prior, seen=0) + played(known, seen=64)
    some = played(np.where(ages < 128, known, prior), seen=128, places=256)
    told = [replace(result, age=int(age)) for result, age in zip(some, ages, strict=True)]
    assert excess_over_prediction(results + some, some).value == pytest.approx(20 / 64 - 0.5, abs=1e-6)
    assert excess_over_prediction(results + told, told) == pytest.approx((0, 0, 0), abs=1e-6)
    forgets_the_oldest = [
        r if r.age < 10 or r.age >= 128 else replace(r, return_=p) for r, p in zip(told, prior, strict=True)
    ]
    assert excess_over_prediction(results + told, forgets_the_oldest).value == pytest.approx(-10 / 64, abs=1e-6)


def test_a_rise_is_told_from_none(played, hard):
    random = np.random.default_rng(4)

    def curve(slope):
        contexts = (0, 16, 32, 64)
        noise = random.normal(0, 1, (4, 64))
        return [
            result
            for own, seen in zip(noise, contexts, strict=True)
            for result in played(hard + own + slope * np.log2(seen + 1), seen=seen)
        ]

    steep = trend(curve(0.3))
    assert steep.slope == pytest.approx(0.3, abs=0.12)
    assert steep.p_value < 0.01
    flat = [trend(curve(0.0), permutations=200).p_value for _ in range(40)]
    assert 0.25 < np.mean(flat) < 0.75
    assert np.mean(np.array(flat) < 0.1) < 0.3
    assert trend(played(hard, seen=0)) is None


def test_every_context_stands_beside_none(played, hard):
    results = played(hard * 0.3, seen=0) + played(hard * 0.3 + 3, seen=64) + played(hard * 0.3 + 1.5, seen=32)
    results += played(hard * 0.3 + 0.1, seen=64, context="foreign") + played(hard[:8], seen=16)
    half, whole, foreign = compared(results)
    assert (half.agent, half.context_trajectories, half.context_tokens) == ("at, 64 places", 32, 512)
    assert half.more == pytest.approx((1.5, 1.5, 1.5))
    assert half.beyond == pytest.approx((0, 0, 0), abs=1e-6)
    assert whole.beyond == pytest.approx((0, 0, 0), abs=1e-6)
    assert foreign.agent == "at, 64 places (foreign context)"
    assert foreign.more == pytest.approx((0.1, 0.1, 0.1))
    assert foreign.beyond is None
    assert foreign.rise is None
