import itertools

import numpy as np
import pytest
from scipy.stats import norm, trim_mean

from agents import bootstrap
from agents.bootstrap import (
    estimate,
    interquartile_maximum_weights,
    interquartile_weights,
    maximum_weights,
    mean_weights,
)

# ------------------------------------------------------------------------------------------------------- weighted means


def interquartile_mean(values: np.ndarray) -> float:
    return float(np.sort(values) @ interquartile_weights(len(values)))


def expected_maximum(values: np.ndarray, draws: int) -> float:
    return float(np.sort(values) @ maximum_weights(len(values), draws))


def test_interquartile_mean_by_hand():
    assert interquartile_mean(np.array([100.0, 1, 2, 3, 4, 5, 6, -50])) == pytest.approx((2 + 3 + 4 + 5) / 4)
    assert interquartile_mean(np.array([7.0, 1, 4])) == pytest.approx(4.0)  # fewer than 4: nothing is cut
    assert interquartile_mean(np.array([0.0, 0, 0, 0, 0, 0, 9, 9])) == 0.0  # sparse returns: the mean is 2.25


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 8, 48, 101])
def test_interquartile_mean_is_the_trimmed_mean_of_scipy(n: int):
    values = np.random.default_rng(n).normal(size=n)
    assert interquartile_mean(values) == pytest.approx(trim_mean(values, 0.25))


@pytest.mark.parametrize("draws", [1, 2, 3, 5])
def test_expected_maximum_is_the_mean_over_all_subsets(draws: int):
    values = np.array([3.0, -1.0, 4.0, 1.0, 5.5])
    subsets = [max(subset) for subset in itertools.combinations(values, draws)]
    assert expected_maximum(values, draws) == pytest.approx(np.mean(subsets))


@pytest.mark.parametrize(("draws", "expected"), [(1, 0.0), (4, 1.0294), (8, 1.4236), (32, 2.0697), (128, 2.5946)])
def test_expected_maximum_of_normals(draws: int, expected: float):
    quantiles = norm.ppf((np.arange(100_000) + 0.5) / 100_000)
    assert expected_maximum(quantiles, draws) == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize("n", [1, 4, 9, 2000])
def test_weights_sum_to_one(n: int):
    draws = min(n, 4)
    for weights in (
        mean_weights(n),
        interquartile_weights(n),
        maximum_weights(n, draws),
        interquartile_maximum_weights(n, draws),
    ):
        assert weights.shape == (n,)
        assert weights.sum() == pytest.approx(1.0)
        assert weights.min() >= 0


def test_interquartile_maximum_of_uniforms():
    # The maximum of 2 uniforms has the distribution function x^2: its middle half lies between 1/2 and sqrt(3)/2, and
    # its mean there is 2 * integral of 2 x^2 = (4/3) (3 sqrt(3)/8 - 1/8).
    values = (np.arange(20_000) + 0.5) / 20_000
    expected = 4 / 3 * (3 * np.sqrt(3) / 8 - 1 / 8)
    assert values @ interquartile_maximum_weights(20_000, 2) == pytest.approx(expected, abs=1e-4)


# ------------------------------------------------------------------------------------------------------------ bootstrap


def test_resamples_of_two_values_are_binomial():
    means = bootstrap.bootstrap([np.array([0.0, 1.0])], [mean_weights], resamples=40_000)[0]
    shares = [np.mean(means == value) for value in (0.0, 0.5, 1.0)]
    assert shares == pytest.approx([0.25, 0.5, 0.25], abs=0.01)


@pytest.mark.parametrize("which", ["iqm", "mean"])
def test_intervals_cover_the_truth_as_often_as_they_say(which: str):
    random = np.random.default_rng(1)
    trials = 500
    hits = 0
    for _ in range(trials):
        _, low, high = getattr(estimate([random.normal(size=48)], resamples=1000), which)
        hits += low <= 0 <= high
    assert 0.91 <= hits / trials <= 0.98


