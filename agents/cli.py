"""How every command of the stack ends: 0 when done, 2 with one message when the user must act, 130 when interrupted."""

from collections.abc import Callable

from data import cli
from rlring.errors import UsageError


class ConfigError(ValueError):
    """A config, a run folder or a command line that cannot work: what is wrong, what we got, what to do."""


def run(body: Callable[[], object]) -> int:
    """Runs `body` and returns the exit status, the errors of the library and of configs printed like those of the
    data."""
    return cli.run(body, ConfigError, UsageError)
