"""Plot, figure and report: one file, because they are tested on one small evaluation."""

import base64
import itertools
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from agents.cli import ConfigError
from agents.comparisons import compared
from agents.figure import compose, short_number, spread
from agents.plot import FOREIGN, PlotResult, curves, episodes_of_mode, main, plot
from agents.report import write_report
from agents.results import Result, append_results
from agents.statistics import SummaryRow, summarize

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
CONTEXTS = (0, 1, 2, 4, 8)


def episode(**changes) -> Result:
    values = {
        "experiment": "dark/at-0",
        "agent": "at",
        "task": "point_mass-dark",
        "seed": 0,
        "context_trajectories": 0,
        "context_tokens": 0,
        "mode": "prompted",
        "context": "none",
        "group": 0,
        "episode_index": 0,
        "return_": 0.0,
        "steps": 16,
        "checkpoint_step": 100,
        "versions": {"jax": "0.12.0"},
    }
    values["series"] = f"dark/{changes.get('agent', 'at')}"
    return Result(**values | changes)


def evaluation(*, agents=("at", "dt", "bc"), seeds=2, goals=8, count=1, task="point_mass-dark") -> list[Result]:
    """Returns what a small sweep measures: at profits from its own context, nothing else does; 8 is the ceiling."""
    random = np.random.default_rng(0)
    results = [
        episode(agent="oracle", experiment="dark", group=goal, return_=8.0 - goal % 2, task=task)
        for goal in range(goals)
    ]
    for agent, seed, trajectories, kind in itertools.product(agents, range(seeds), CONTEXTS, ("own", "foreign")):
        if kind == "foreign" and (agent != "at" or trajectories == 0):
            continue
        skill = 0.8 * trajectories if (agent, kind) == ("at", "own") else 0.0
        results += [
            episode(
                experiment=f"dark/{agent}-{seed}",
                agent=agent,
                seed=seed,
                task=task,
                context_trajectories=trajectories,
                context_tokens=64 * trajectories,
                context=kind if trajectories else "none",
                group=goal,
                episode_index=index,
                return_=float(skill + random.integers(0, 3)),
            )
            for goal in range(goals)
            for index in range(count)
        ]
    return results


def own_episodes(returns: list[list[float]], **changes) -> list[Result]:
    return [
        episode(mode="self", group=group, episode_index=index, return_=value, **changes)
        for group, of_group in enumerate(returns)
        for index, value in enumerate(of_group)
    ]


# --------------------------------------------------------------------------------------------------------------- labels


def test_labels_that_fit_stay_where_they_are():
    np.testing.assert_allclose(spread(np.array([50.0, 10.0]), np.array([10.0, 10.0]), 0, 100), [50, 10])


def test_labels_that_overlap_part_evenly_and_keep_their_order():
    np.testing.assert_allclose(
        spread(np.array([50.0, 50.0, 52.0]), np.array([10.0, 10.0, 10.0]), 0, 100), [40.667, 50.667, 60.667], atol=1e-3
    )
    np.testing.assert_allclose(spread(np.array([50.0, 50.0]), np.array([10.0, 30.0]), 0, 100), [40, 60])


def test_labels_stay_within_their_bounds():
    np.testing.assert_allclose(spread(np.array([99.0, 98.0]), np.array([10.0, 10.0]), 0, 100), [95, 85])
    np.testing.assert_allclose(spread(np.array([0.0, 1.0]), np.array([10.0, 10.0]), 0, 100), [5, 15])


@given(st.lists(st.tuples(st.floats(-50, 250), st.floats(5, 40)), min_size=1, max_size=9))
def test_labels_never_overlap(labels):
    wanted, heights = np.array(labels).T
    placed = spread(wanted, heights, 0, 200)
    order = np.argsort(placed)
    gaps = np.diff(placed[order])
    room = (heights[order][1:] + heights[order][:-1]) / 2
    assert (gaps >= room - 1e-6).all()
    if heights.sum() <= 200:
        assert (placed - heights / 2 >= -1e-6).all()
        assert (placed + heights / 2 <= 200 + 1e-6).all()


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (272, "272"),
        (1088, "1.09K"),
        (512_000, "512K"),
        (999_900, "1M"),
        (16_777_216, "16.8M"),
        (3 * 10**9, "3G"),
    ],
)
def test_short_numbers(number: int, text: str):
    assert short_number(number) == text