def test_the_standard_error_of_the_mean_is_the_known_one():
    values = np.random.default_rng(0).normal(size=200)
    means = bootstrap.bootstrap([values], [mean_weights], resamples=20_000)[0]
    assert means.std() == pytest.approx(values.std() / np.sqrt(200), rel=0.03)


def test_goals_are_drawn_within_their_seed():
    # Each seed always returns its own constant: resampling goals within seeds changes nothing, whatever their number.
    strata = [np.full(6, 1.0), np.full(10, 5.0)]
    drawn = bootstrap.bootstrap(strata, [mean_weights], resample_seeds=False, resamples=500)
    np.testing.assert_allclose(drawn, (6 * 1.0 + 10 * 5.0) / 16)
    fixed = estimate(strata, resample_seeds=False)
    assert fixed.over == "goals"
    assert fixed.mean.low == pytest.approx(fixed.mean.high)


def test_seeds_are_drawn_too():
    strata = [np.full(8, 1.0), np.full(8, 5.0)]
    both = estimate(strata)
    assert both.over == "goals and seeds"
    assert (both.mean.low, both.mean.value, both.mean.high) == pytest.approx((1.0, 3.0, 5.0))


def test_seeds_tested_on_the_same_goals_are_not_independent():
    goals = np.random.default_rng(3).normal(size=50)
    one = estimate([goals])
    copies = estimate([goals, goals, goals, goals])
    assert copies.mean.high - copies.mean.low == pytest.approx(one.mean.high - one.mean.low, rel=0.05)


def test_independent_seeds_narrow_the_interval():
    random = np.random.default_rng(4)
    strata = [random.normal(size=100) for _ in range(4)]
    means = bootstrap.bootstrap(strata, [mean_weights], resample_seeds=False)[0]
    assert means.std() == pytest.approx(1 / np.sqrt(400), rel=0.15)


def test_unequal_seeds_keep_their_sizes():
    counted = bootstrap.bootstrap(
        [np.zeros(3), np.ones(5)], [lambda n: np.full(n, 1.0)], resample_seeds=False, resamples=50
    )
    np.testing.assert_allclose(counted, 5.0)  # the sum of 3 zeros and 5 ones


def test_memory_is_bounded_by_chunks(monkeypatch: pytest.MonkeyPatch):
    values = [np.arange(10.0)]
    monkeypatch.setattr(bootstrap, "CHUNK", 70)
    assert bootstrap.bootstrap(values, [mean_weights], resamples=33).shape == (1, 33)


def test_equal_values_give_equal_intervals():
    values = np.random.default_rng(0).normal(size=20)
    assert estimate([values]) == estimate([values.copy()])


def test_one_number_has_no_interval():
    only = estimate([np.array([3.0])])
    assert only.over == "nothing"
    assert only.mean.value == 3.0
    assert np.isnan([only.mean.low, only.mean.high, only.iqm.low, only.iqm.high]).all()


def test_a_world_is_drawn_with_all_its_queries():
    """Queries of one world that return the same tell no more than one of them does."""
    worlds = np.random.default_rng(5).normal(size=(12, 1))
    one = bootstrap.bootstrap([worlds[:, 0]], [mean_weights], resamples=500)
    np.testing.assert_allclose(bootstrap.bootstrap([worlds.repeat(8, axis=1)], [mean_weights], resamples=500), one)
    assert estimate([worlds.repeat(8, axis=1)]).over == "worlds"
    both = estimate([worlds.repeat(8, axis=1), worlds.repeat(8, axis=1) + 1])
    assert both.over == "worlds and seeds"


def test_a_query_without_a_value_does_not_count():
    strata = [np.array([[1.0, np.nan], [3.0, 5.0]]), np.array([[2.0, 2.0]])]
    assert estimate(strata).mean.value == pytest.approx(13 / 5)
    drawn = bootstrap.bootstrap(strata, [mean_weights], resample_seeds=False, resamples=2000)[0]
    assert set(np.round(drawn, 6)) == {1.5, 2.6, 3.333333}  # the world of one query twice, each once, that of two twice
