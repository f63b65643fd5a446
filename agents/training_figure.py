"""The plot of the training loss against updates, for one run or the arms of a sweep."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from agents.checkpoint import read_metrics
from agents.figure import FAINT, GRID, INK
from agents.image import write_image
from agents.plot import COLOURS, PlotResult

_LOSS = "loss/action"
_START = 0.05  # share of the updates left out of the y range: the first losses would flatten all others


def draw_training(arms: Mapping[str, Sequence[Path]], out: Path) -> PlotResult | None:
    """Draws the loss of every run into `out`, a colour per arm. Returns None if no run has logged two losses.

    arms: run folders by arm name. Raises DataError when `out` is an existing file that is not a plot.
    """
    logged = {name: [_losses(folder) for folder in folders] for name, folders in arms.items()}
    logged = {name: [line for line in lines if line.shape[1] > 1] for name, lines in logged.items()}
    logged = {name: lines for name, lines in logged.items() if lines}
    if not logged:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 3.9), facecolor="white")
    axes = figure.add_axes((0.1, 0.26, 0.86, 0.62))
    late = []
    for index, (name, lines) in enumerate(logged.items()):
        for number, (updates, losses) in enumerate(lines):
            label = name.replace("_", " ") if number == 0 else None
            axes.plot(updates, losses, color=COLOURS[index % len(COLOURS)], linewidth=1.2, label=label)
            late.append(losses[updates >= _START * updates[-1]])
    low, high = np.min(np.concatenate(late)), np.max(np.concatenate(late))
    room = 0.05 * (high - low or 1.0)
    axes.set_ylim(low - room, high + room)
    axes.set_xlabel("update", fontsize=8.5, color=FAINT)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.tick_params(length=0, labelsize=8.5, labelcolor=INK)
    axes.legend(frameon=False, fontsize=8.5)
    seeds = max(len(lines) for lines in logged.values())
    caption = "Loss of the actions in training, as metrics.jsonl has it" + (
        f"; a line for each of up to {seeds} seeds. " if seeds > 1 else ". "
    )
    if len(logged) > 1:
        caption += "Agents of another kind have other losses; such lines are not to be compared."
    figure.text(0.03, 0.97, "Training", ha="left", va="top", fontsize=12.5, fontweight="bold", color=INK)
    figure.text(0.03, 0.1, textwrap.fill(caption, 120), ha="left", va="top", fontsize=7.5, color=FAINT)
    write_image(figure, out)
    return PlotResult(out, caption.strip(), [])


def _losses(folder: Path) -> np.ndarray:
    """Returns the updates and losses of a run's log, [2, N]."""
    entries = [(entry["step"], entry[_LOSS]) for entry in read_metrics(folder / "metrics.jsonl") if _LOSS in entry]
    return np.array(entries, float).reshape(-1, 2).T
