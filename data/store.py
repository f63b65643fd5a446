"""TrajectoryStore: every trajectory of one task in one HDF5 file.

The file holds flat arrays and offsets. The steps of episode e are rows `start[e]:start[e + 1]`. Fields with a row per
*observation* have one row more per episode than fields with a row per step, so there the rows of episode e are
`start[e] + e : start[e + 1] + e + 1`:

    episode             0        1              steps 2 and 3
    action, reward      0 1      2 3 4          start = [0, 2, 5]
    observation         0 1 2    3 4 5 6

`data.store_writer` writes the file; `data.store_file` checks that it is complete and undamaged.
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
    """Statistics of all observations and all returns in a store, for normalisation and for return targets.

    `observation_std` is 0 where a dimension is constant. To normalise, divide by `observation_scale`, which is 1 there.
    """

    observation_mean: np.ndarray  # f32[O]
    observation_std: np.ndarray  # f32[O]
    return_mean: float
    return_min: float
    return_max: float
    return_quantiles: np.ndarray  # f64[7], at QUANTILES

    @property
    def observation_scale(self) -> np.ndarray:
        """The standard deviation, with 1 for dimensions that are constant up to rounding; f32[O]."""
        constant = self.observation_std <= 1e-6 * np.maximum(1, np.abs(self.observation_mean))
        return np.where(constant, 1, self.observation_std).astype(np.float32)


class TrajectoryStore:
    """The trajectories of one task, read lazily from a file; open a store with `TrajectoryStore.open`.

    A store can be pickled, and used after a fork or in a spawned process: every process opens its own file handle.
    A copy raises DataError when the file at its path has been replaced by a different store.
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
            # A message per episode that the build left out: which one, and why.
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
        """Returns the store at `path`.

        The first time a process opens a file, it reads the whole file and compares the checksum (0.4 s per GB when the
        file is cached in memory). DataError when the file is missing, damaged or not a store, and when `task` is given
        and the store belongs to another task.
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
        """SHA-256 of the store's content, 64 hex digits: of every array with its name and type, of the episodes'
        lengths, and of task, goal and control.

        The same episodes built for the same task give the same hash, whatever the path, the date and the byte layout of
        the file. Any other number or order of episodes gives another hash. It is computed when the store is built.
        """
        return self._content_hash

    @property
    def episodes(self) -> int:
        """The number of episodes E."""
        return len(self.start) - 1

    @property
    def steps(self) -> int:
        """The total number of steps of all episodes."""
        return int(self.start[-1])

    @property
    def lengths(self) -> np.ndarray:
        """The number of steps of each episode; i64[E]."""
        return np.diff(self.start)

    @property
    def longest(self) -> int:
        """The number of steps of the longest episode."""
        return int(self.lengths.max())

    def step_rows(self, episodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the row index of every step of `episodes` [...], i64 [..., longest], and a mask of the real steps,
        bool [..., longest].

        Shorter episodes are padded by repeating their last step. The observation before a step is at row + episode.
        """
        steps, lengths = np.arange(self.longest), self.lengths[episodes][..., None]
        return self.start[episodes][..., None] + np.minimum(steps, lengths - 1), steps < lengths

    def column(self, field: str) -> np.ndarray:
        """Reads a whole field into memory and returns it: the rows of all episodes, one episode after the other."""
        return self._dataset(field)[:]

    def rows(self, field: str, rows: slice) -> np.ndarray:
        """Returns a slice of the rows of one field, read from disk."""
        return self._dataset(field)[rows]

    def shape(self, field: str) -> tuple[int, ...]:
        """Returns the shape of a whole field."""
        return self._dataset(field).shape

    def dtype(self, field: str) -> np.dtype:
        """Returns the dtype of a field."""
        return self._dataset(field).dtype

    def read(self, field: str, episodes: slice | Sequence[int] | np.ndarray) -> list[np.ndarray]:
        """Returns one array per episode of `episodes`, in that order. Only these episodes are read from disk."""
        dataset = self._dataset(field)
        return [dataset[rows] for rows in self._rows(field, episodes)]

    def trajectory(self, episode: int) -> Trajectory:
        """Returns one episode as a Trajectory, which checks its shapes and values."""
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
        # Never use a handle inherited through fork: it shares its file offset and HDF5's caches with the parent.
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
