"""What the verbs rlring.bench and rlring.plan share: one-line errors, counts, and files written whole."""

import argparse
import importlib.metadata
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import jax

from rlring.errors import UsageError


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def count(text: str) -> int:
    """Returns a number that is at least 1, and that an int32 holds: the type of an argument."""
    if not text.isdecimal() or len(text) > 10 or not 1 <= int(text) < 2**31:
        raise argparse.ArgumentTypeError(f"{text[:20]!r} is not a whole number of at least 1 and below 2^31")
    return int(text)


@contextmanager
def memory_errors(advice: str) -> Iterator[None]:
    """Makes the many errors of memory that is not there one UsageError, which says what to do."""
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        told = str(error).strip().partition("\n")[0].rstrip(".")
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in told and "Out of memory" not in told:
            raise
        raise UsageError(f"the memory is full ({told or 'out of memory'}). {advice}") from None


def version(package: str) -> str | None:
    """Returns the version of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_json(path: Path | None) -> None:
    """Raises UsageError, before the long work, where write_json() could not write."""
    if path is None:
        return
    if not path.absolute().parent.is_dir():
        raise UsageError(f"--json {path}: there is no folder {path.parent}. Make it first.")
    if path.is_dir():
        raise UsageError(f"--json {path}: that is a folder. Give the name of a file in it.")
    if not os.access(path.absolute().parent, os.W_OK):
        raise UsageError(f"--json {path}: nobody may write in {path.parent}. Choose another folder.")


def write_json(path: Path, content: dict) -> None:
    """Writes the file whole or not at all."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        unfinished.write_text(json.dumps(content, indent=1) + "\n")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
