"""Atomic writes of files and folders: they appear complete or not at all, even if the disk is full or the writer is
killed.
"""

import errno
import fcntl
import io
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from data.errors import DataError


class Sink(io.FileIO):
    """A file that stores its first write error instead of raising it; `check` raises it.

    After a failed write, HDF5 keeps inconsistent state and crashes the interpreter on exit (measured: segmentation
    fault after ENOSPC). So HDF5 must not see the error: after the first one, writes are discarded. A KeyboardInterrupt
    is treated alike, because it may arrive in the middle of a write.
    """

    failure: OSError | KeyboardInterrupt | None = None

    def write(self, block: memoryview) -> int:  # type: ignore[override]
        view = memoryview(block).cast("B")
        written = 0
        while self.failure is None and written < len(view):
            try:
                written += super().write(view[written:])
            except (OSError, KeyboardInterrupt) as error:
                self.failure = error
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        if self.failure is None:
            try:
                return super().truncate(size)
            except (OSError, KeyboardInterrupt) as error:
                self.failure = error
        return size or 0

    def check(self) -> None:
        if self.failure is not None:
            raise self.failure


@contextmanager
def atomic_file(path: Path, *, check_old: Callable[[Path], None] | None = None) -> Iterator[Sink]:
    """Yields a file that becomes `path` if the body succeeds, and vanishes if it does not.

    An existing file at `path` is replaced. `check_old(path)` may prevent that by raising DataError. It is called before
    the body and again after it, because the body may take hours. DataError also when `path` exists and is not a file (a
    folder, a device, a broken link), and when another process is writing to it.
    """
    _check_old(path, check_old)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The temporary name is fixed, and locked until this process ends. So the next writer overwrites what a killed one
    # left, and two writers at once notice each other.
    temporary = temporary_name(path)
    try:
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        error.filename = str(path)
        raise
    with Sink(descriptor, "r+") as sink:
        _lock(sink, temporary, path)
        try:
            sink.truncate(0)
            yield sink
            sink.check()
            os.fsync(sink.fileno())
            _check_old(path, check_old)
            os.replace(temporary, path)
        except BaseException as error:
            temporary.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.filename is None:
                error.filename = str(path)
            raise


def write_text(path: Path, text: str) -> None:
    """Writes a small text file atomically."""
    with atomic_file(path) as file:
        file.write(memoryview(text.encode()))


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yields a folder that becomes `path` if the body succeeds, and is deleted if it does not.

    A folder left by a killed writer is deleted first. DataError when `path` exists, and when another process is writing
    to it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        with held(Path(f"{temporary}.lock"), f"another process is writing {path} right now; wait for it"):
            refuse_existing(path)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            try:
                yield temporary
                refuse_existing(path)
                temporary.rename(path)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        if str(error.filename or temporary).startswith(str(temporary)):
            error.filename = str(path)
        raise


def refuse_existing(path: Path) -> None:
    """Raises DataError when `path` exists."""
    if os.path.lexists(path):
        raise DataError(f"{path} exists already; choose another --out, or delete it")


def temporary_name(path: Path) -> Path:
    """Returns the name that a file has until it is complete: hidden, in the same folder, and used by nobody else."""
    return path.with_name(f".{path.name}.rlring-partial")


def _check_old(path: Path, check_old: Callable[[Path], None] | None) -> None:
    if os.path.lexists(path) and not path.is_file():
        raise DataError(f"{path} exists and is no file; choose another path")
    if check_old is not None:
        check_old(path)


def lock(file: BinaryIO, message: str, *, shared: bool = False) -> None:
    """Locks an open file until it is closed or the process ends; DataError with `message` if another process holds the
    lock."""
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        raise DataError(message) from None
    except OSError as error:
        # Some network file systems have no locks. There, the user must avoid two writers at once.
        if error.errno not in (errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS):
            raise


@contextmanager
def held(path: Path, message: str) -> Iterator[None]:
    """Holds a lock file while the body runs, then deletes it; DataError with `message` if another process holds it."""
    with path.open("ab") as file:
        lock(file, message)
        if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
            raise DataError(message)  # another holder deleted the file between our open and our lock
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _lock(file: io.FileIO, temporary: Path, path: Path) -> None:
    lock(file, f"another process is writing {path} right now; wait for it, or choose another path")
    # Between our open and our lock another writer may have finished; then the file that we hold is its result.
    if not temporary.exists() or not os.path.samestat(os.fstat(file.fileno()), temporary.stat()):
        raise DataError(f"another process has just written {path}; use that, or run this again")
