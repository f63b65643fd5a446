"""What the verbs rlring.bench and rlring.plan share: one-line errors, counts, and files written whole."""

import argparse
import importlib.metadata
import json
import os
from pathlib import Path
from typing import NoReturn

from rlring.errors import UsageError


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def count(text: str) -> int:
    """Returns a number that is at least 1: the type of an argument."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


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
