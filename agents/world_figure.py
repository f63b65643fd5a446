"""The plot of map tasks: return against tokens of history, a line per world size, with the perfect memory's return."""

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from agents.bootstrap import RESAMPLES
from agents.cells import named
from agents.cli import ConfigError
from agents.figure import FAINT, GRID, INK, short_number
from agents.image import check_suffix, title_size, write_image
from agents.plot import GREY, PlotResult
from agents.prediction import make_predictor
from agents.results import ORACLE, Result
from agents.statistics import SummaryRow, summarize, summary_notes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette; each world size has its marker too, for readers who cannot tell the colours apart.
WORLDS = (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "D"), ("#A8488A", "^"), ("#7A5C00", "v"), ("#222222", "P"))
WIDTH, HEIGHT, MARGIN = 5.4, 3.5, 0.9  # inches of a panel, and right of it
HEAD, BETWEEN, COLUMNS = 0.95, 1.0, 3  # inches above the panels and between their rows; panels in a row


def plot_worlds(
    results: Sequence[Result],
    out: Path,
    title: str = "",
    *,
    trained: int | None = None,
    resamples: int = RESAMPLES,
) -> PlotResult:
    """Draws the mean return in map tasks into `out` (.png, .svg or .pdf), one panel per agent, and returns its caption.

    Solid lines are measured, with 95 % intervals; with several seeds, each seed is a thin line. Dashed lines are the
    prediction of `agents.prediction`. `trained`, in trajectories, marks the longest training chain. Raises ConfigError
    when there are no results of a map task.
    """
    from matplotlib.figure import Figure  # slow to import

    check_suffix(out)
    shown = named([result for result in results if result.places or result.agent == ORACLE])
    rows = summarize(shown, statistics=["mean"], resamples=resamples)
    # Agents without history and the oracle get no panel: they are horizontal lines in all others.
    agents = list(dict.fromkeys(result.agent for result in shown if result.context_trajectories))
    if not agents:
        raise ConfigError("there is nothing to draw: none of these results is of a map, such as 'point_mass-map'.")
    of_visit = max(result.context_tokens / (result.context_trajectories or 1) for result in shown)
    trained_tokens = None if trained is None else round(trained * of_visit)
    caption = _caption(rows, trained_tokens, resamples)
    columns = min(COLUMNS, len(agents))
    width = columns * (WIDTH + MARGIN) + 0.7
    height = math.ceil(len(agents) / columns) * (HEIGHT + BETWEEN) - BETWEEN + HEAD + 1.35
    figure = Figure(figsize=(width, height), facecolor="white")
    size = title_size(title, width - 0.4)
    figure.text(0.2 / width, 1 - 0.15 / height, title, fontsize=size, fontweight="bold", color=INK, va="top")
    subtitle = "mean return at a random place of a world, having seen the last tokens of it; dashed: a perfect memory"
    figure.text(0.2 / width, 1 - 0.42 / height, subtitle, fontsize=9, color=FAINT, va="top")
    figure.text(0.2 / width, 0.1 / height, _wrapped(caption, int(width * 15)), fontsize=7.5, color=FAINT, va="bottom")
    top = max(_numbers(rows), default=1.0)
    for index, agent in enumerate(agents):
        row, column = divmod(index, columns)
        left, bottom = 0.7 + column * (WIDTH + MARGIN), height - HEAD - HEIGHT - row * (HEIGHT + BETWEEN)
        box = (left / width, bottom / height, WIDTH / width, HEIGHT / height)
        axes = figure.add_axes(box)
        shown_here = [result for result in shown if result.agent == agent or result.agent not in agents]
        _draw(axes, shown_here, rows, agent, trained_tokens)
        axes.set_ylim(0, top * 1.08)
        if len(agents) > 1:
            axes.set_title(agent, loc="left", fontsize=9.5, fontweight="bold", color=INK)
    write_image(figure, out)
    return PlotResult(out, caption, rows)


