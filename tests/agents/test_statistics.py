import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import norm

from agents.cli import ConfigError
from agents.statistics import maximum_null, summarize, summary_notes, write_summary

# -------------------------------------------------------------------------------------------------------- null of a max


@pytest.mark.parametrize(("draws", "expected"), [(4, 1.03), (8, 1.42), (32, 2.07)])
def test_the_null_of_a_maximum_of_normals(episodes, draws: int, expected: float):
    returns = norm.ppf((np.arange(2000) + 0.5) / 2000)[:, None]
    null = maximum_null(episodes(returns), draws, resamples=500)
    assert null.mean.value == pytest.approx(expected, abs=0.01)
    assert null.mean.low < expected < null.mean.high
    assert null.over == "episodes"


def test_the_null_uses_context_free_episodes_alone(episodes):
    free = episodes([[1, 9], [2, 9], [3, 9]])  # the second episodes have seen the first
    with_context = episodes([[9], [9], [9]], trajectories=4)
    assert maximum_null(free + with_context, 2).mean.value == pytest.approx((2 + 3 + 3) / 3)
    own = episodes([[1, 9], [2, 9], [3, 9]], mode="self")
    assert maximum_null(own, 2).mean.value == pytest.approx((2 + 3 + 3) / 3)


def test_too_few_context_free_episodes_are_said(episodes):
    with pytest.raises(ConfigError, match="maximum of 4 episodes needs as many context-free ones; got 2"):
        maximum_null(episodes([[1], [2]]), 4)


# -------------------------------------------------------------------------------------------------------------- summary


def test_the_four_statistics_by_hand(episodes):
    rows = {row.statistic: row for row in summarize(episodes([[1, 5, 3], [2, 0, 4]], trajectories=2), resamples=100)}
    assert {name: row.mean for name, row in rows.items()} == {"first": 1.5, "mean": 2.5, "last": 3.5, "max": 4.5}
    row = rows["mean"]
    assert (row.groups, row.seeds, row.episodes, row.episodes_per_group) == (2, 1, 6, 3)
    assert (row.context_trajectories, row.context_tokens, row.interval_over) == (2, 32, "goals")
    assert (row.mean_ci_low, row.mean_ci_high) == (2.0, 3.0)


def test_episodes_are_ordered_by_their_index(episodes):
    shuffled = episodes([[1, 2, 3]])[::-1]
    assert [summarize(shuffled, statistics=[name])[0].mean for name in ("first", "last")] == [1.0, 3.0]


def test_the_mean_stands_beside_an_interquartile_mean_of_zero(episodes):
    row = summarize(episodes([[0], [0], [0], [0], [0], [0], [8], [8]]), statistics=["mean"])[0]
    assert row.iqm == 0.0
    assert row.mean == 2.0
    assert row.mean_ci_high > 0


def test_controls_and_oracle_have_their_own_rows(episodes):
    results = (
        episodes([[0], [1]])
        + episodes([[5], [6]], trajectories=4)
        + episodes([[1], [0]], trajectories=4, context="foreign")
        + episodes([[8], [8]], agent="oracle")
    )
    rows = summarize(results, statistics=["mean"], resamples=100)
    assert [(row.agent, row.context_trajectories, row.mean) for row in rows] == [
        ("at", 0, 0.5),
        ("at", 4, 5.5),
        ("at (foreign context)", 4, 0.5),
        ("oracle", 0, 8.0),
    ]


def test_seeds_of_a_sweep_are_summarised_together_and_experiments_apart(episodes):
    sweep = episodes([[1]], seed=0, series="dark/at") + episodes([[3]], seed=1, series="dark/at")
    (row,) = summarize(sweep, statistics=["mean"], resamples=100)
    assert (row.agent, row.mean, row.seeds, row.interval_over) == ("at", 2.0, 2, "seeds")
    rows = summarize(sweep + episodes([[9]], series="other"), statistics=["mean"], resamples=100)
    assert [(row.agent, row.mean) for row in rows] == [("at [dark/at]", 2.0), ("at [other]", 9.0)]


