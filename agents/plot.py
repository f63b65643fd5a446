"""Draws return against context: python -m agents.plot runs/A runs/B --out return_vs_context.png [--statistic last]"""

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from agents.bootstrap import RESAMPLES
from agents.cells import FOREIGN, Cell, cells
from agents.cli import ConfigError, run
from agents.figure import Curve, Point, compose
from agents.image import check_picture, check_suffix, write_image
from agents.prediction import ALWAYS
from agents.results import MODES, ORACLE, Result, read_results
from agents.statistics import STATISTICS, SummaryRow, maximum_null, summarize, summary_notes
from rlring.cli import Parser

AGGREGATES = {"iqm": "interquartile mean", "mean": "mean"}

# Okabe and Ito's palette for colour-blind readers, without the colours that are too light on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#A8488A", "#7A5C00", "#56707F", "#2E9BD6", "#222222")
GREY = "#666666"


@dataclass(frozen=True, slots=True)
class PlotResult:
    """A plot that was written. rows: the summary rows that it shows."""

    path: Path
    caption: str
    rows: list[SummaryRow]


def plot(
    results: Sequence[Result],
    out: Path,
    title: str = "",
    *,
    statistic: str | None = None,
    mode: str | None = None,
    aggregate: str = "iqm",
    resamples: int = RESAMPLES,
) -> PlotResult:
    """Draws return against context into `out` (.png, .svg or .pdf) and returns the caption that stands below it.

    Args:
        statistic: Reduction of the episodes of a goal: first, mean, last or max. None: mean in mode prompted; last,
            the return of episode x, in mode self.
        mode: "prompted" (x is the number of trajectories in the context) or "self" (x is the number of episodes played,
            and the statistic is over these). None: prompted where there are such results.
        aggregate: Reduction of the goals: "iqm", with the means as short dashes, or "mean".

    Raises ConfigError when there is nothing to draw or an argument is invalid, and DataError when `out` is an existing
    file that is not a plot.
    """
    check_suffix(out)
    if aggregate not in AGGREGATES:
        raise ConfigError(f"unknown aggregate {aggregate!r}; choose from {', '.join(AGGREGATES)}")
    mode = mode or next((name for name in MODES if any(result.mode == name for result in results)), None)
    shown = episodes_of_mode(results, mode) if mode else []
    if not mode or not shown:
        found = ", ".join(sorted({result.mode for result in results})) or "no episodes at all"
        raise ConfigError(f"there is nothing to draw in mode {mode or 'prompted'}; the results have {found}.")
    statistic = statistic or ("mean" if mode == "prompted" else "last")
    rows = summarize(shown, statistics=[statistic], resamples=resamples)
    panels = curves(shown, rows, aggregate=aggregate, resamples=resamples)
    number = _number(rows, mode)
    caption = describe(shown, rows, panels, number=number, aggregate=aggregate, resamples=resamples)
    figure = compose(
        panels,
        title=title or f"{' and '.join(panels)}: return against context",
        subtitle=f"{number[4].upper()}{number[5:]}: {AGGREGATES[aggregate]} and 95 % interval",
        caption=caption,
        x_name="trajectories" if mode == "prompted" else "episodes",
        logarithmic=mode == "prompted",
    )
    write_image(figure, out)
    return PlotResult(out, caption, rows)


def episodes_of_mode(results: Sequence[Result], mode: str) -> list[Result]:
    """Returns the episodes to draw for a mode. Oracles and agents without context are included, whatever their mode.
    Tasks where no agent was evaluated in this mode are left out.

    In mode "self" the context grows as the agent plays. Episode i (from 0) is repeated for every k > i, so that the
    statistic over the first k episodes is drawn at x = k.
    """
    if mode not in MODES:
        raise ConfigError(f"unknown mode {mode!r}; choose from {', '.join(MODES)}")
    tasks = {result.task for result in results if result.mode == mode and result.agent != ORACLE}
    results = [result for result in results if result.task in tasks]
    shown = [result for result in results if result.mode == mode]
    agents = {(result.task, result.agent) for result in shown}
    contextual = {(result.task, result.agent) for result in results if result.context != "none"}
    flat = [
        replace(result, mode=mode)
        for result in results
        if result.mode != mode
        and (result.task, result.agent) not in agents
        and (result.agent == ORACLE or (result.task, result.agent) not in contextual)
    ]
    if mode == "prompted":
        return shown + flat
    played: dict[tuple[object, ...], int] = {}
    for result in shown:
        group = (*result.player, result.goal)
        played[group] = max(result.episode_index + 1, played.get(group, 0))
    grown = []
    for result in shown:
        last = played[*result.player, result.goal]
        for count in range(result.episode_index + 1, last + 1):
            grown.append(replace(result, context="own", context_trajectories=count))
    return grown + flat


