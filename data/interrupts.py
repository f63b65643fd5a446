"""Handles Ctrl-C while a command imports its modules, which takes seconds: prints one line, like `data.cli` later."""

import os
import signal
import sys
from types import FrameType

INTERRUPTED = "interrupted; the same command (training: with --resume) continues or starts over cleanly"


def is_command() -> bool:
    """Returns whether this process is a command of `data` or `agents`, such as `python -m data.collect`."""
    words = sys.orig_argv
    return "-m" in words[:-1] and words[words.index("-m") + 1].startswith(("agents.", "data."))


def guard_imports() -> None:
    """Makes Ctrl-C end the process with one line, until `end_guard`. An interrupt raised within an import would show a
    traceback, or become another error of a library."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def end_guard() -> None:
    """Makes Ctrl-C raise KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(number: int, frame: FrameType | None) -> None:
    print(INTERRUPTED, file=sys.stderr, flush=True)
    os._exit(130)  # no work has begun, so there is nothing to clean up
