"""How every command of the stack ends: 0 when done, 2 with one message when the user must act, 130 when interrupted."""

from collections.abc import Callable

from data import cli
from rlring.cli import memory_errors
from rlring.errors import UsageError


class ConfigError(ValueError):
    """A config, a run folder or a command line that cannot work: what is wrong, what we got, what to do."""


LESS_MEMORY = (
    "Lower train.batch, model.width, model.layers, chain.trajectories or (to act) evaluate.groups, raise "
    "train.accumulate, or set model.remat."
)


class Diverged(ConfigError, FloatingPointError):  # noqa: N818 - what the run has done
    """A run whose numbers are no numbers any more."""


def run(body: Callable[[], object]) -> int:
    """Runs `body` and returns the exit status, the errors of the library and of configs printed like those of the
    data."""

    def within_memory() -> None:
        with memory_errors(LESS_MEMORY):
            body()

    return cli.run(within_memory, ConfigError, UsageError)
