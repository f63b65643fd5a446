"""Training in several processes: coordination, locks, and requests to stop."""

import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from agents.checkpoint import Checkpoints
from agents.cli import ConfigError
from data import DataError
from data.atomic_file import held
from data.cli import describe
from rlring import UsageError, processes

Made = TypeVar("Made")
LONGEST_TOLD = 4096  # bytes of an error message that is broadcast


def check_processes(mesh: Mesh | None) -> None:
    """Raises ConfigError unless the mesh has all devices of all processes."""
    total = jax.process_count() * jax.local_device_count()
    if jax.process_count() > 1 and (mesh is None or mesh.size != total):
        raise ConfigError(
            f"{jax.process_count()} processes have {total} devices, and all of them take part; the mesh has "
            f"{1 if mesh is None else mesh.size}. Change mesh.data, mesh.ring or mesh.ulysses."
        )


def run_on_first_process(step: Callable[[], Made]) -> Made | None:
    """Runs `step` in the first process while the others wait. Returns its result there, and None in the others.

    When it fails with a user error, all processes raise it, so that none is left waiting.
    """
    if jax.process_count() == 1:
        return step()
    result, error = None, None
    if jax.process_index() == 0:
        try:
            result = step()
        except (ConfigError, DataError, UsageError, OSError) as failed:
            error = failed
    told = _told("" if error is None else describe(error) if isinstance(error, OSError) else str(error))
    if error is not None:
        raise error
    if told:
        raise ConfigError(f"the first process says: {told}")
    return result


def _told(text: str) -> str:
    """Returns the first process's text in all processes, cut at LONGEST_TOLD bytes."""
    letters = np.zeros(LONGEST_TOLD, np.uint8)
    written = np.frombuffer(text.encode()[:LONGEST_TOLD], np.uint8)
    letters[: len(written)] = written
    return np.asarray(multihost_utils.broadcast_one_to_all(letters)).tobytes().rstrip(b"\0").decode(errors="replace")


@contextmanager
def training_lock(folder: Path) -> Iterator[None]:
    """Holds a lock on the folder of a run or a sweep. Raises DataError when another command holds it. With several
    processes, the first takes the lock; when it cannot, the others raise ConfigError.

    The lock is a file beside the folder, which itself may be moved or deleted meanwhile. It ends with the process.
    """
    path = folder.with_name(f".{folder.name}.training")
    message = f"another process trains {folder} right now; wait for it, or choose another name=..."
    with ExitStack() as locks:

        def hold() -> None:
            for parent in [parent for parent in path.parents if not parent.exists()][::-1]:
                parent.mkdir(exist_ok=True)
                locks.callback(_remove_empty, parent)
            locks.enter_context(held(path, message))

        if processes() == 1:  # jax.process_count() would initialise the devices
            hold()
        else:
            run_on_first_process(hold)
        yield


@contextmanager
def evaluation_lock(folder: Path) -> Iterator[None]:
    """Holds a lock on the results of a run. Raises DataError when another command is evaluating it."""
    with held(folder / ".evaluating", f"another process evaluates {folder} right now; wait for it to end"):
        yield


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):  # not empty: the run is in it
        folder.rmdir()


@contextmanager
def stop_requests(checkpoints: Checkpoints):
    """Yields a function of the update that returns whether to stop (after Ctrl-C or SIGTERM): the loop then writes a
    checkpoint and ends. With several processes, all of them stop at the same update."""
    if jax.process_count() > 1:
        yield checkpoints.is_asked_to_end  # JAX handles SIGTERM
        return
    with asked_to_stop() as asked:
        yield lambda update: asked()


@contextmanager
def asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Yields a function that returns whether this process was asked to stop (Ctrl-C, SIGTERM). A second request raises
    KeyboardInterrupt at once."""
    asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt  # the second request
        asked = True

    try:
        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread, which alone can handle signals
        before = {}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
