"""Training in several processes, and how any of them is asked to stop."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from agents.checkpoint import Checkpoints
from agents.cli import ConfigError
from data import DataError
from data.atomic_file import lock
from rlring import processes


def check_processes(mesh: Mesh | None) -> None:
    """All processes take part, each with all of its devices."""
    total = jax.process_count() * jax.local_device_count()
    if jax.process_count() > 1 and (mesh is None or mesh.size != total):
        raise ConfigError(
            f"{jax.process_count()} processes have {total} devices, and all of them take part; the mesh has "
            f"{1 if mesh is None else mesh.size}. Change mesh.data, mesh.ring or mesh.ulysses."
        )


def wait_for_all(what: str) -> None:
    """Waits until every process is here: what the first one has written is there."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Holds the folder of a run, or of a sweep, for the first process; DataError when another command trains it.

    The lock is a file beside the folder, which may move or vanish meanwhile; it dies with its process.
    """
    if processes() > 1 and jax.process_index():  # asked of one process, JAX would start its devices
        yield
        return
    path = folder.with_name(f".{folder.name}.training")
    message = f"another process trains {folder} right now; wait for it, or choose another name=..."
    made = [parent for parent in path.parents if not parent.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        lock(file, message)
        if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
            raise DataError(message)  # the other one ended between our opening and our locking
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            with suppress(OSError):  # not empty: the run is in it
                for parent in made:
                    parent.rmdir()


@contextmanager
def stop_requests(checkpoints: Checkpoints):
    """Gives a function of the update that tells whether the process was asked to stop (Ctrl-C, SIGTERM): the loop then
    checkpoints and ends. Of several processes all learn of it at the same update."""
    if jax.process_count() > 1:
        yield checkpoints.is_asked_to_end  # JAX watches for SIGTERM
        return
    asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt  # asked twice: at once
        asked = True

    try:
        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: signals are somebody else's
        before = {}
    try:
        yield lambda update: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
