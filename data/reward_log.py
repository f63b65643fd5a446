"""RewardLog: the rewards that a build has computed so far, on disk, so that a killed build can continue.

Computing the rewards takes twenty times as long as reading the episodes again. The log is a hidden file beside the
store that is being built, and is deleted when the store is complete:

    32 bytes      hash of the settings: task, control, store format, versions
    then, for each episode: its digest (32 bytes), the number of steps and a checksum (u32 each), its rewards (f32)
"""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from jaxtyping import Float32

_HEAD = struct.Struct("<32sII")
_WORTH = 20_000  # steps per write; computing this many takes a few seconds, which a killed build may lose


class RewardLog:
    """The rewards of episodes by digest: those read from an existing log, and appended ones, which go to disk in
    batches. A truncated record at the end of the log is ignored."""

    def __init__(self, out: Path, of: bytes) -> None:
        """Reads the log of the store `out`, if it begins with `of`, the 32-byte hash of the settings."""
        self.path = out.with_name(f".{out.name}.rlring-rewards")
        self._of = of
        self._known, self._size = _read(self.path, of)
        self._pending: list[bytes] = []
        self._steps = 0
        self._file: io.FileIO | None = None
        self._is_full = False  # the disk is full

    def get(self, digest: bytes) -> Float32[np.ndarray, " M"] | None:
        """Returns the rewards of an episode that were in the log when it was opened; None if it had none."""
        return self._known.get(digest)

    def add(self, digest: bytes, reward: Float32[np.ndarray, " M"]) -> None:
        """Appends the rewards of an episode. If the disk is full, does nothing, so that the build can go on."""
        rows = np.ascontiguousarray(reward, "<f4").tobytes()
        self._pending.append(_HEAD.pack(digest, len(reward), zlib.crc32(digest + rows)) + rows)
        self._steps += len(reward)
        if not self._is_full and self._steps >= _WORTH:
            try:
                self._write()
            except OSError:
                self._is_full = True
        if self._is_full:
            self._pending.clear()

    def close(self, *, delete: bool) -> None:
        """Closes the file; with `delete`, deletes it. Rewards added since the last write are not written."""
        if self._file is not None:
            self._file.close()
        if delete:
            self.path.unlink(missing_ok=True)

    def _write(self) -> None:
        if self._file is None:
            self._file = io.FileIO(self.path, "r+b" if self._size else "wb")
            self._file.truncate(self._size)
            self._file.seek(self._size)
            if not self._size:
                self._pending.insert(0, self._of)
        content = b"".join(self._pending)
        self._is_full = self._file.write(content) < len(content)
        self._pending.clear()


def _read(path: Path, of: bytes) -> tuple[dict[bytes, np.ndarray], int]:
    """Returns the complete records of a log, and the size of the log up to their end in bytes; ({}, 0) if the log has
    other settings or does not exist."""
    known: dict[bytes, np.ndarray] = {}
    if not path.is_file():
        return known, 0
    with open(path, "rb") as file:
        if file.read(32) != of:
            return known, 0
        size = 32
        while len(head := file.read(_HEAD.size)) == _HEAD.size:
            digest, steps, checksum = _HEAD.unpack(head)
            rows = file.read(4 * steps)
            if len(rows) != 4 * steps or zlib.crc32(digest + rows) != checksum:
                break
            known[digest] = np.frombuffer(rows, "<f4")
            size = file.tell()
    return known, size
