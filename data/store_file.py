"""The file of a store: HDF5 behind a head that says whose it is, and whether it is as it was written.

The head is HDF5's "user block", which the HDF5 library skips: 512 bytes, filled up with zeros,

    rlring trajectory store 2
    crc32 9ae0daaf of 123456 bytes

and written last. It covers all bytes and is compared before the HDF5 library reads anything, because that library
answers damage with wrong numbers, or never returns (docs/notebook.md has what other checksums cost).
"""

import os
import zlib
from functools import cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

import h5py

from data.atomic_file import lock
from data.errors import DataError

FORMAT_VERSION = 2
HEAD = 512
_MAGIC = b"rlring trajectory store "
_HDF5 = b"\x89HDF\r\n\x1a\n"
_BLOCK = 1 << 22


class Stamp(NamedTuple):
    """Which file, and whether somebody has written to it since."""

    device: int
    inode: int
    size: int
    modified_ns: int

    @classmethod
    def of(cls, file: h5py.File | Path) -> "Stamp":
        """Returns the stamp of an open file, which another may have replaced at its path, or of the one at a path."""
        status = file.stat() if isinstance(file, Path) else os.fstat(file.id.get_vfd_handle())
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def seal(file: BinaryIO) -> None:
    """Writes the head of a file that is otherwise whole, and open for reading and writing."""
    file.flush()
    head = _head(file)
    file.seek(0)
    file.write(head)


def open_store(path: Path, *, verified: Stamp | None = None) -> tuple[h5py.File, Stamp]:
    """Opens a whole store to read and says which file it was; a file `verified` before is not read through again.

    DataError when there is no file, or none of ours, or one of another format, or a damaged one.
    """
    if not path.is_file():
        what = "is no file" if os.path.lexists(path) else "does not exist"
        raise DataError(
            f"no store at {path}: it {what}; build one with "
            f"`python -m data.build --exorl FOLDER --task TASK --out {path}`"
        )
    stamp = Stamp.of(path)
    if stamp != verified:
        _verify(path, stamp)
    # No locks: a store is never changed, only replaced as a whole, and some network file systems have none.
    file = h5py.File(path, "r", locking=False)
    check_unchanged(file, path, stamp)
    return file, stamp


def check_unchanged(file: h5py.File, path: Path, stamp: Stamp) -> None:
    """DataError when an open file was written to since: where it was cut off, the HDF5 library would read zeros."""
    if Stamp.of(file) != stamp:
        raise DataError(
            f"{path} was changed while in use; open it again, or build it again with `python -m data.build`"
        )


def check_own(path: Path) -> None:
    """DataError when there is something at `path` that is not provably a store, or that somebody is writing to."""
    if not os.path.lexists(path):
        return
    # A mistyped --out must not cost someone their file. (is_file first: to open a pipe would wait for ever.)
    if not path.is_file() or not is_store(path):
        raise DataError(
            f"{path} exists and is no trajectory store (or one from before format {FORMAT_VERSION}); "
            "choose another --out, or delete it"
        )
    with open(path, "rb") as file:
        lock(file, f"another process writes to {path} right now; wait for it, or choose another --out", shared=True)


def is_store(path: Path) -> bool:
    """Returns whether a file says that it is a store, whole or not."""
    return _first_bytes(path).startswith(_MAGIC)


@cache
def _verify(path: Path, stamp: Stamp) -> None:
    """Compares the head with the bytes behind it; once for each state of a file, in each process."""
    rebuild = "build it again with `python -m data.build`"
    first = _first_bytes(path)
    if first.startswith(_HDF5):
        raise DataError(
            f"{path} is an HDF5 file, but no trajectory store of format {FORMAT_VERSION}; if it is an older store, "
            f"delete it and {rebuild}"
        )
    if not first.startswith(_MAGIC):
        raise DataError(
            f"{path} is not a trajectory store; choose another file, or build one with `python -m data.build`"
        )
    version = first[len(_MAGIC) :].split(b"\n")[0]
    if version != b"%d" % FORMAT_VERSION and version.isdigit():
        raise DataError(f"{path} has store format {int(version)}, and this code reads {FORMAT_VERSION}; {rebuild}")
    with open(path, "rb") as file:
        expected = _head(file)
    if first != expected:
        raise DataError(f"{path} is damaged or cut off: its bytes do not match the checksum in its head; {rebuild}")


def _head(file: BinaryIO) -> bytes:
    """Returns the head that belongs to the bytes behind it."""
    return head_of(file, _MAGIC + b"%d" % FORMAT_VERSION)


def head_of(file: BinaryIO, title: bytes) -> bytes:
    """Returns a head of HEAD bytes: a title, and the checksum of all the bytes behind the head."""
    file.seek(HEAD)
    checksum, size = checksum_of(file)
    return (title + b"\ncrc32 %08x of %d bytes\n" % (checksum, size)).ljust(HEAD, b"\0")


def checksum_of(file: BinaryIO) -> tuple[int, int]:
    """Returns the CRC-32 of the bytes from here to the end of a file, and how many they are."""
    checksum, size, buffer = 0, 0, memoryview(bytearray(_BLOCK))
    while count := file.readinto(buffer):
        checksum = zlib.crc32(buffer[:count], checksum)
        size += count
    return checksum, size


def _first_bytes(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(HEAD)
