"""Origin: what a store was made from. It lets a build find a store up to date, and a merge find shards that match."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np
from jaxtyping import UInt8

from data.store_file import open_store

_DIGESTS = "source_digests"


@dataclass(frozen=True, eq=False)
class Origin:
    """The sources of a store: a digest of the name and bytes of every episode file, and the build settings as JSON."""

    settings: str = ""
    digests: UInt8[np.ndarray, "F 32"] = field(default_factory=lambda: np.empty((0, 32), np.uint8))
    shard: str = ""
    """Index and number of the shard, `I/N`. Empty: the store is no shard."""
    whole: str = ""
    """For a shard: hash of the names and sizes of the episodes of all shards, 64 hex digits."""

    @property
    def made_from(self) -> str:
        """The hash of all fields, 64 hex digits; "" if the origin is not known."""
        if not self.settings:
            return ""
        return hashlib.sha256(
            f"{self.settings}\n{self.shard}\n{self.whole}".encode() + self.digests.tobytes()
        ).hexdigest()

    def write(self, file: h5py.File) -> None:
        """Writes the origin into the open file of a store."""
        file.attrs.update(made_from=self.made_from, settings=self.settings, shard=self.shard, whole=self.whole)
        if len(self.digests):
            file[_DIGESTS] = self.digests

    @classmethod
    def of(cls, path: Path) -> "Origin":
        """Returns the origin of the store at `path`; an empty one if the store has none."""
        file, _ = open_store(path)
        with file:
            digests = file[_DIGESTS][:] if _DIGESTS in file else np.empty((0, 32), np.uint8)
            settings, shard, whole = (str(file.attrs.get(name, "")) for name in ("settings", "shard", "whole"))
            return cls(settings, digests, shard, whole)


def whole_of(paths: Iterable[Path]) -> str:
    """Returns the hash of the names and sizes of all chosen episodes; it must agree between the shards of a store."""
    return hashlib.sha256("".join(f"{path.name}\n{path.stat().st_size}\n" for path in paths).encode()).hexdigest()


def digest(path: Path) -> bytes:
    """Returns the SHA-256 of a file's name and the hash of its bytes, 32 bytes."""
    with open(path, "rb") as file:
        return hashlib.sha256(path.name.encode() + b"\0" + hashlib.file_digest(file, "sha256").digest()).digest()
