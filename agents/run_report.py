"""The report of one run: its returns, its training loss, the paths and films of some episodes, in one page."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from agents.config import dump
from agents.film import check_video as check_video
from agents.film import write_films
from agents.paths_figure import draw_paths
from agents.plot import plot
from agents.report import write_report
from agents.results import Result
from agents.scenes import played_scenes
from agents.statistics import SummaryRow
from agents.training_figure import draw_training

if TYPE_CHECKING:
    from agents.evaluate import TrainedAgent

FOLDER = "looks"


def write_run_report(
    loaded: "TrainedAgent", rows: Sequence[SummaryRow], results: Sequence[Result]
) -> tuple[Path, list[Path]]:
    """Plays some episodes again, writes films and figures into `<run>/looks`, and writes `<run>/report.html` with all
    of them. Returns the path of the report and the paths of the films and figures.

    rows: the summary of `results`.
    """
    looks, name = loaded.folder / FOLDER, loaded.config.name
    looks.mkdir(exist_ok=True)
    scenes = played_scenes(loaded)
    drawn = plot(results, looks / "return_vs_context.png", name)
    training = draw_training({name: [loaded.folder]}, looks / "training.png")
    more = [*draw_paths(scenes, looks), *write_films(scenes, looks), *([training] if training else [])]
    path = loaded.folder / "report.html"
    command = f"python -m agents.evaluate {loaded.folder} --video"
    write_report(
        path,
        title=name,
        plot=drawn,
        more_plots=more,
        rows=rows,
        results=results,
        commands=[command],
        config=dump(loaded.config),
    )
    return path, [drawn.path, *(one.path for one in more)]
