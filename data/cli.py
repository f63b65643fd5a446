"""How every command of this package ends: an exit status, and one line on stderr for what the user can mend."""

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
    """An argparse parser whose errors are one line, like all others."""

    def error(self, message: str) -> NoReturn:
        """Prints the message and ends with status 2."""
        self.exit(2, f"error: {message}; `{self.prog} --help` lists what there is\n")


def named_path(name: str, value: str | Path) -> Path:
    """Returns the path that a setting names; DataError when it names none, which would be the current folder."""
    if not str(value).strip():
        raise DataError(f"{name} is empty; name a path")
    return Path(value)


def run(body: Callable[[], object], *errors: type[Exception]) -> int:
    """Runs `body` and returns the exit status: 0 done, 2 the user's data, arguments or disk at fault, 130 interrupted.

    Only DataError, OSError and the caller's own `errors` become a one-line message; everything else is a bug of ours
    and keeps its traceback.
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
    """Prints a line of its own: progress bars, which end without one, are closed first."""
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()
    print(text, file=sys.stderr)


def describe(error: OSError) -> str:
    """Returns an error of the system in words."""
    where = f" {error.filename}" if error.filename else ""
    if error.errno in DISK_FULL:
        return f"the disk is full: could not write{where} ({error.strerror}); free some space or choose another --out"
    if error.strerror:
        return f"{error.strerror}:{where}" if where else error.strerror
    return str(error)
