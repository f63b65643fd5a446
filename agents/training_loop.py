"""The loop of a training run: updates, what is logged of them, when a checkpoint is written, when it ends."""

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
    """What is known of an update that is logged."""

    update: int
    metrics: dict[str, float]
    updates_per_second: float
    """Since the last one that was logged."""


class Loop(NamedTuple):
    """A run's own parts of the loop."""

    folder: Path
    train: TrainConfig
    batches: Iterable[tuple[int, Any]]
    """Every update that is left, with its batch."""
    update: Callable[[TrainState, Any], tuple[TrainState, Mapping[str, jax.Array]]]
    loss: str
    """The metric that is the loss."""
    log: Callable[[Logged, tqdm], object]
    save: Callable[[int, TrainState, float], object]
    """Takes how many updates are done, the state after them, and the mean loss seen since the save before."""
    stops: Callable[[int], bool] = lambda done: False
    """Whether to checkpoint and end early."""


def run_updates(run: Loop, state: TrainState, first: int, bar: tqdm) -> tuple[TrainState, int]:
    """Makes the updates from `first` on; returns the state and how many updates are done: all, or those until a stop.

    Metrics are read, which waits for the devices, at the first update, at those logged and at those saved. Raises
    Diverged at the first of these whose metrics are not all numbers, so that none of them is saved.
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