def curves(
    results: Sequence[Result], rows: Sequence[SummaryRow], *, aggregate: str = "iqm", resamples: int = RESAMPLES
) -> dict[str, list[Curve]]:
    """Returns the curves of each task: the agents by descending last value (those with a single point at the end), each
    followed by its control and its prediction. Where the statistic is max, the first agent is also followed by the
    expected maximum without learning. An agent has the same colour in all panels.
    """
    points: dict[str, dict[str, list[Point]]] = {}
    for row in rows:
        iqm = (row.iqm, row.ci_low, row.ci_high)
        mean = (row.mean, row.mean_ci_low, row.mean_ci_high)
        drawn, dash = (iqm, row.mean) if aggregate == "iqm" else (mean, math.nan)
        own = points.setdefault(row.task, {}).setdefault(row.agent, [])
        own.append(Point(row.context_trajectories, row.context_tokens, *drawn, dash))
    names = sorted({row.control_of or row.agent for row in rows} - {ORACLE})
    controls = {row.control_of: row.agent for row in rows if row.control_of}
    colours = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(names)}
    panels = {}
    for task, of_agent in points.items():
        agents = [name for name in names if name in of_agent]
        agents.sort(key=lambda name: (len(of_agent[name]) == 1, -of_agent[name][-1].value))
        panels[task] = []
        for name in agents:
            own, colour, label = of_agent[name], colours[name], name.replace("_", " ")
            flat = len(own) == 1 and own[0].trajectories == 0
            panels[task].append(Curve(label, "flat" if flat else "agent", colour, tuple(own)))
            if controls.get(name) in of_agent:
                # The agent and its control share the point without context.
                start = [point._replace(other=math.nan) for point in own if point.trajectories == 0]
                control = tuple(start + of_agent[controls[name]])
                panels[task].append(Curve(label + FOREIGN, "foreign", colour, control))
            expected = [row for row in rows if (row.task, row.agent) == (task, name) and math.isfinite(row.predicted)]
            if aggregate == "mean" and expected:  # predictions exist for means only
                drawn = (Point(row.context_trajectories, row.context_tokens, *[row.predicted] * 3, math.nan)
                         for row in expected)  # fmt: skip
                panels[task].append(Curve(f"{label}: predicted", "predicted", colour, tuple(drawn)))
            if rows[0].statistic == "max" and name == agents[0]:
                own_rows = [row for row in rows if (row.task, row.agent) == (task, name)]
                null = _null(own_rows, results, aggregate, resamples)
                if null:
                    panels[task].append(Curve(f"{label}: best of n by luck", "null", colour, null))
        if ORACLE in of_agent:
            panels[task].append(Curve("oracle", "oracle", GREY, tuple(of_agent[ORACLE][:1])))
    return panels


def _null(rows: Sequence[SummaryRow], results: Sequence[Result], aggregate: str, resamples: int) -> tuple[Point, ...]:
    """Returns, for each row of an agent, the expected maximum of as many context-free episodes as the row has per goal.
    No points where there are too few such episodes, or only one episode per goal.
    """
    first = rows[0]  # the smallest context, which has all context-free episodes
    members = cells(results)[Cell(first.task, first.mode, first.agent, first.context_trajectories, first.control_of)]
    free = [result for result in members if result.context_free]
    most = max(row.episodes_per_group for row in rows)
    if most == 1 or len(free) < most:
        return ()
    points = []
    for row in rows:
        null = maximum_null(free, row.episodes_per_group, resamples=resamples)
        drawn = null.iqm if aggregate == "iqm" else null.mean
        points.append(Point(row.context_trajectories, row.context_tokens, *drawn, math.nan))
    return tuple(points)


