"""Draws curves with intervals, labelled at their ends. `agents.plot` decides what is drawn."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Float

from agents.image import text_width, title_size

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FAINT, GRID = "#222222", "#666666", "#E4E4E4"
DASHES = {
    "agent": "-",
    "flat": (0, (1, 1.5)),
    "foreign": (0, (4, 2)),
    "null": (0, (1, 1.5)),
    "predicted": (0, (3, 1.5)),
    "oracle": (0, (7, 3)),
}

# Inches.
PANEL_WIDTH, PANEL_HEIGHT = 4.5, 3.1
LEFT, RIGHT, HEAD, BETWEEN, TICKS, CAPTION_LINE = 0.95, 0.2, 0.8, 0.4, 0.55, 0.15


class Point(NamedTuple):
    """A point of a curve: the context, the value with its interval, and the other average of the same values (NaN: not
    drawn).
    """

    trajectories: int
    tokens: int
    value: float
    low: float
    high: float
    other: float


@dataclass(frozen=True, slots=True)
class Curve:
    """A labelled curve.

    kind: "agent"; "foreign", its control; "flat", an agent without context; "oracle"; "null", the expected maximum of
    independent episodes; "predicted", the prediction of `agents.prediction`.
    """

    label: str
    kind: str
    colour: str
    points: tuple[Point, ...]


def compose(
    panels: Mapping[str, Sequence[Curve]],
    *,
    title: str,
    subtitle: str,
    caption: str,
    x_name: str,
    logarithmic: bool,
) -> "Figure":
    """Returns a figure with one panel per task, two in a row, above a caption."""
    from matplotlib.figure import Figure  # slow to import; no pyplot, so no window and nothing global

    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    margin = max(text_width(line) for drawn in panels.values() for curve in drawn for line in _wrap(curve.label)) + 0.3
    cell_width, cell_height = LEFT + PANEL_WIDTH + margin, BETWEEN + PANEL_HEIGHT + TICKS
    width = columns * cell_width + RIGHT
    below = textwrap.wrap(caption, int(width * 17))
    height = HEAD - BETWEEN * (len(panels) == 1) + rows * cell_height + CAPTION_LINE * (len(below) + 1.2)
    figure = Figure(figsize=(width, height), facecolor="white")

    def write(x: float, y: float, text: str, **style) -> None:
        figure.text(x / width, y / height, text, ha="left", va="top", **style)

    write(0.25, height - 0.2, title, fontsize=title_size(title, width - 0.5), fontweight="bold", color=INK)
    write(0.25, height - 0.47, subtitle, fontsize=9, color=FAINT)
    write(0.25, CAPTION_LINE * (len(below) + 0.5), "\n".join(below), fontsize=7.5, color=FAINT, linespacing=1.35)
    for index, (task, drawn) in enumerate(panels.items()):
        row, column = divmod(index, columns)
        left = column * cell_width + LEFT
        bottom = height - HEAD + BETWEEN * (len(panels) == 1) - (row + 1) * cell_height + TICKS
        axes = figure.add_axes((left / width, bottom / height, PANEL_WIDTH / width, PANEL_HEIGHT / height))
        if len(panels) > 1:
            axes.set_title(task, loc="left", fontsize=9.5, fontweight="bold", color=INK)
        _draw(axes, drawn, x_name=x_name, logarithmic=logarithmic)
    return figure


def _draw(axes: "Axes", drawn: Sequence[Curve], *, x_name: str, logarithmic: bool) -> None:
    contexts = sorted({point.trajectories for curve in drawn for point in curve.points if curve.kind != "oracle"})
    place = _places(contexts, logarithmic)
    ends = (place[contexts[0]] - 0.35, place[contexts[-1]] + 0.25)
    axes.set_xlim(*ends)
    dashed = [curve for curve in drawn if curve.kind in ("agent", "foreign")]
    anchors = []
    for curve in drawn:
        x = np.array([place[point.trajectories] for point in curve.points if point.trajectories in place])
        y, low, high, other = np.array([point[2:] for point in curve.points]).T
        behind = curve.kind in ("oracle", "null", "predicted", "flat")
        style = {"color": curve.colour, "linestyle": DASHES[curve.kind], "zorder": 2 if behind else 3}
        if curve.kind in ("oracle", "flat"):
            axes.axhline(y[0], linewidth=1.3, **style)
            axes.axhspan(low[0], high[0], color=curve.colour, alpha=0.08, linewidth=0, zorder=1)
            anchors.append((ends[1], y[0]))
            continue
        axes.plot(x, y, linewidth=1.3 if curve.kind in ("foreign", "null", "predicted") else 2.2, **style)
        axes.fill_between(x, low, high, color=curve.colour, alpha=0.16 if curve.kind == "agent" else 0.08, linewidth=0)
        if curve in dashed:
            size = 5 if curve.kind == "agent" else 3.5
            axes.plot(x, y, "o", color=curve.colour, markersize=size, markeredgecolor="white", zorder=4)
            # Shifted sideways, so that the marks of several curves do not overlap.
            beside = x + 0.055 * (dashed.index(curve) - (len(dashed) - 1) / 2) * (ends[1] - ends[0]) / 5.6
            axes.plot(beside, other, "_", color=curve.colour, markersize=6, markeredgewidth=1.6, zorder=4)
        if len(x) == 1:
            axes.vlines(x, low, high, color=curve.colour, linewidth=1.2, zorder=3)
        anchors.append((x[-1], y[-1]))
    _scale(axes, drawn)
    _label_contexts(axes, contexts, place, drawn, x_name)
    _label_curves(axes, drawn, anchors)


def _scale(axes: "Axes", drawn: Sequence[Curve]) -> None:
    seen = [
        number
        for curve in drawn
        for point in curve.points
        for number in (point.value, point.low, point.high, point.other)
        if math.isfinite(number)
    ]
    low, high = min(0.0, *seen), max(0.0, *seen)
    room = 0.05 * (high - low or 1.0)
    axes.set_ylim(low - (room if low < 0 else 0.5 * room), high + room)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0, labelsize=8.5, labelcolor=INK)
    axes.tick_params(axis="x", length=3, color=FAINT, labelsize=8.5, labelcolor=INK)


def _places(contexts: Sequence[int], logarithmic: bool) -> dict[int, float]:
    """Returns the x position of each number of trajectories: log2 if logarithmic, with 0 one step before the others."""
    if not logarithmic:
        return {count: float(count) for count in contexts}
    smallest = next((count for count in contexts if count), 1)
    return {count: math.log2(count) if count else math.log2(smallest) - 1 for count in contexts}


def _label_contexts(
    axes: "Axes", contexts: Sequence[int], place: Mapping[int, float], drawn: Sequence[Curve], x_name: str
) -> None:
    """Labels the x axis with the numbers of trajectories and, where known, the numbers of tokens below them."""
    tokens: dict[int, set[int]] = {count: set() for count in contexts}
    for curve in drawn:
        if curve.kind == "agent":
            for point in curve.points:
                tokens[point.trajectories].add(point.tokens)
    known = any(max(numbers, default=0) for numbers in tokens.values())
    names = [f"{count}\n{_tokens(tokens[count])}" if known else str(count) for count in contexts]
    heading = f"{x_name}\ntokens" if known else x_name
    left, right = axes.get_xlim()
    written = math.inf
    for index in reversed(range(len(contexts))):  # the largest context is always labelled
        if (written - place[contexts[index]]) * PANEL_WIDTH / (right - left) < 0.085 * _longest_line(names[index]):
            names[index] = ""
        else:
            written = place[contexts[index]]
    axes.set_xticks([place[count] for count in contexts], names, linespacing=1.45)
    axes.annotate(
        heading,
        (0, 0),
        (-4, -6.5),
        xycoords="axes fraction",
        textcoords="offset points",
        ha="right",
        va="top",
        fontsize=8.5,
        color=FAINT,
        linespacing=1.45,
        annotation_clip=False,
    )


def _tokens(numbers: set[int]) -> str:
    positive = sorted(number for number in numbers if number) or [0]
    ends = dict.fromkeys([short_number(positive[0]), short_number(positive[-1])])
    return "–".join(ends)


def _longest_line(text: str) -> int:
    return max(map(len, text.split("\n")))


def short_number(number: int) -> str:
    """Returns a number with at most three digits and a suffix: 272, 1.09K, 512K, 16.8M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "K")):
        if number >= size * 0.9995:
            return f"{float(f'{number / size:.3g}'):g}{letter}"
    return str(number)


