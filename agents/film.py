"""Frames of episodes, rendered by MuJoCo: as mp4 films, and as strips of frames side by side."""

import importlib
import importlib.util
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from agents.cli import ConfigError
from agents.config import Config
from agents.episodes import conditions
from agents.figure import FAINT, INK
from agents.image import write_image
from agents.plot import PlotResult
from agents.scenes import Scene, Take
from data.atomic_file import atomic_file
from data.dmc import Environment, make

_MOST_FRAMES = 250  # per film; longer episodes are subsampled, at the same playing time
_MOMENTS = 8


def check_video(config: Config) -> None:
    """Raises ConfigError when there is nothing to film, or frames cannot be rendered or written as mp4."""
    if not any(conditions(config)):
        raise ConfigError(
            f"--video knows no maps, and {', '.join(config.data.tasks)} is all that is evaluated; leave --video out"
        )
    if os.environ.get("MUJOCO_GL") == "disabled":
        raise ConfigError(
            "--video draws frames, and MUJOCO_GL is 'disabled': put MUJOCO_GL=egl before the command (osmesa where "
            "there is no EGL; both draw without a screen, and without a GPU)"
        )
    if any(importlib.util.find_spec(name) is None for name in ("imageio", "imageio_ffmpeg")):
        raise ConfigError('--video writes mp4 with imageio: pip install "imageio[ffmpeg]", or leave --video out')


def shoot(environment: Environment, take: Take, rows: Sequence[int]) -> np.ndarray:
    """Returns the rendered frames of the states `rows` of an episode, uint8 [F, 240, 320, 3]."""
    environment.set_extras(take.extras)
    frames = []
    for row in rows:
        environment.set_physics_state(take.states[row])
        frames.append(environment.render())
    return np.stack(frames)


def write_films(scenes: Sequence[Scene], folder: Path) -> list[PlotResult]:
    """Writes a strip of each task's scenes and an mp4 of each scene into `folder`, and returns them with captions."""
    shown = []
    for task in dict.fromkeys(scene.task for scene in scenes):
        environment = make(task, render_mode="rgb_array")
        environment.reset(seed=0)
        of_task = [scene for scene in scenes if scene.task == task]
        shown.append(_strip(environment, of_task, folder / f"film_{task}.png"))
        for scene in of_task:
            shown.append(_film(environment, scene, folder / f"film_{task}_{scene.label.replace(' ', '_')}.mp4"))
    return shown


def _film(environment: Environment, scene: Scene, path: Path) -> PlotResult:
    """Writes the episodes of a scene side by side. An episode that is over shows its last frame."""
    imageio = importlib.import_module("imageio.v3")  # an optional dependency, which brings ffmpeg along
    longest = max(len(take.states) for take in scene.takes)
    stride = -(-longest // _MOST_FRAMES)
    rows = np.arange(0, longest, stride)
    frames = [shoot(environment, take, np.minimum(rows, len(take.states) - 1)) for take in scene.takes]
    rate = environment.metadata["render_fps"] / stride
    with warnings.catch_warnings():
        # JAX warns about forks; this one executes ffmpeg at once.
        warnings.filterwarnings("ignore", message=r"os.fork\(\) was called", category=RuntimeWarning)
        content = imageio.imwrite(
            "<bytes>", np.concatenate(frames, axis=2), extension=".mp4", plugin="FFMPEG", fps=max(rate, 1.0)
        )
    with atomic_file(path) as file:
        file.write(content)
    returns = ", ".join(f"{take.total:.2f}" for take in scene.takes)
    return PlotResult(path, f"{scene.task}, {scene.label}: {len(scene.takes)} goals or starts; returns {returns}.", [])


def _strip(environment: Environment, scenes: Sequence[Scene], path: Path) -> PlotResult:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.45 * _MOMENTS, 1.35 * len(scenes) + 0.5), facecolor="white")
    grid = figure.subplots(len(scenes), _MOMENTS, squeeze=False)
    for scene, row in zip(scenes, grid, strict=True):
        take = scene.takes[0]
        moments = np.linspace(0, len(take.states) - 1, _MOMENTS).round().astype(int)
        for axes, moment, frame in zip(row, moments, shoot(environment, take, moments), strict=True):
            axes.imshow(frame)
            axes.set_axis_off()
            axes.set_title(f"step {moment}", fontsize=7, color=FAINT, pad=2)
        row[0].text(
            0, -28, f"{scene.label}: return {take.total:.2f}", fontsize=8.5, fontweight="bold", color=INK, va="bottom"
        )
    figure.subplots_adjust(
        left=0.01, right=0.99, bottom=0.02, top=1 - 0.45 / figure.get_figheight(), hspace=0.45, wspace=0.04
    )
    write_image(figure, path)
    what = " and ".join(scene.label for scene in scenes)
    return PlotResult(path, f"{scenes[0].task}: the first goal (or start) of the evaluation, {what}.", [])