def describe(
    results: Sequence[Result],
    rows: Sequence[SummaryRow],
    panels: Mapping[str, Sequence[Curve]],
    *,
    number: str,
    aggregate: str,
    resamples: int = RESAMPLES,
) -> str:
    """Returns the caption: what is drawn, the numbers of goals, seeds and episodes, and what the intervals cover."""
    agents = [row for row in rows if row.agent != ORACLE]
    goals, seeds = _span(row.groups for row in agents), _span(row.seeds for row in agents)
    over = " or ".join(sorted({row.interval_over for row in agents}))
    sentences = [
        f"Line: {AGGREGATES[aggregate]} of {number}, over {goals} goals (or starts) × {seeds} training "
        f"seed{'' if seeds == '1' else 's'}.",
        f"Band: 95 % percentile bootstrap interval over {over}, {resamples:,} resamples.",
    ]
    if aggregate == "iqm":
        sentences.append("Short dashes: the means of the same returns.")
    if any(row.control_of for row in rows):
        sentences.append("Foreign context: trajectories of another goal, which must not help.")
    if any(row.agent == ORACLE for row in rows):
        sentences.append("Oracle: a scripted controller that is told what the agents must find out.")
    if any(curve.kind == "predicted" for drawn in panels.values() for curve in drawn):
        sentences.append(
            "Predicted: what the agent earns with trajectories that all have met the goal, averaged over how many of a "
            "context have; nothing is fitted."
            if any(result.met == ALWAYS for result in results)
            else "Predicted: prior + (known - prior) × the chance that the goal is in the context; prior is the return "
            "without context, known that where 99 of 100 contexts hold the goal; nothing is fitted."
        )
    if any(curve.kind == "null" for drawn in panels.values() for curve in drawn):
        sentences.append(
            "By luck: the expected largest return of as many independent episodes without context, which a policy that "
            "learns nothing reaches too."
        )
    elif rows[0].statistic == "max" and max(row.episodes_per_group for row in agents) > 1:
        sentences.append(
            "A maximum rises by luck alone; there are too few episodes without context to draw by how much."
        )
    return " ".join(sentences + summary_notes(results, rows))


def _number(rows: Sequence[SummaryRow], mode: str) -> str:
    """Returns a description of the number that each goal is reduced to."""
    statistic = rows[0].statistic
    if mode == "self":
        return {
            "first": "the return of the first episode",
            "mean": "the mean return of the first x episodes",
            "last": "the return of episode x, after x - 1 of the agent's own",
            "max": "the largest return of the first x episodes",
        }[statistic]
    count = _span(row.episodes_per_group for row in rows if row.agent != ORACLE)
    if count == "1":
        return "the return of the episode after the prompt"
    return {
        "first": f"the return of the first of the {count} episodes after the prompt",
        "mean": f"the mean return of the {count} episodes after the prompt",
        "last": f"the return of the last of the {count} episodes after the prompt",
        "max": f"the largest return of the {count} episodes after the prompt",
    }[statistic]


def _span(values: Iterable[int]) -> str:
    numbers = list(values)
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"


def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="python -m agents.plot", description="Plots return against the length of the history.")
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, or their results.jsonl")
    parser.add_argument("--out", type=Path, required=True, help="the plot: .png, .svg or .pdf")
    parser.add_argument("--title", default="")
    parser.add_argument(
        "--statistic", choices=STATISTICS, help="of the episodes of a goal (default: mean; in mode self: last)"
    )
    parser.add_argument("--mode", choices=MODES, help="default: prompted if the results have it, else self")
    parser.add_argument("--aggregate", choices=list(AGGREGATES), default="iqm", help="over goals (default: iqm)")
    options = parser.parse_intermixed_args(argv)

    def body() -> None:
        check_suffix(options.out)
        check_picture(options.out)
        results = read_results(*options.runs)
        if any(result.places for result in results):
            from agents.world_figure import plot_worlds  # it imports this module

            drawn = plot_worlds(results, options.out, options.title)
            print(f"{drawn.path}: {drawn.caption}")
            return
        drawn = plot(
            results,
            options.out,
            options.title,
            statistic=options.statistic,
            mode=options.mode,
            aggregate=options.aggregate,
        )
        for row in drawn.rows:
            print(
                f"{row.task}  {row.agent}  {row.context_trajectories} trajectories ({row.context_tokens} tokens)  "
                f"{row.statistic}: iqm {row.iqm:.4g} [{row.ci_low:.4g}, {row.ci_high:.4g}]  mean {row.mean:.4g} "
                f"[{row.mean_ci_low:.4g}, {row.mean_ci_high:.4g}]"
            )
        print(f"{drawn.path}: {drawn.caption}")

    return run(body)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
