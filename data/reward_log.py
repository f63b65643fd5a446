"""RewardLog: the rewards that a build has computed so far, on disk, so that a killed one goes on where it was.

To compute them takes twenty times as long as to read the episodes again. The file lies beside the store that is being
built, hidden, and is gone when that is whole:

    32 bytes      what the rewards are of: task, control, versions
    then, for each episode: 32 bytes of its digest, the number of its steps and a checksum (u32 each), its rewards (f32)
"""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from jaxtyping import Float32

_HEAD = struct.Struct("<32sII")
_WORTH = 20_000  # steps that take a few seconds; fewer are computed anew


class RewardLog:
    """Rewards by episode: those of before, and those that are added. What a killed writer cut off is left out."""

    def __init__(self, out: Path, of: bytes) -> None:
        """Reads the log of the store `out`, if it is `of` the same settings (32 bytes)."""
        self.path = out.with_name(f".{out.name}.rlring-rewards")
        self._of = of
        self._known, self._size = _read(self.path, of)
        self._pending: list[bytes] = []
        self._steps = 0
        self._file: io.FileIO | None = None
        self._is_full = False  # of a full disk

    def get(self, digest: bytes) -> Float32[np.ndarray, " M"] | None:
        """Returns the rewards of an episode, None where they are not known."""
        return self._known.get(digest)

    def add(self, digest: bytes, reward: Float32[np.ndarray, " M"]) -> None:
        """Keeps the rewards of an episode. On a full disk it does not, and the build goes on without."""
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
        """Closes the file, and deletes it when the store is whole."""
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
    """Returns the whole records of a log, and how many bytes they take; none, 0, where it is of other settings."""
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
