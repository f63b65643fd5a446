"""Shared by the commands rlring.bench and rlring.plan: exit statuses, one-line errors, argument types, JSON files."""

import argparse
import importlib.metadata
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import jax

from rlring.errors import UsageError
from rlring.interrupts import INTERRUPTED, end_guard


class Parser(argparse.ArgumentParser):
    """An argument parser that reports an error in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def run(body: Callable[[], object]) -> int:
    """Runs `body` and returns the exit status: 0 for success, 2 for a UsageError or OSError, 130 when interrupted."""
    try:
        end_guard()
        body()
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        print(f"error: {error.strerror or error}{where}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(INTERRUPTED, file=sys.stderr)
        return 130
    return 0


def count(text: str) -> int:
    """Returns an argument as an integer of at least 1 that fits in an int32; an argparse type."""
    if not text.isdecimal() or len(text) > 10 or not 1 <= int(text) < 2**31:
        raise argparse.ArgumentTypeError(f"{text[:20]!r} is not a whole number of at least 1 and below 2^31")
    return int(text)


@contextmanager
def memory_errors(advice: str) -> Iterator[None]:
    """Context manager that turns out-of-memory errors of Python and JAX into a UsageError with `advice`."""
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        told = str(error).strip().partition("\n")[0].rstrip(".")
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in told and "Out of memory" not in told:
            raise
        raise UsageError(f"the memory is full ({told or 'out of memory'}). {advice}") from None


def version(package: str) -> str | None:
    """Returns the version of a package; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_json(path: Path | None) -> None:
    """Raises UsageError if write_json() could not write `path`; call it before long work. None is accepted."""
    if path is None:
        return
    if not path.absolute().parent.is_dir():
        raise UsageError(f"--json {path}: there is no folder {path.parent}. Make it first.")
    if path.is_dir():
        raise UsageError(f"--json {path}: that is a folder. Give the name of a file in it.")
    if not os.access(path.absolute().parent, os.W_OK):
        raise UsageError(f"--json {path}: nobody may write in {path.parent}. Choose another folder.")
    if path.exists() and not _is_measured(path):
        raise UsageError(
            f"--json {path}: that file holds something else than such measurements, and would be replaced. "
            "Choose another name, or move it."
        )


def write_json(path: Path, content: dict) -> None:
    """Writes `content` as JSON, atomically. It must have the command that made it as "command" or in "versions":
    UsageError if `path` has a file without one, which is not replaced."""
    check_json(path)  # checked again, because the file may have changed during the work
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        unfinished.write_text(json.dumps(content, indent=1) + "\n")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _is_measured(path: Path) -> bool:
    """Returns whether a file was written by write_json()."""
    try:
        content = json.loads(path.read_text())
    except (ValueError, RecursionError):  # not text, not JSON, or nested too deeply
        return False
    command = {**content.get("versions", {}), **content}.get("command") if isinstance(content, dict) else None
    return isinstance(command, str) and command.startswith("python -m ")
