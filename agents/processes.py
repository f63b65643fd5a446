"""Training in several processes, and how any of them is asked to stop."""

import signal
from contextlib import contextmanager
from types import FrameType

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from agents.checkpoint import Checkpoints
from agents.cli import ConfigError


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
