"""A pool of worker processes, which end when the work is interrupted or their parent is killed."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, Literal

from data.errors import DataError

_PATIENCE = 1.0  # seconds that a worker has to stop its call and clean up before it is killed

Submit = Callable[..., Future[Any]]


def check_workers(workers: int) -> None:
    """Raises DataError unless `workers` is at least 1 and at most 8 times the number of processors (or 32 if more)."""
    processors = os.cpu_count() or 1
    most = max(32, 8 * processors)
    if not 1 <= workers <= most:
        raise DataError(
            f"workers must be 1 to {most} on this machine, which has {processors} processors; got {workers}"
        )


@contextmanager
def worker_pool(workers: int) -> Iterator[Submit]:
    """Yields `submit(function, *arguments) -> Future`; the calls run in `workers` spawned processes.

    When an error or Ctrl-C ends the body, SystemExit is raised in the running calls, so that they can clean up; after a
    second their processes are killed. Calls that have not begun are cancelled. When this process is killed, even by
    SIGKILL, its workers end in the same way. DataError when a worker has died.
    """
    # spawn, because a forked child would inherit locks that threads of the parent hold (JAX, HDF5).
    context = multiprocessing.get_context("spawn")
    # Nothing is ever written to this pipe. The workers read its end when `parent` is closed, by this process or, when
    # this process is killed, by the system.
    child, parent = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(child,))
    started: set[BaseProcess] = set()

    def submit(function: Callable[..., Any], *arguments: object) -> Future[Any]:
        # A terminal sends Ctrl-C to every process. Workers inherit this signal mask, so only the parent handles it.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        others = set(multiprocessing.active_children()) - started
        try:
            return pool.submit(_call, function, *arguments)
        finally:
            started.update(set(multiprocessing.active_children()) - others)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    try:
        yield submit
    except BrokenProcessPool:
        raise DataError(
            f"a worker process died, as it does when memory runs out; try fewer workers (now {workers})"
        ) from None
    except BaseException:
        parent.close()
        _end(started)
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        parent.close()
        child.close()


def _end(processes: set[BaseProcess]) -> None:
    deadline = time.monotonic() + _PATIENCE
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    for process in processes:
        process.kill()


# --- in a worker ---

_state: Literal["idle", "working", "leaving"] = "idle"


def _start(pipe: Connection) -> None:
    signal.signal(signal.SIGUSR1, _leave)
    signal.signal(signal.SIGTERM, _leave)
    threading.Thread(target=_watch, args=(pipe,), daemon=True).start()


def _watch(pipe: Connection) -> None:
    pipe.poll(None)
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
    time.sleep(_PATIENCE)
    os._exit(1)


def _leave(number: int, frame: object) -> None:
    """Signal handler: ends the running call. Between calls only SIGTERM ends the process, because a result may be in
    transfer, and the parent would wait for the rest of it."""
    global _state
    if _state == "working":
        _state = "leaving"
        raise SystemExit
    if _state == "idle" and number == signal.SIGTERM:
        os._exit(1)


def _call(function: Callable[..., Any], *arguments: object) -> Any:
    global _state
    try:
        _state = "working"
        result = function(*arguments)
        _state = "idle"
    except SystemExit:
        os._exit(1)  # otherwise the executor would continue with the next call
    except BaseException:
        _state = "idle"
        raise
    return result
