"""Exit statuses and error messages of this package's commands: one line on stderr for errors that a user can mend."""

import argparse
import errno
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

from data.errors import DataError
from data.interrupts import INTERRUPTED, end_guard

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Parser(argparse.ArgumentParser):
    """An argparse parser that reports an error in one line, as the commands report all errors."""

    def error(self, message: str) -> NoReturn:
        """Prints the message and exits with status 2."""
        self.exit(2, f"error: {message}; `{self.prog} --help` lists what there is\n")


def named_path(name: str, value: str | Path) -> Path:
    """Returns `value` as a path; DataError when it is empty, because Path("") would be the current folder."""
    if not str(value).strip():
        raise DataError(f"{name} is empty; name a path")
    return Path(value)


def run(body: Callable[[], object], *errors: type[Exception]) -> int:
    """Runs `body` and returns the exit status: 0 for success, 2 for an error in the user's data, arguments or disk, 130
    for an interrupt.

    DataError, OSError and the exception types `errors` become a one-line message. Any other exception is a bug, and
    keeps its traceback.
    """
    try:
        end_guard()
        body()
    except (DataError, *errors) as error:
        say(f"error: {error}")
        return 2
    except OSError as error:
        say(f"error: {describe(error)}")
        return 2
    except KeyboardInterrupt:
        say(INTERRUPTED)
        return 130
    return 0


def say(text: str) -> None:
    """Prints a line to stderr. Closes open progress bars first, because they do not end with a newline."""
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()
    print(text, file=sys.stderr)


def describe(error: OSError) -> str:
    """Returns a one-line message for an error of the operating system."""
    where = f" {error.filename}" if error.filename else ""
    if error.errno in DISK_FULL:
        return f"the disk is full: could not write{where} ({error.strerror}); free some space or choose another --out"
    if error.strerror:
        return f"{error.strerror}:{where}" if where else error.strerror
    return str(error)
