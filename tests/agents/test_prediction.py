"""The line that a perfect memory would follow, in the summary and in the picture."""

import csv

import numpy as np
import pytest

from agents.cli import ConfigError
from agents.plot import plot
from agents.prediction import make_predictor
from agents.results import Result
from agents.statistics import summarize, write_summary
from agents.world_figure import plot_worlds


@pytest.fixture
def visits(episodes):
    """Gives a function `(places, seen, value, ...)` of results whose mean is `value`."""

    def make(places, seen, value, *, context=None, seed=0, agent="AT", groups=64, met=0.0) -> list[Result]:
        noise = np.random.default_rng((places, seen, seed)).normal(size=groups)
        how = {"seed": seed, "agent": agent, "context": context, "met": met, "series": "map"}
        task = "point_mass-map" if places else "point_mass-dark"
        returns = value + noise - noise.mean()
        return episodes(returns, trajectories=seen, places=places, queries=4, task=task, **how)

    return make


@pytest.fixture
def perfect(visits):
    """Gives a function of an agent's results that forgets nothing: 2 without history, 6 with all of it."""

    def make(**same) -> list[Result]:
        return [
            result
            for places in (64, 256, 1024)
            for share in (0.0, 0.25, 0.5, 1.0)
            for result in visits(places, round(share * places), 2 + 4 * share, **same)
        ]

    return make


def test_nothing_is_fitted(visits, perfect):
    found = make_predictor(perfect())
    assert (found.prior, found.known) == (pytest.approx(2), pytest.approx(6))
    assert found.at_share(256 / 1024) == pytest.approx(3)
    # Neither what the larger worlds gave nor another world's history moves it.
    worse = perfect() + visits(4096, 4096, 0.0) + visits(64, 64, 0.0, context="foreign")
    assert make_predictor(worse) == found
    assert make_predictor(visits(64, 32, 4.0)) is None


def test_the_summary_says_what_was_predicted(visits, perfect, tmp_path):
    results = perfect() + visits(64, 64, 1.0, context="foreign")
    dark = visits(0, 0, 5.0, agent="DT")
    rows = summarize(results + dark, statistics=["mean"], resamples=50)
    write_summary(tmp_path / "summary.csv", rows)
    lines = (tmp_path / "summary.csv").read_text().splitlines()
    table = {(row["agent"], row["context_trajectories"]): row for row in csv.DictReader(lines)}
    assert float(table["AT, 1,024 places", "512"]["predicted"]) == pytest.approx(4)
    assert float(table["AT, 64 places", "0"]["predicted"]) == pytest.approx(2)
    assert table["AT, 64 places (foreign context)", "64"]["predicted"] == ""
    assert table["DT", "0"]["predicted"] == ""
    for row in rows:
        if "AT" in row.agent and "foreign" not in row.agent:
            assert row.mean == pytest.approx(row.predicted)


def test_the_picture(visits, perfect, tmp_path):
    seeds = [result for seed in (0, 1) for result in perfect(seed=seed)]
    seeds += [result for places in (64, 256) for result in visits(places, 0, 1.8, agent="DT")]
    results = seeds + visits(64, 64, 1.0, context="foreign") + perfect(agent="AT, window of 4 tokens")
    drawn = plot_worlds(results, tmp_path / "map.png", "A title", trained=64, resamples=50)
    assert drawn.path.stat().st_size > 20_000
    assert "Mean of 64 queries × 2 training seeds" in drawn.caption
    assert "nothing is fitted" in drawn.caption
    assert "Trained on chains of at most 1,024 tokens." in drawn.caption
    assert "Crosses: the history of another world." in drawn.caption
    with pytest.raises(ConfigError, match=r"none of these results is of a map"):
        plot_worlds([], tmp_path / "none.png")


def test_rare_goals(visits, tmp_path):
    """1 without context, 5 where the goal is in it; p moves the knee."""
    results = [
        result
        for met in (1 / 16, 1 / 256)
        for seen in (0, 1, 16, 128, 1024)
        for result in visits(0, seen, 1 + 4 * (1 - (1 - met) ** seen), met=met, groups=200)
    ]
    rows = summarize(results, statistics=["mean"], resamples=50)
    assert {row.agent for row in rows} == {"AT, p = 1/16", "AT, p = 1/256"}
    for row in rows:
        assert row.mean == pytest.approx(row.predicted, abs=0.02)
    drawn = plot(results, tmp_path / "rare.png", aggregate="mean", resamples=50)
    assert "Predicted: prior + (known - prior)" in drawn.caption
    assert "by luck" not in drawn.caption.lower()
    none = plot(results, tmp_path / "rare.svg", resamples=50)
    assert "Predicted" not in none.caption


def test_how_often_a_rare_goal_was_met_counts(visits, tmp_path):
    """Two meetings tell more than one: r(k) = 1 + 2 log(1 + k), which is measured for k = 1, 4 and 1,024."""
    told = [result for k in (1, 4, 1024) for result in visits(0, k, 1 + 2 * np.log(1 + k), met=1.0)]
    met, none = 1 / 64, visits(0, 0, 1.0, met=1.0) + visits(0, 0, 1.0, met=1 / 64)
    draws = np.random.default_rng(0).binomial(64, met, 1_000_000)
    expected = 1 + 2 * np.log(1 + draws).mean()
    rare = visits(0, 64, expected, met=met)
    (row,) = (
        r for r in summarize(told + none + rare, statistics=["mean"], resamples=50) if r.context_trajectories == 64
    )
    assert row.predicted == pytest.approx(expected, abs=0.01)
    drawn = plot(told + none + rare, tmp_path / "rare.svg", aggregate="mean", resamples=50)
    assert "Predicted: what the agent earns with trajectories that all have met the goal" in drawn.caption
