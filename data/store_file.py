"""The file of a store: an HDF5 file behind a header that identifies the format and holds a checksum.

The header is HDF5's "user block", which the HDF5 library skips. It is written last, and takes 512 bytes, padded with
zeros:

    rlring trajectory store 2
    crc32 9ae0daaf of 123456 bytes

The checksum covers all bytes behind the header. It is compared before the HDF5 library reads anything, because on a
damaged file that library may return wrong numbers or never return (docs/notebook.md has the cost of other checksums).
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
    """Identity, size and modification time of a file; two stamps differ when the file was replaced or written to."""

    device: int
    inode: int
    size: int
    modified_ns: int

    @classmethod
    def of(cls, file: h5py.File | Path) -> "Stamp":
        """Returns the stamp of an open file, or of the file at a path; they differ once the path was replaced."""
        status = file.stat() if isinstance(file, Path) else os.fstat(file.id.get_vfd_handle())
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def seal(file: BinaryIO) -> None:
    """Writes the header of a file that is otherwise complete; the file must be open for reading and writing."""
    file.flush()
    head = _head(file)
    file.seek(0)
    file.write(head)


def open_store(path: Path, *, verified: Stamp | None = None) -> tuple[h5py.File, Stamp]:
    """Opens a store for reading and returns the HDF5 file with its stamp.

    The checksum is compared first, unless the file still has the stamp `verified` of an earlier call. DataError when
    there is no file, when it is not a store or has another format version, and when it is damaged.
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
    # No locks: a store is never changed in place, only replaced as a whole, and some network file systems lack locks.
    file = h5py.File(path, "r", locking=False)
    check_unchanged(file, path, stamp)
    return file, stamp


def check_unchanged(file: h5py.File, path: Path, stamp: Stamp) -> None:
    """Raises DataError when an open file no longer has `stamp`: in a truncated file the HDF5 library reads zeros."""
    if Stamp.of(file) != stamp:
        raise DataError(
            f"{path} was changed while in use; open it again, or build it again with `python -m data.build`"
        )


def check_own(path: Path) -> None:
    """Raises DataError when `path` exists and is not a store, or when another process is writing to it."""
    if not os.path.lexists(path):
        return
    # A mistyped --out must not overwrite another file. (is_file comes first, because opening a pipe blocks for ever.)
    if not path.is_file() or not is_store(path):
        raise DataError(
            f"{path} exists and is no trajectory store (or one from before format {FORMAT_VERSION}); "
            "choose another --out, or delete it"
        )
    with open(path, "rb") as file:
        lock(file, f"another process writes to {path} right now; wait for it, or choose another --out", shared=True)


def is_store(path: Path) -> bool:
    """Returns whether a file starts as a store does; it may still be damaged."""
    return _first_bytes(path).startswith(_MAGIC)


@cache
def _verify(path: Path, stamp: Stamp) -> None:
    """Compares the header with the bytes behind it; once per stamp of a file, in each process."""
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
    """Returns the header that a store with the bytes of `file` should have."""
    return head_of(file, _MAGIC + b"%d" % FORMAT_VERSION)


def head_of(file: BinaryIO, title: bytes) -> bytes:
    """Returns a header of HEAD bytes: a title, and the checksum of all the bytes behind the header."""
    file.seek(HEAD)
    checksum, size = checksum_of(file)
    return (title + b"\ncrc32 %08x of %d bytes\n" % (checksum, size)).ljust(HEAD, b"\0")


def checksum_of(file: BinaryIO) -> tuple[int, int]:
    """Returns the CRC-32 and the number of the bytes from the current position to the end of a file."""
    checksum, size, buffer = 0, 0, memoryview(bytearray(_BLOCK))
    while count := file.readinto(buffer):
        checksum = zlib.crc32(buffer[:count], checksum)
        size += count
    return checksum, size


def _first_bytes(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(HEAD)
