"""TrajectoryStore: every trajectory of one task in one HDF5 file.

Flat arrays plus offsets. Episode e has its steps at `start[e]:start[e + 1]`; what has a row per *observation* (one more
than steps) is shifted by the episodes before, and lies at `start[e] + e : start[e + 1] + e + 1`:

    episode             0        1              steps 2 and 3
    action, reward      0 1      2 3 4          start = [0, 2, 5]
    observation         0 1 2    3 4 5 6

`data.store_writer` writes it, `data.store_file` knows whether it is whole.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from data.errors import DataError
from data.store_file import Stamp, check_unchanged, open_store
from data.trajectory import Trajectory

QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
STEP_FIELDS = ("action", "reward", "discount")  # a row per step; every other field has a row per observation


@dataclass(frozen=True)
class StoreStatistics:
    """What normalisation and return targets need, of all observations and all returns in a store.

    `observation_std` is the true one: 0 where a dimension never changes. Divide by `observation_scale`, 1 there.
    """

    observation_mean: np.ndarray  # f32[O]
    observation_std: np.ndarray  # f32[O]
    return_mean: float
    return_min: float
    return_max: float
    return_quantiles: np.ndarray  # f64[7], at QUANTILES

    @property
    def observation_scale(self) -> np.ndarray:
        """The standard deviation, with 1 in place of (numerically) nothing; f32[O]."""
        constant = self.observation_std <= 1e-6 * np.maximum(1, np.abs(self.observation_mean))
        return np.where(constant, 1, self.observation_std).astype(np.float32)


class TrajectoryStore:
    """The trajectories of one task, read lazily; open one with `TrajectoryStore.open`.

    Safe to pickle, and to use after a fork or in a spawned process: the file handle belongs to the process that reads,
    and only path and content hash travel. A copy that finds another store under its path says so.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file: h5py.File | None = None
        self._owner = 0
        self._stamp: Stamp
        file, self._stamp = open_store(self.path)
        with file:
            attributes = dict(file.attrs)
            self.start: np.ndarray = file["start"][:]
            self.returns: np.ndarray = file["returns"][:]
            self.fields: tuple[str, ...] = _fields(file)
            self.observation_size = int(file["observation"].shape[1])
            self.action_size = int(file["action"].shape[1])
            # Which episodes were left out when it was built, and why.
            self.skipped = tuple(text.decode() for text in file["skipped"][:]) if "skipped" in file else ()
        self.task = str(attributes["task"])
        self.source = str(attributes["source"])
        self._content_hash = str(attributes["content_hash"])
        self.made_from = str(attributes["made_from"])
        self.goal: str | None = str(attributes["goal"]) or None
        self.control: str | None = str(attributes["control"]) or None
        self.versions = {name: str(attributes[f"{name}_version"]) for name in ("dm_control", "mujoco")}
        self.statistics = StoreStatistics(
            observation_mean=attributes["observation_mean"],
            observation_std=attributes["observation_std"],
            return_mean=float(attributes["return_mean"]),
            return_min=float(attributes["return_min"]),
            return_max=float(attributes["return_max"]),
            return_quantiles=attributes["return_quantiles"],
        )

    @classmethod
    def open(cls, path: str | Path, task: str | None = None) -> "TrajectoryStore":
        """Returns the store at `path`; DataError when it is no whole store, or (with `task`) one of another task.

        The first time a process opens a file it reads all of it and compares the checksum (0.4 s a GB from memory).
        """
        store = cls(path)
        if task is not None and store.task != task:
            raise DataError(
                f"{path} is a store of task {store.task!r}; asked for {task!r}. Build the right one with "
                f"`python -m data.build --exorl FOLDER --task {task} --out {path}`, or change the task"
            )
        return store

    @property
    def content_hash(self) -> str:
        """What the numbers are, in 64 hex digits: SHA-256 of every array with its name and type, of the episodes'
        lengths, and of task, goal and control.

        The same episodes built for the same task give the same one, whatever the path, the day and the bytes of the
        file; one other number or order gives another. Written at build time, so reading it costs nothing.
        """
        return self._content_hash

    @property
    def episodes(self) -> int:
        """The number of trajectories E."""
        return len(self.start) - 1

    @property
    def steps(self) -> int:
        """The number of steps in all trajectories together."""
        return int(self.start[-1])

    @property
    def lengths(self) -> np.ndarray:
        """Steps of each trajectory; i64[E]."""
        return np.diff(self.start)

    @property
    def longest(self) -> int:
        """Steps of the longest trajectory."""
        return int(self.lengths.max())

    def step_rows(self, episodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the rows of every step of `episodes` [...], and which are real; i64 and bool [..., longest].

        Shorter episodes are padded with their last step. The observation that a step acts on is at row + episode.
        """
        steps, lengths = np.arange(self.longest), self.lengths[episodes][..., None]
        return self.start[episodes][..., None] + np.minimum(steps, lengths - 1), steps < lengths

    def column(self, field: str) -> np.ndarray:
        """Returns all rows of one field in memory, flat."""
        return self._dataset(field)[:]

    def rows(self, field: str, rows: slice) -> np.ndarray:
        """Returns these rows of one field, from disk."""
        return self._dataset(field)[rows]

    def shape(self, field: str) -> tuple[int, ...]:
        """The shape of a whole field."""
        return self._dataset(field).shape

    def dtype(self, field: str) -> np.dtype:
        """The type of a field."""
        return self._dataset(field).dtype

    def read(self, field: str, episodes: slice | Sequence[int] | np.ndarray) -> list[np.ndarray]:
        """Returns one array per episode asked for, in the order asked; from disk, these episodes only."""
        dataset = self._dataset(field)
        return [dataset[rows] for rows in self._rows(field, episodes)]

    def trajectory(self, episode: int) -> Trajectory:
        """Returns one episode as a checked Trajectory."""
        values = {field: self.read(field, [episode])[0] for field in self.fields}
        extras = {field.removeprefix("extras/"): values.pop(field) for field in self.fields if "/" in field}
        return Trajectory(**values, extras=extras, source=f"{self.path} episode {episode}")

    def close(self) -> None:
        """Closes this process's file handle; the next read opens it again."""
        if self._file is not None and self._owner == os.getpid():
            self._file.close()
        self._file = None

    def _rows(self, field: str, episodes: slice | Sequence[int] | np.ndarray) -> Iterator[slice]:
        chosen = range(self.episodes)[episodes] if isinstance(episodes, slice) else episodes
        for episode in chosen:
            if not 0 <= episode < self.episodes:
                raise DataError(f"{self.path} has episodes 0 to {self.episodes - 1}; asked for {episode}")
            first, last = int(self.start[episode]), int(self.start[episode + 1])
            if field in STEP_FIELDS:
                yield slice(first, last)
            else:
                yield slice(first + int(episode), last + int(episode) + 1)

    def _dataset(self, field: str) -> h5py.Dataset:
        if field not in self.fields:
            raise DataError(f"{self.path} has no field {field!r}; it has {', '.join(self.fields)}")
        # A handle inherited through fork shares its file offset and HDF5's caches with the parent: never use it.
        if self._file is None or self._owner != os.getpid():
            file, self._stamp = open_store(self.path, verified=self._stamp)
            if file.attrs["content_hash"] != self.content_hash:
                file.close()
                raise DataError(f"{self.path} was replaced by another store while in use; open it again")
            self._file, self._owner = file, os.getpid()
        check_unchanged(self._file, self.path, self._stamp)
        return self._file[field]

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_file": None, "_owner": 0}


def _fields(file: h5py.File) -> tuple[str, ...]:
    own = [name for name in ("observation", *STEP_FIELDS, "physics") if name in file]
    return (*own, *(f"extras/{key}" for key in file.get("extras", {})))