def _label_curves(axes: "Axes", drawn: Sequence[Curve], anchors: Sequence[tuple[float, float]]) -> None:
    """Writes the labels right of the axes, as near to the ends of their curves as possible without overlap."""
    labels = [_wrap(curve.label) for curve in drawn]
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    ends = np.array(anchors) - (left, bottom)
    ends *= 72 * np.array([PANEL_WIDTH / (right - left), PANEL_HEIGHT / (top - bottom)])  # in points
    heights = np.array([11.5 * len(label) + 3 for label in labels])
    centres = spread(ends[:, 1], heights, -12.0, 72 * PANEL_HEIGHT + 12.0)
    for curve, label, anchor, end, centre in zip(drawn, labels, anchors, ends, centres, strict=True):
        axes.annotate(
            "\n".join(label),
            anchor,
            (72 * PANEL_WIDTH + 14 - end[0], centre - end[1]),
            textcoords="offset points",
            ha="left",
            va="center",
            fontsize=9,
            linespacing=1.15,
            color=curve.colour,
            fontweight="bold" if curve.kind == "agent" else "normal",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": curve.colour,
                "linewidth": 0.7,
                "alpha": 0.6,
                "shrinkA": 1,
                "shrinkB": 4,
                "relpos": (0, 0.5),
            },
        )


def spread(
    wanted: Float[np.ndarray, " n"], heights: Float[np.ndarray, " n"], low: float, high: float
) -> Float[np.ndarray, " n"]:
    """Returns centres for labels of the given heights such that no labels overlap. They are as near to `wanted` as
    possible (least squares, same order), and within [low, high] if they fit.

    Uses pool adjacent violators on the centres minus the heights of the labels below.
    """
    order = np.argsort(wanted, kind="stable")
    height = heights[order]
    room = np.cumsum(height) - height[0] / 2 - height / 2
    pools: list[tuple[float, int]] = []
    for centre in wanted[order] - room:
        pools.append((float(centre), 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (upper, above), (lower, below) = pools.pop(), pools.pop()
            pools.append(((upper * above + lower * below) / (above + below), above + below))
    even = np.concatenate([np.full(size, centre) for centre, size in pools])
    lowest, highest = low + height[0] / 2, high - height[-1] / 2 - room[-1]
    placed = np.empty(len(wanted))
    placed[order] = np.clip(even, lowest, max(lowest, highest)) + room
    return placed


def _wrap(label: str) -> list[str]:
    return textwrap.wrap(label, 22, break_long_words=False)
