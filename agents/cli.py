"""The exit status of every command: 0 on success, 2 with a message for a user error, 130 when interrupted."""

from collections.abc import Callable

from data import cli
from rlring.cli import memory_errors
from rlring.errors import UsageError


class ConfigError(ValueError):
    """An invalid config, run folder or command line. The message says what is wrong, what was given and what to do."""


LESS_MEMORY = (
    "Lower train.batch, model.width, model.layers, chain.trajectories or (to act) evaluate.groups, raise "
    "train.accumulate, or set model.remat."
)


class Diverged(ConfigError, FloatingPointError):  # noqa: N818 - reads as a state of the run
    """A run whose loss, gradient, weights or actions are not finite."""


def run(body: Callable[[], object]) -> int:
    """Runs `body` and returns the exit status. ConfigError, UsageError and the data errors are printed as one
    message."""

    def within_memory() -> None:
        with memory_errors(LESS_MEMORY):
            body()

    return cli.run(within_memory, ConfigError, UsageError)
