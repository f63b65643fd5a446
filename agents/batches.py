"""Training batches, prepared in advance by a thread of this process (grain) or by worker processes."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from types import FrameType

import grain.python as grain
import numpy as np
from jax.sharding import Mesh

from agents.agent import Agent, Batch, Sampler
from agents.cli import ConfigError
from agents.config import Config
from rlring.sharding import BatchPart

STOPS = (signal.SIGINT, signal.SIGTERM)
GRACE = 5.0  # seconds from SIGTERM until a worker exits


class Batches:
    """Makes this process' part of the batch of an update, padded and ordered for the mesh. Picklable, for worker
    processes."""

    def __init__(self, sampler: Sampler, rows: np.ndarray, places: np.ndarray):
        self.sampler, self.rows, self.places = sampler, rows, places

    def __call__(self, update: int) -> Batch:
        return self.sampler.sample(int(update), self.rows, self.places)


def batches(
    config: Config, agent: Agent, sampler: Sampler, first: int, mesh: Mesh | None
) -> Generator[tuple[int, Batch]]:
    """Yields (update, batch) from update `first` on, with the batch on the devices. Each process makes its part.

    The batches do not depend on `train.workers`. Closing the generator ends the workers; they also end when this
    process is killed. Raises ConfigError when a worker was killed.
    """
    order = agent.timestep_order(sampler.timesteps)
    order = np.arange(sampler.timesteps) if order is None else order
    part = BatchPart.of((config.train.batch, len(order)), mesh)
    make = Batches(sampler, part.rows, order[part.places])
    updates = range(first, config.train.updates)
    if config.train.workers:
        made = _by_processes(make, updates, config.train.workers, config.train.prefetch)
    else:
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=config.train.prefetch)
        made = iter(grain.MapDataset.range(updates.start, updates.stop).map(make).to_iter_dataset(options))
    try:
        for update, batch in zip(updates, made, strict=True):
            yield update, part.on_devices(batch)
    finally:
        made.close()


def _by_processes(make: Batches, updates: range, workers: int, prefetch: int) -> Generator[Batch]:
    """Yields the batch of every update in order, while up to `prefetch` + `workers` batches are being made.

    Grain's worker processes are not used: they survive when this process is killed, leave shared memory behind, and
    need the flags of an absl program.
    """
    spawn = multiprocessing.get_context("spawn")  # forking a process with JAX's threads can deadlock
    pool = ProcessPoolExecutor(max(1, min(workers, len(updates))), spawn, _begin_worker, (make,))
    ahead, under_way = iter(updates), deque()
    try:
        for _ in updates:
            with _signals_held():  # workers start with them blocked, so that Ctrl-C does not kill them
                while len(under_way) < prefetch + workers and (update := next(ahead, None)) is not None:
                    under_way.append(pool.submit(_make, update))
            yield under_way.popleft().result()
    except BrokenProcessPool:
        raise ConfigError(
            "a process that makes batches was killed, perhaps because the memory was full. Lower train.workers or "
            "train.prefetch, and continue with --resume."
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _signals_held() -> Iterator[None]:
    """Blocks SIGINT and SIGTERM in this context. Processes started within it inherit the blocked signals."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin_worker(make: Batches) -> None:
    """Initialises a worker, which ignores SIGINT, delays SIGTERM, and exits when the training process does."""
    global _make_batch
    _make_batch = make
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A cluster sends SIGTERM to all processes; the training process may need another batch before its checkpoint.
    signal.signal(signal.SIGTERM, _end_later)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_later(number: int, frame: FrameType | None) -> None:
    timer = threading.Timer(GRACE, os._exit, (1,))
    timer.daemon = True
    timer.start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


_make_batch: Batches


def _make(update: int) -> Batch:
    return _make_batch(update)
