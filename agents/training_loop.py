"""The training loop: updates, logging, checkpoints and stopping."""

import math
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from agents.config import TrainConfig
from agents.continuation import diverged
from rlring.language_model import TrainState


class Logged(NamedTuple):
    """The values logged for an update."""

    update: int
    metrics: dict[str, float]
    updates_per_second: float
    """Rate since the previous logged update."""


class Loop(NamedTuple):
    """The parts of the training loop that depend on the run."""

    folder: Path
    train: TrainConfig
    batches: Iterable[tuple[int, Any]]
    """The remaining updates, each (index, batch)."""
    update: Callable[[TrainState, Any], tuple[TrainState, Mapping[str, jax.Array]]]
    loss: str
    """Name of the metric that is the loss."""
    log: Callable[[Logged, tqdm], object]
    save: Callable[[int, TrainState, float], object]
    """Called with the number of updates done, the state, and the mean of the losses read since the previous save."""
    stops: Callable[[int], bool] = lambda done: False
    """Called with the number of updates done. Returns whether to write a checkpoint and end early."""


def run_updates(run: Loop, state: TrainState, first: int, bar: tqdm) -> tuple[TrainState, int]:
    """Makes the updates from `first` on. Returns the state and the number of updates done, which is smaller than
    `train.updates` after an early stop.

    Metrics are read, which waits for the devices, only at the first update and at updates that are logged or saved.
    Raises Diverged when metrics that are read are not finite; such a state is never saved.
    """
    last_time, last_logged, saved, done, losses = time.monotonic(), first, first, first, []
    for update, batch in run.batches:
        state, metrics = run.update(state, batch)
        done = update + 1
        ends = done == run.train.updates or run.stops(done)
        saves = ends or done % run.train.checkpoint_every == 0
        logs = ends or done % run.train.log_every == 0
        if saves or logs or done == first + 1:
            values = {name: float(value) for name, value in metrics.items()}
            _refuse_nan(values, run.folder, done, saved)
            losses.append(values[run.loss])
        if logs:
            now = time.monotonic()
            run.log(Logged(update, values, (done - last_logged) / max(now - last_time, 1e-9)), bar)
            last_time, last_logged = now, done
        bar.update()
        if saves:
            run.save(done, state, float(np.mean(losses)))
            saved, losses = done, []
        if ends:
            break
    return state, done


def _refuse_nan(values: dict[str, float], folder: Path, done: int, saved: int) -> None:
    bad = [name for name, value in values.items() if not math.isfinite(value)]
    if bad:
        raise diverged(folder, ", ".join(bad), update=done, saved=saved)
