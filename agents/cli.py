"""How every command of the stack ends: 0 when done, 2 with one message when the user must act, 130 when interrupted."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax

from data import cli
from rlring.errors import UsageError


class ConfigError(ValueError):
    """A config, a run folder or a command line that cannot work: what is wrong, what we got, what to do."""


class Diverged(ConfigError, FloatingPointError):  # noqa: N818 - what the run has done
    """A run whose numbers are no numbers any more."""


def run(body: Callable[[], object]) -> int:
    """Runs `body` and returns the exit status, the errors of the library and of configs printed like those of the
    data."""

    def within_memory() -> None:
        with memory_errors():
            body()

    return cli.run(within_memory, ConfigError, UsageError)


@contextmanager
def memory_errors() -> Iterator[None]:
    """Makes the many errors of memory that is not there one ConfigError."""
    try:
        yield
    except MemoryError as error:
        raise _out_of_memory(error) from None
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and "Out of memory" not in str(error):
            raise
        raise _out_of_memory(error) from None


def _out_of_memory(error: Exception) -> ConfigError:
    told = str(error).strip().partition("\n")[0].rstrip(".") or "out of memory"
    return ConfigError(
        f"the memory is full ({told}). Lower train.batch, model.width, model.layers, chain.trajectories or (to act) "
        "evaluate.groups, raise train.accumulate, or set model.remat."
    )