def _draw(axes: "Axes", results: Sequence[Result], rows: Sequence[SummaryRow], agent: str, trained: int | None) -> None:
    of_agent = [result for result in results if result.agent == agent]
    sizes = sorted({result.places for result in of_agent})
    per_visit = max(result.context_tokens / (result.context_trajectories or 1) for result in of_agent)
    seen = sorted({row.context_tokens for row in rows if row.context_tokens})
    first, last = math.log2(seen[0]) - 1.3, math.log2(seen[-1])
    place = {0: first} | {tokens: math.log2(tokens) for tokens in seen}
    predictor = make_predictor(of_agent)
    for size, (colour, marker) in zip(sizes, WORLDS * len(sizes), strict=False):
        of_size = [row for row in rows if row.agent == f"{agent}, {size:,} places"]
        of_size.sort(key=lambda row: row.context_trajectories)
        x = [place[row.context_tokens] for row in of_size]
        axes.plot(x, [row.mean for row in of_size], marker, linestyle="-", color=colour, linewidth=2.2, markersize=6,
                  markeredgecolor="white", zorder=4)  # fmt: skip
        axes.fill_between(x, [row.mean_ci_low for row in of_size], [row.mean_ci_high for row in of_size], color=colour,
                          alpha=0.15, linewidth=0)  # fmt: skip
        _draw_seeds(axes, [r for r in of_agent if r.places == size and r.context != "foreign"], place, colour)
        if predictor is not None:
            tokens = np.linspace(math.log2(seen[0]) - 0.6, math.log2(size * per_visit), 60)
            axes.plot(tokens, [predictor.at_share(2**t / per_visit / size) for t in tokens], "--", color=colour,
                      linewidth=1.3, zorder=3)  # fmt: skip
        _name(axes, x[-1], of_size[-1].mean, f"{size:,} places", colour)
        for row in rows:
            if row.control_of == f"{agent}, {size:,} places" and row.context_trajectories == size:
                axes.plot([place[row.context_tokens]], [row.mean], "x", color=colour, markersize=7, zorder=4)
                if size == sizes[-1]:
                    _name(axes, place[row.context_tokens], row.mean, "history of\nanother world", FAINT, below=True)
    for name in sorted({result.agent for result in results} - {agent}):
        level = float(np.mean([result.return_ for result in results if result.agent == name]))
        axes.axhline(level, color=GREY, linewidth=1.3, linestyle=(0, (7, 3)) if name == ORACLE else (0, (1, 1.5)))
        text = "oracle: is told the goal" if name == ORACLE else f"{name}: sees no history"
        axes.annotate(text, (last + 0.35, level), (0, 4), textcoords="offset points", ha="right", fontsize=8.5,
                      color=GREY)  # fmt: skip
    if trained is not None and math.log2(trained) <= last:
        axes.axvspan(first - 0.4, math.log2(trained), color="#F3F3F0", zorder=0)
        axes.annotate("as long as in training", (math.log2(trained), 0), (-4, 5), textcoords="offset points",
                      ha="right", fontsize=8, color=FAINT)  # fmt: skip
        axes.annotate("longer than in training", (math.log2(trained), 0), (4, 5), textcoords="offset points",
                      ha="left", fontsize=8, color=FAINT)  # fmt: skip
    axes.set_xlim(first - 0.4, last + 0.35)
    ticks = [tokens for tokens in seen if math.log2(tokens) == round(math.log2(tokens))]
    axes.set_xticks([first, *(math.log2(t) for t in ticks)], ["nothing", *map(_binary, ticks)])
    axes.set_xlabel("tokens of history that the agent has seen", fontsize=9, color=INK)
    axes.set_ylabel("return", fontsize=9, color=INK)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=8.5, labelcolor=INK)


def _draw_seeds(axes: "Axes", results: Sequence[Result], place: dict[int, float], colour: str) -> None:
    """Draws a thin line for each training seed, if there are 2 to 9 of them."""
    seeds = sorted({result.seed for result in results})
    if not 1 < len(seeds) < 10:
        return
    for seed in seeds:
        by_tokens: dict[int, list[float]] = {}
        for result in results:
            if result.seed == seed:
                by_tokens.setdefault(result.context_tokens, []).append(result.return_)
        tokens = sorted(by_tokens)
        axes.plot(
            [place[t] for t in tokens], [np.mean(by_tokens[t]) for t in tokens], color=colour, linewidth=0.7, alpha=0.7
        )


def _name(axes: "Axes", x: float, y: float, text: str, colour: str, *, below: bool = False) -> None:
    """Labels the end of a line, above it in bold; a control is labelled `below`, where no line has its label."""
    axes.annotate(text, (x, y), (0, -9 if below else 9), textcoords="offset points", ha="center", fontsize=9,
                  va="top" if below else "bottom", color=colour, fontweight="normal" if below else "bold",
                  annotation_clip=False)  # fmt: skip


def _caption(rows: Sequence[SummaryRow], trained: int | None, resamples: int) -> str:
    agents = [row for row in rows if row.agent != ORACLE]
    groups, seeds = max(row.groups for row in agents), max(row.seeds for row in agents)
    sentences = [
        "A world has so many places, each with a sign in sight and a goal out of it. The agent has visited the last of "
        "them once, and comes back to any one of them all.",
        f"Mean of {groups} queries × {seeds} training seed{'' if seeds == 1 else 's'}, 95 % percentile bootstrap over "
        f"{' or '.join(sorted({row.interval_over for row in agents}))}, {resamples:,} resamples.",
        "Dashed: prior + (known - prior) × share seen; prior is the return without history, known that where all of "
        "the smallest world was seen; nothing is fitted.",
    ]
    if any(row.control_of for row in rows):
        sentences.append("Crosses: the history of another world.")
    if trained:
        sentences.append(f"Trained on chains of at most {trained:,} tokens.")
    return " ".join(sentences + [note for note in summary_notes([], rows) if "seed" in note])


def _numbers(rows: Sequence[SummaryRow]) -> list[float]:
    return [n for row in rows for n in (row.mean, row.mean_ci_high) if math.isfinite(n)]


def _binary(tokens: int) -> str:
    return f"{tokens >> 10}K" if tokens >= 1024 and tokens % 1024 == 0 else short_number(tokens)


def _wrapped(text: str, width: int) -> str:
    return "\n".join(textwrap.wrap(text, width))
