"""The plot of the paths of the point mass and of the reacher's finger, with and without a context."""

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from agents.figure import FAINT, INK
from agents.image import write_image
from agents.plot import COLOURS, GREY, PlotResult
from agents.scenes import Scene, Take
from data.dmc import Environment, make
from data.tasks import goal_task
from data.tasks.dark import ReacherDark

_PLACES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "point_mass": lambda states: states[..., :2],
    "point_mass_maze": lambda states: states[..., :2],
    "pointmass": lambda states: states[..., :2],
    "reacher": ReacherDark().hindsight_goal,
}


def draw_paths(scenes: Sequence[Scene], folder: Path) -> list[PlotResult]:
    """Draws `paths_<task>.png` for every task of a body that moves in a plane, and returns them with captions."""
    drawn = []
    for task in dict.fromkeys(scene.task for scene in scenes):
        if task.split("-")[0] in _PLACES:
            drawn.append(_draw(task, [scene for scene in scenes if scene.task == task], folder / f"paths_{task}.png"))
    return drawn


def _draw(task: str, scenes: Sequence[Scene], out: Path) -> PlotResult:
    from matplotlib.figure import Figure
    from matplotlib.patches import Circle

    place, count = _PLACES[task.split("-")[0]], len(scenes[0].takes)
    environment = make(task)
    environment.reset(seed=0)
    figure = Figure(figsize=(2.9 * count, 3.9), facecolor="white")
    panels = figure.subplots(1, count, squeeze=False)[0]
    for column, axes in enumerate(panels):
        goal, radius = _goal(environment, scenes[0].takes[column])
        axes.add_patch(Circle(tuple(goal), radius, facecolor="#F2D98B", edgecolor="#B58900", linewidth=0.8))
        for index, scene in enumerate(scenes):
            # The last scene has the longest context, and is emphasised.
            colour = COLOURS[0] if index == len(scenes) - 1 else GREY
            path = place(scene.takes[column].states)
            label = f"{scene.label}: {scene.takes[column].total:.1f}"
            axes.plot(*path.T, "-o", color=colour, linewidth=1.4, markersize=2.2, label=label)
        axes.plot(*path[0], "s", color=INK, markersize=4)
        axes.set_aspect("equal", adjustable="datalim")
        axes.tick_params(length=0, labelsize=6.5, labelcolor=FAINT)
        axes.legend(frameon=False, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, 1.17), borderpad=0)
        axes.spines[:].set_color("#E4E4E4")
    caption = (
        f"{task}: paths (metres) of {count} episodes from the square on, a point a step, over the goal. "
        "Above: their returns."
    )
    figure.subplots_adjust(left=0.06, right=0.98, bottom=0.16, top=0.84, wspace=0.25)
    figure.text(0.03, 0.06, textwrap.fill(caption, 140), ha="left", va="top", fontsize=7.5, color=FAINT)
    write_image(figure, out)
    return PlotResult(out, caption, [])


def _goal(environment: Environment, take: Take) -> tuple[np.ndarray, float]:
    """Returns the position [2] and the radius of the goal of an episode, in metres."""
    hidden = goal_task(environment.task_name)
    if hidden is not None:
        return take.extras["goal"], hidden.radius
    environment.set_extras(take.extras)
    model = environment.physics.named.model
    return model.geom_pos["target", ["x", "y"]], float(model.geom_size["target", 0])