def boxes(figure: Figure) -> dict[tuple[str, int], Bbox]:
    """Returns where every text of a figure stands, in pixels."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    texts = [*figure.texts]
    for axes in figure.axes:
        bottom, top = axes.get_ylim()  # matplotlib makes labels beyond the axes and does not draw them
        texts += [label for label in axes.get_yticklabels() if bottom <= label.get_position()[1] <= top]
        texts += [*axes.texts, *axes.get_xticklabels()]
    # An annotation's own extent includes the line to its curve, which may cross what it likes.
    return {
        (text.get_text(), index): Text.get_window_extent(text, canvas.get_renderer()).padded(-1)
        for index, text in enumerate(texts)
        if text.get_text() and text.get_visible()
    }


@pytest.mark.parametrize("case", ["one task", "two tasks", "max", "dense contexts", "long names"])
def test_no_two_texts_of_a_figure_overlap_and_all_are_inside(case: str):
    results, statistic = evaluation(), "mean"
    if case == "two tasks":
        results += evaluation(task="reacher-dark", agents=("at",))
    elif case == "max":
        results, statistic = evaluation(count=4), "max"
    elif case == "dense contexts":
        results = [
            episode(
                context="own",
                context_trajectories=count,
                context_tokens=4000 * count,
                group=group,
                return_=float(group),
            )
            for count in range(1, 33)
            for group in range(3)
        ]
    elif case == "long names":
        results = evaluation(agents=("at", *(f"an_ablation_with_a_very_long_name_{i}" for i in range(6))))
    rows = summarize(results, statistics=[statistic], resamples=50)
    panels = curves(results, rows, resamples=50)
    title = "point_mass-dark: return where each trajectory has met the goal with chance p"
    figure = compose(
        panels, title=title, subtitle="Subtitle", caption="A caption. " * 60, x_name="trajectories", logarithmic=True
    )
    found = boxes(figure)
    assert len(found) > 5
    for (one, a), (other, b) in itertools.combinations(found.items(), 2):
        assert not a.overlaps(b), (one, other)
    width, height = figure.get_size_inches() * figure.dpi
    for (text, _), box in found.items():
        assert box.x0 >= 0, text
        assert box.y0 >= 0, text
        assert box.x1 <= width, text
        assert box.y1 <= height, text


# --------------------------------------------------------------------------------------------------------------- curves


def test_curves_are_ordered_by_their_end_with_controls_and_ceiling():
    results = evaluation()
    rows = summarize(results, statistics=["mean"], resamples=50)
    (drawn,) = curves(results, rows, resamples=50).values()
    assert [(curve.label, curve.kind) for curve in drawn][:2] == [("at", "agent"), ("at" + FOREIGN, "foreign")]
    assert (drawn[-1].label, drawn[-1].kind) == ("oracle", "oracle")
    assert [point.trajectories for point in drawn[0].points] == list(CONTEXTS)
    assert [point.tokens for point in drawn[0].points] == [64 * count for count in CONTEXTS]
    # The control begins where no context is anybody's.
    assert drawn[1].points[0].value == drawn[0].points[0].value
    assert drawn[1].colour == drawn[0].colour
    assert len({curve.colour for curve in drawn if curve.kind == "agent"}) == 3


def test_the_line_is_the_chosen_average():
    results = [episode(group=group, return_=value) for group, value in enumerate([0.0, 0, 0, 0, 0, 0, 8, 8])]
    rows = summarize(results, statistics=["mean"], resamples=50)
    ((of_iqm,),) = curves(results, rows, aggregate="iqm", resamples=50).values()
    ((of_mean,),) = curves(results, rows, aggregate="mean", resamples=50).values()
    assert (of_iqm.points[0].value, of_iqm.points[0].other) == (0.0, 2.0)
    assert of_mean.points[0].value == 2.0
    assert np.isnan(of_mean.points[0].other)


def test_an_agent_has_one_colour_in_all_panels():
    results = evaluation() + evaluation(task="reacher-dark", agents=("bc",))
    panels = curves(results, summarize(results, statistics=["mean"], resamples=50), resamples=50)
    colours = [{curve.label: curve.colour for curve in drawn}["bc"] for drawn in panels.values()]
    assert colours[0] == colours[1]


def test_an_agent_without_context_is_a_level():
    results = [*evaluation(agents=("at",)), *(episode(agent="bc", group=group, return_=1.0) for group in range(4))]
    (drawn,) = curves(results, summarize(results, statistics=["mean"], resamples=50), resamples=50).values()
    assert {curve.label: curve.kind for curve in drawn}["bc"] == "flat"


def test_a_maximum_is_drawn_with_its_null():
    results = evaluation(count=3)
    rows = summarize(results, statistics=["max"], resamples=50)
    (drawn,) = curves(results, rows, resamples=50).values()
    null = next(curve for curve in drawn if curve.kind == "null")
    assert null.label == "at: best of n by luck"
    assert len({point.value for point in null.points}) == 1  # 3 episodes at every context
    assert not [
        c
        for c in curves(results, summarize(results, statistics=["last"]), resamples=50)["point_mass-dark"]
        if c.kind == "null"
    ]


def test_in_self_mode_the_statistic_over_the_first_k_episodes_stands_at_k():
    results = own_episodes([[1.0, 5.0, 3.0], [3.0, 1.0, 5.0]])
    shown = episodes_of_mode(results, "self")

    def means(statistic: str) -> list[tuple[int, float]]:
        return [(row.context_trajectories, row.mean) for row in summarize(shown, statistics=[statistic], resamples=50)]

    assert means("last") == [(1, 2.0), (2, 3.0), (3, 4.0)]
    assert means("max") == [(1, 2.0), (2, 4.0), (3, 5.0)]
    assert means("first") == [(1, 2.0), (2, 2.0), (3, 2.0)]


def test_in_self_mode_the_null_rises_with_the_episodes():
    results = own_episodes([[1.0, 5.0, 3.0], [3.0, 1.0, 5.0], [2.0, 2.0, 2.0]])
    shown = episodes_of_mode(results, "self")
    (drawn,) = curves(
        shown, summarize(shown, statistics=["max"], resamples=50), aggregate="mean", resamples=50
    ).values()
    null = next(curve for curve in drawn if curve.kind == "null")
    # First episodes returned 1, 3 and 2.
    assert [point.value for point in null.points] == pytest.approx([2.0, (3 + 3 + 2) / 3, 3.0])


# ----------------------------------------------------------------------------------------------------------------- plot


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_a_plot_is_written_whole(tmp_path: Path, suffix: str):
    drawn = plot(evaluation(), tmp_path / f"plot{suffix}", "Title", resamples=50)
    start = drawn.path.read_bytes()[:200]
    assert start.startswith({".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}[suffix])
    assert [entry.name for entry in tmp_path.iterdir()] == [f"plot{suffix}"]


def test_the_caption_names_what_is_drawn(tmp_path: Path):
    caption = plot(evaluation(count=2), tmp_path / "a.png", statistic="last", resamples=50).caption
    assert "interquartile mean of the return of the last of the 2 episodes after the prompt" in caption
    assert "over 8 goals (or starts) × 2 training seeds" in caption
    assert "95 % percentile bootstrap interval over goals and seeds, 50 resamples" in caption
    assert "must not help" in caption
    assert "Oracle" in caption
    one = plot(evaluation(seeds=1), tmp_path / "b.png", resamples=50).caption
    assert "first, mean, last and max are the same number" in one
    assert "× 1 training seed." in one
    assert "One training seed" in one
    luck = plot(evaluation(count=2), tmp_path / "c.png", statistic="max", resamples=50).caption
    assert "By luck: the expected largest return" in luck


def test_the_caption_says_when_luck_cannot_be_drawn(tmp_path: Path):
    results = [result for result in evaluation(agents=("at",), count=2) if result.context_trajectories]
    assert "A maximum rises by luck alone" in plot(results, tmp_path / "a.png", statistic="max", resamples=50).caption


def test_prompted_is_drawn_where_there_is_any_and_self_where_there_is_not(tmp_path: Path):
    alone = own_episodes([[1.0, 2.0], [2.0, 3.0]])
    drawn = plot(alone, tmp_path / "a.png", resamples=50)
    assert {row.mode for row in drawn.rows} == {"self"}
    assert {row.statistic for row in drawn.rows} == {"last"}
    both = plot(evaluation() + alone, tmp_path / "b.png", resamples=50)
    assert {row.mode for row in both.rows} == {"prompted"}
    oracle = plot(evaluation(agents=()) + alone, tmp_path / "c.png", mode="self", resamples=50)
    assert {row.agent for row in oracle.rows} == {"at", "oracle"}


def test_a_single_goal_can_be_drawn_without_intervals(tmp_path: Path):
    plot(evaluation(seeds=1, goals=1), tmp_path / "a.png", resamples=50)


@pytest.mark.parametrize(
    ("results", "options", "message"),
    [
        ([], {}, "there is nothing to draw in mode prompted; the results have no episodes at all"),
        (evaluation(agents=()), {}, "nothing to draw in mode prompted; the results have prompted"),
        (evaluation(), {"mode": "self"}, "nothing to draw in mode self; the results have prompted"),
        (evaluation(), {"mode": "sel"}, "unknown mode 'sel'"),
        (evaluation(), {"statistic": "best"}, "unknown statistic 'best'"),
        (evaluation(), {"aggregate": "median"}, "unknown aggregate 'median'; choose from iqm, mean"),
    ],
)
def test_what_cannot_be_drawn_is_refused(tmp_path: Path, results, options, message: str):
    with pytest.raises(ConfigError, match=message):
        plot(results, tmp_path / "a.png", **options)
    assert not list(tmp_path.iterdir())


def test_a_plot_of_unknown_kind_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"a plot is a \.png, \.svg or \.pdf file; got .*plot\.gif"):
        plot(evaluation(), tmp_path / "plot.gif")


def test_the_command_draws_several_runs(tmp_path: Path, capsys: pytest.CaptureFixture):
    for run, agent in (("A", "at"), ("B", "bc")):
        append_results(tmp_path / run / "results.jsonl", evaluation(agents=(agent,)))
    out = tmp_path / "plot.png"
    assert main([str(tmp_path / "A"), str(tmp_path / "B"), "--out", str(out), "--statistic", "last"]) == 0
    assert out.exists()
    printed = capsys.readouterr().out
    assert re.search(r"point_mass-dark +at +8 trajectories \(512 tokens\) +last: iqm \S+ \[", printed)
    assert "bc" in printed


def test_the_command_says_in_one_line_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture):
    assert main([str(tmp_path), "--out", str(tmp_path / "plot.png")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: there are no results at")
    assert error.count("\n") == 1
    (tmp_path / "results.jsonl").touch()
    assert main([str(tmp_path), "--out", str(tmp_path / "plot.png")]) == 2
    assert "no episodes at all" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------------- report


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.rows = 0
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.rows += tag == "tr"
        self.links += [value for name, value in attrs if name in ("src", "href", "data", "action")]

    def handle_data(self, data):
        self.text += data


def write_a_report(path: Path) -> tuple[list[Result], list[SummaryRow], PlotResult, PlotResult]:
    results = evaluation(count=2)
    results += own_episodes([[1.0, 2.0], [2.0, 3.0]])
    drawn = plot(results, path.with_name("plot.png"), resamples=50)
    own = plot(results, path.with_name("own.png"), mode="self", resamples=50)
    rows = summarize(results, resamples=50)
    write_report(
        path,
        title="Does <it> help?",
        plot=drawn,
        more_plots=[own],
        rows=rows,
        results=results,
        commands=["make quickstart"],
        config='name = "<b>"',
    )
    return results, rows, drawn, own


def test_a_report_needs_nothing_but_itself(tmp_path: Path):
    path = tmp_path / "report.html"
    results, rows, drawn, own = write_a_report(path)
    text = path.read_text()
    page = Page(text)
    images = [base64.b64decode(link.removeprefix("data:image/png;base64,")) for link in page.links]
    assert images == [drawn.path.read_bytes(), own.path.read_bytes()]
    assert not re.search(r"https?://|@import|url\(|<script|<b>|<it>", text)
    beside = len(compared(results)) + 1
    assert page.rows == (len(drawn.rows) + len(own.rows) + 1) + (len(rows) + 1) + beside + 1  # drawn, all, one version
    for words in (
        "Does <it> help?",
        "make quickstart",
        "0.12.0",
        'name = "<b>"',
        "With 2 training seeds",
        "at (foreign context)",
    ):
        assert words in page.text


WHAT_IS_THERE = """<script>onload = () => document.body.append(JSON.stringify({
  images: Array.from(document.images, (one) => one.complete && one.naturalWidth > 99),
  requests: performance.getEntriesByType("resource").map((one) => one.name).filter((name) => !name.startsWith("data:")),
  wide: document.documentElement.scrollWidth > innerWidth,
}))</script>"""


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_a_browser_shows_the_whole_report(tmp_path: Path):
    """Every figure, no request, no error on the console, nothing wider than the window."""
    path = tmp_path / "report.html"
    write_a_report(path)
    path.write_text(path.read_text() + WHAT_IS_THERE)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--window-size=1000,900"]
    flags += [f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--dump-dom"]
    shown = subprocess.run([BROWSER, *flags, path.as_uri()], capture_output=True, text=True, check=True, timeout=120)
    assert '{"images":[true,true],"requests":[],"wide":false}' in shown.stdout
    assert "CONSOLE" not in shown.stderr, shown.stderr


def test_a_report_shows_no_pdf(tmp_path: Path):
    drawn = plot(evaluation(), tmp_path / "plot.pdf", resamples=50)
    with pytest.raises(ConfigError, match=r"a report shows \.png and \.svg plots"):
        write_report(
            tmp_path / "r.html", title="", plot=drawn, rows=drawn.rows, results=evaluation(), commands=[], config=""
        )
