"""Reads HDF5 files that may be damaged or malicious, and writes HDF5 files in blocks of rows."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np

from data.atomic_file import atomic_file, refuse_existing
from data.errors import DataError
from data.store_file import HEAD, head_of

# The header of files written here: HDF5's "user block", which the library skips, as in a store (`data.store_file`).
_TITLE = b"rlring transitions 1"
_BLOCK = 4096


class Rows:
    """Datasets to which rows are appended. All have the same number of rows. They are written in blocks, so that only a
    few thousand rows are in memory at a time."""

    def __init__(self, file: h5py.File) -> None:
        self.file = file
        self.count = 0
        self._pending: dict[str, list[np.ndarray]] = {}
        self._waiting = 0

    def append(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Appends rows to every dataset; the first call creates the datasets."""
        rows = len(next(iter(arrays.values())))
        for name, values in arrays.items():
            if name not in self._pending:
                shape = values.shape[1:]
                chunks = (_BLOCK, *shape)
                self.file.create_dataset(name, (0, *shape), values.dtype, maxshape=(None, *shape), chunks=chunks)
            self._pending.setdefault(name, []).append(values)
        self._waiting += rows
        if self._waiting >= _BLOCK:
            self.flush()

    def flush(self) -> None:
        """Writes the rows that are still in memory."""
        for name, blocks in self._pending.items():
            block = np.concatenate(blocks) if blocks else np.empty(0)
            blocks.clear()
            if len(block):
                self.file[name].resize(self.count + len(block), axis=0)
                self.file[name][self.count :] = block
        self.count, self._waiting = self.count + self._waiting, 0


@contextmanager
def new_file(path: Path, *, has_head: bool = True, track_order: bool = False) -> Iterator[h5py.File]:
    """Yields an HDF5 file that becomes `path` if the body succeeds; with `has_head`, its header holds a checksum.

    The HDF5 library writes through a `Sink`, because it would crash after a failed write. DataError when `path` exists;
    OSError when the disk is full.
    """
    with atomic_file(path, check_old=refuse_existing) as sink:
        with h5py.File(sink, "w", userblock_size=HEAD if has_head else None, track_order=track_order) as file:
            yield file
        sink.check()
        if not has_head:
            return
        sink.flush()
        head = head_of(sink, _TITLE)
        sink.seek(0)
        sink.write(memoryview(head))


def opened(path: Path) -> h5py.File:
    """Opens an HDF5 file for reading; DataError when it is not an HDF5 file, or its checksum does not match.

    On a damaged file the HDF5 library may return wrong numbers or never return, so the checksum is compared first.
    Files of other projects have no checksum.
    """
    with open(path, "rb") as content:
        first = content.read(HEAD)
        if first.startswith(_TITLE) and first != head_of(content, _TITLE):
            raise DataError(
                f"{path}: damaged or cut off: its bytes do not match the checksum in its head; make it again"
            )
    try:
        return h5py.File(path, "r", locking=False)
    except (OSError, RuntimeError) as error:
        raise DataError(f"{path}: not an HDF5 file, or damaged ({error})") from None


@contextmanager
def damage_named(path: Path, file: h5py.File) -> Iterator[None]:
    """Context manager that turns errors of the HDF5 library into a DataError that names the file.

    Any error closes the file, because otherwise the library would reuse its cached state when the file is opened again.
    """
    try:
        yield
    except (OSError, RuntimeError, KeyError) as error:
        file.close()
        raise DataError(f"{path}: damaged, or not what it seems ({error}); make or download it again") from None
    except BaseException:
        file.close()
        raise


def numbers(path: Path, group: h5py.Group, name: str, rows: int | None = None) -> h5py.Dataset:
    """Returns the dataset `name` of `group`. DataError unless it is an array of numbers stored in this file, with
    `rows` rows if that is given."""
    where = f"{path}: {group.name.rstrip('/')}/{name}"
    # A soft or external link could lead to any other file of this machine.
    if not isinstance(group.get(name, getlink=True), h5py.HardLink):
        raise DataError(f"{path}: it lacks {name}; it has {', '.join(sorted(group)[:12]) or 'nothing'}")
    dataset = group[name]
    if not isinstance(dataset, h5py.Dataset):
        raise DataError(f"{where} is a group; only arrays of numbers are read, not dictionaries")
    try:
        kind = dataset.dtype.kind
    except TypeError:
        kind = "?"
    if kind not in "fiub" or dataset.ndim < 1 or dataset.is_virtual or dataset.external:
        raise DataError(f"{where} is no array of numbers with a row for each step; nothing else is read")
    if rows is not None and len(dataset) != rows:
        raise DataError(f"{where} has {len(dataset)} rows; expected {rows}")
    return dataset