@pytest.mark.parametrize(
    ("series", "names"),
    [
        (["map/AT", "map/no/norm"], ["AT", "no/norm"]),  # as the report of the sweep calls them
        (["map/wide", "rare/narrow"], ["narrow", "wide"]),
        (["map/AT", "rare/AT"], ["at [map/AT]", "at [rare/AT]"]),
        (["map/AT", "AT"], ["at [AT]", "at [map/AT]"]),
        (["map/AT"], ["AT"]),
    ],
)
def test_arms_of_one_kind_are_called_as_the_sweep_calls_them(episodes, series, names):
    results = [one for name in series for one in episodes([[1]], series=name)]
    oracle = episodes([[8]], agent="oracle", series="map")
    rows = summarize(results + oracle, statistics=["mean"], resamples=100)
    assert [row.agent for row in rows if row.agent != "oracle"] == names


def test_an_oracle_of_two_experiments_counts_once(episodes):
    oracle = episodes([[8], [6]], agent="oracle", series="a") + episodes([[8], [6]], agent="oracle", series="b")
    (row,) = summarize(oracle, statistics=["mean"], resamples=100)
    assert (row.agent, row.episodes, row.groups) == ("oracle", 2, 2)


def test_modes_and_tasks_are_never_mixed(episodes):
    results = episodes([[1]]) + episodes([[2]], mode="self") + episodes([[3]], task="c-d")
    rows = summarize(results, statistics=["last"], resamples=100)
    assert [(row.task, row.mode, row.mean) for row in rows] == [
        ("a-b", "prompted", 1.0),
        ("a-b", "self", 2.0),
        ("c-d", "prompted", 3.0),
    ]


def test_an_unknown_statistic_is_refused(episodes):
    with pytest.raises(ConfigError, match="unknown statistic 'median'; choose from first, mean, last, max"):
        summarize(episodes([[1]]), statistics=["median"])


def test_the_file_has_the_published_columns_first(episodes, tmp_path: Path):
    path = tmp_path / "summary.csv"
    write_summary(path, summarize(episodes([[1], [2]], trajectories=2), resamples=100))
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[:11] == [
        "agent",
        "task",
        "mode",
        "context_trajectories",
        "context_tokens",
        "statistic",
        "iqm",
        "ci_low",
        "ci_high",
        "seeds",
        "episodes",
    ]
    assert [row["statistic"] for row in rows] == ["first", "mean", "last", "max"]
    assert rows[0]["iqm"] == rows[0]["mean"] == "1.5"
    assert rows[0]["interval_over"] == "goals"


def test_notes_say_what_the_numbers_cannot(episodes):
    def notes(results):
        return " ".join(summary_notes(results, summarize(results, resamples=200)))

    one = notes(episodes([[1], [2]]))
    assert "One episode a goal: first, mean, last and max are the same number." in one
    assert "One training seed" in one
    two = notes(episodes([[1, 2], [2, 3]]) + episodes([[1, 2], [2, 3]], seed=1))
    assert "One episode a goal" not in two
    assert "With 2 training seeds" in two
    assert "fewer episodes than others (was the evaluation finished?): at" in notes(episodes([[1, 2], [2]]))
    assert "without width is not certainty" in notes(episodes([[0]] * 40 + [[9]]))


def test_seeds_of_other_checkpoints_are_rows_of_their_own(episodes):
    few, many = (
        [replace(one, checkpoint_step=step, series="x") for one in episodes([[value]] * 8, seed=seed)]
        for seed, (step, value) in enumerate([(5, 1), (20_000, 3)])
    )
    rows = summarize(few + many, statistics=["mean"])
    assert [(row.agent, row.seeds, row.mean) for row in rows] == [
        ("at [20,000 updates]", 1, 3),
        ("at [5 updates]", 1, 1),
    ]
    best = [replace(one, settings={"evaluate.checkpoint": "best"}) for one in few + many]
    assert [(row.agent, row.seeds, row.mean) for row in summarize(best, statistics=["mean"])] == [("at", 2, 2)]


def test_the_queries_of_a_world_are_no_independent_goals(episodes):
    random = np.random.default_rng(8)
    returns = (random.normal(5, 2, size=(16, 1)) + random.normal(0, 0.1, size=(16, 8))).reshape(-1, 1)
    results = episodes(returns, trajectories=64, places=64, queries=8)
    (row,) = summarize(results, statistics=["mean"])
    assert row.interval_over == "worlds"
    assert (row.mean_ci_high - row.mean_ci_low) / 2 == pytest.approx(1.96 * 2 / 16**0.5, rel=0.4)
    (apart,) = summarize([replace(result, places=0, world=None) for result in results], statistics=["mean"])
    assert apart.mean_ci_high - apart.mean_ci_low < 0.5 * (row.mean_ci_high - row.mean_ci_low)
