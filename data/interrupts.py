"""Ctrl-C while the modules of a command are imported, which takes seconds: one line, as later (`data.cli`)."""

import os
import signal
import sys
from types import FrameType

INTERRUPTED = "interrupted; the same command (training: with --resume) continues or starts over cleanly"


def is_command() -> bool:
    """Whether this process is one of our commands, such as `python -m data.collect`."""
    words = sys.orig_argv
    return "-m" in words[:-1] and words[words.index("-m") + 1].startswith(("agents.", "data."))


def guard_imports() -> None:
    """Answers Ctrl-C until `end_guard`: an interrupt that is raised within an import shows as a traceback, or as some
    other error of a library."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def end_guard() -> None:
    """From here on Ctrl-C is KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(number: int, frame: FrameType | None) -> None:
    print(INTERRUPTED, file=sys.stderr, flush=True)
    os._exit(130)  # nothing is begun
