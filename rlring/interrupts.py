"""Handles Ctrl-C while a command of this package imports its modules, which takes seconds: one line, no traceback.

`data.interrupts` does the same for the other commands. The code exists twice because neither package may import the
other.
"""

import os
import signal
import sys
from types import FrameType

INTERRUPTED = "interrupted; nothing was written, and the same command starts over"


def is_command() -> bool:
    """Returns whether this process is `python -m rlring.bench` or another command of this package."""
    words = sys.orig_argv
    return "-m" in words[:-1] and words[words.index("-m") + 1].startswith("rlring.")


def guard_imports() -> None:
    """Makes Ctrl-C end the process with one line, until `end_guard`. An interrupt raised within an import would show a
    traceback."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def end_guard() -> None:
    """Makes Ctrl-C raise KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(number: int, frame: FrameType | None) -> None:
    print(INTERRUPTED, file=sys.stderr, flush=True)
    os._exit(130)
