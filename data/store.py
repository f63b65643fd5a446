"""TrajectoryStore: every trajectory of one task in one HDF5 file.

Flat arrays plus offsets. Episode e has its steps at `start[e]:start[e + 1]`; what has a row per *observation* (one more
than steps) is shifted by the episodes before, and lies at `start[e] + e : start[e + 1] + e + 1`:

    episode             0        1              steps 2 and 3
    action, reward      0 1      2 3 4          start = [0, 2, 5]
    observation         0 1 2    3 4 5 6

The file is written under a temporary name and renamed when it is whole, with `complete` as its last attribute.
(Longer than 300 lines because reader and writer share this layout and nothing else does.)
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
from tqdm import tqdm

from data.atomic_file import Sink, atomic_file
from data.errors import DataError
from data.trajectory import Trajectory

FORMAT = "rlring trajectory store"
FORMAT_VERSION = 2
QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
_STEP_FIELDS = ("action", "reward", "discount")  # a row per step; every other field has a row per observation
_CHUNK_ROWS = 4096


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


class StoreArrays(NamedTuple):
    """A whole store in memory, flat; see the file's head for what `start` means."""

    observation: np.ndarray  # f32[sum(M+1), O]
    action: np.ndarray  # f32[sum(M), A]
    reward: np.ndarray  # f32[sum(M)]
    discount: np.ndarray  # f32[sum(M)]
    physics: np.ndarray | None  # f64[sum(M+1), P]
    extras: dict[str, np.ndarray]  # [sum(M+1), ...]
    start: np.ndarray  # i64[E+1]


class TrajectoryStore:
    """The trajectories of one task, read lazily; open one with `TrajectoryStore.open`.

    Safe to pickle, and to use after a fork or in a spawned process: the file handle belongs to the process that reads,
    and only path and content hash travel. A copy that finds another store under its path says so.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file: h5py.File | None = None
        self._owner = 0
        with _open_file(self.path) as file:
            attributes = dict(file.attrs)
            self.start: np.ndarray = file["start"][:]
            self.returns: np.ndarray = file["returns"][:]
            self.fields: tuple[str, ...] = _fields(file)
            self.observation_size = int(file["observation"].shape[1])
            self.action_size = int(file["action"].shape[1])
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
        """Returns the store at `path`; DataError when it is no whole store, or (with `task`) one of another task."""
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

    def observation_rows(self) -> np.ndarray:
        """Returns, for every step, the row of the observation it acts on; i64[sum(M)]."""
        return np.arange(self.steps) + np.repeat(np.arange(self.episodes), self.lengths)

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

    def load(self) -> StoreArrays:
        """Returns everything in memory: some 130 MB per million steps of walker, without its physics."""
        columns = {field: self.column(field) for field in self.fields}
        extras = {field.removeprefix("extras/"): columns.pop(field) for field in self.fields if "/" in field}
        return StoreArrays(**{"physics": None, **columns}, extras=extras, start=self.start)

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
            if field in _STEP_FIELDS:
                yield slice(first, last)
            else:
                yield slice(first + int(episode), last + int(episode) + 1)

    def _dataset(self, field: str) -> h5py.Dataset:
        if field not in self.fields:
            raise DataError(f"{self.path} has no field {field!r}; it has {', '.join(self.fields)}")
        # A handle inherited through fork shares its file offset and HDF5's caches with the parent: never use it.
        if self._file is None or self._owner != os.getpid():
            file = _open_file(self.path)
            if file.attrs["content_hash"] != self.content_hash:
                file.close()
                raise DataError(f"{self.path} was replaced by another store while in use; open it again")
            self._file, self._owner = file, os.getpid()
        return self._file[field]

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_file": None, "_owner": 0}


def write_store(
    path: str | Path,
    trajectories: Iterable[Trajectory],
    *,
    task: str,
    source: str,
    keep_physics: bool = False,
    made_from: str = "",
    control: str | None = None,
    goal: str | None = None,
    progress: bool = False,
) -> TrajectoryStore:
    """Writes `trajectories`, one in memory at a time, to a store at `path` and returns it opened.

    `made_from` names the sources, so that a builder knows its work again; `content_hash` is of the numbers alone.
    `keep_physics` also keeps `extras`: both serve later relabelling alone. `goal="hindsight"` marks a task whose goal is
    chosen when chains are drawn. DataError when a trajectory differs in shape from the first, or there is none; OSError
    with the path when the disk is full. Either way nothing is left behind, and an older store at `path` stays.
    """
    path = Path(path)
    with atomic_file(path) as sink, h5py.File(sink, "w") as file:
        writer = _Writer(file, sink, keep_physics=keep_physics)
        for trajectory in tqdm(trajectories, desc=f"writing {path.name}", unit="episode", disable=not progress):
            writer.append(trajectory)
        writer.finish(path)
        file.attrs.update(format=FORMAT, format_version=FORMAT_VERSION, source=source, made_from=made_from)
        identity = {"task": task, "goal": goal or "", "control": control or ""}
        file.attrs.update(**identity, content_hash=writer.content_hash(identity))
        for name, version in simulator_versions().items():
            file.attrs[f"{name}_version"] = version
        file.attrs["complete"] = True
    return TrajectoryStore.open(path)


def simulator_versions() -> dict[str, str]:
    """Returns the installed versions of dm_control and mujoco, which decide what rewards come out of relabelling."""
    return {name: metadata.version(name) for name in ("dm_control", "mujoco")}


class _Writer:
    """Appends trajectories to resizable datasets in blocks, with running statistics and hash."""

    def __init__(self, file: h5py.File, sink: Sink, *, keep_physics: bool) -> None:
        self.file, self.sink, self.keep_physics = file, sink, keep_physics
        self.hashes: dict[str, hashlib._Hash] = {}  # of the rows of each field
        self.datasets: dict[str, h5py.Dataset] = {}
        self.pending: dict[str, list[np.ndarray]] = {}
        self.pending_rows = 0
        self.lengths: list[int] = []
        self.returns: list[float] = []
        self.count = 0
        self.mean: np.ndarray = np.zeros(())  # of the observations so far, and their summed squared deviations
        self.deviation: np.ndarray = np.zeros(())

    def append(self, trajectory: Trajectory) -> None:
        arrays = {name: getattr(trajectory, name) for name in ("observation", *_STEP_FIELDS)}
        if self.keep_physics:
            if trajectory.physics is None:
                raise DataError(
                    f"{trajectory.source}: has no physics, which this store needs; collect with physics, as "
                    "`python -m data.collect` does"
                )
            arrays["physics"] = trajectory.physics
            arrays.update({f"extras/{key}": values for key, values in sorted(trajectory.extras.items())})
        if not self.pending:
            self.pending = {name: [] for name in arrays}
            self.hashes = {name: hashlib.sha256() for name in arrays}
            for name, values in arrays.items():
                self.datasets[name] = self.file.create_dataset(
                    name,
                    shape=(0, *values.shape[1:]),
                    maxshape=(None, *values.shape[1:]),
                    chunks=(_CHUNK_ROWS, *values.shape[1:]),
                    dtype=values.dtype,
                )
        self._check_like_first(trajectory, arrays)
        for name, values in arrays.items():
            self.pending[name].append(values)
        self.lengths.append(trajectory.length)
        self.returns.append(trajectory.total_reward)
        self.pending_rows += trajectory.length
        if self.pending_rows >= _CHUNK_ROWS:
            self._flush()

    def _check_like_first(self, trajectory: Trajectory, arrays: dict[str, np.ndarray]) -> None:
        if set(arrays) != set(self.pending):
            raise DataError(
                f"{trajectory.source}: has arrays {sorted(arrays)}, the episodes before it {sorted(self.pending)}; "
                "a store holds episodes of one kind: separate them"
            )
        for name, values in arrays.items():
            expected = self.datasets[name]
            if values.shape[1:] != expected.shape[1:] or values.dtype != expected.dtype:
                raise DataError(
                    f"{trajectory.source}: {name} has rows {values.dtype}{list(values.shape[1:])}, the episodes before "
                    f"it {expected.dtype}{list(expected.shape[1:])}; a store holds one task: separate them"
                )

    def _flush(self) -> None:
        for name, blocks in self.pending.items():
            block = np.concatenate(blocks)
            blocks.clear()
            dataset = self.datasets[name]
            rows = len(dataset)
            dataset.resize(rows + len(block), axis=0)
            dataset[rows:] = block
            self.hashes[name].update(np.ascontiguousarray(block).data)
            if name == "observation":
                self._update_statistics(block.astype(np.float64))
        self.pending_rows = 0
        self.sink.check()

    def _update_statistics(self, block: np.ndarray) -> None:
        # Chan et al. 1979: merges two means and sums of squared deviations without cancellation.
        count, mean = len(block), block.mean(axis=0)
        difference = mean - self.mean
        total = self.count + count
        self.deviation = (
            self.deviation + ((block - mean) ** 2).sum(axis=0) + difference**2 * (self.count * count / total)
        )
        self.mean = self.mean + difference * (count / total)
        self.count = total

    def content_hash(self, identity: dict[str, str]) -> str:
        """Returns the hash of all that `finish` wrote, and of `identity`; independent of blocks and chunks."""
        lengths = hashlib.sha256(np.asarray(self.lengths, np.int64).data).hexdigest()
        fields = {
            name: [self.datasets[name].dtype.str, self.datasets[name].shape, rows.hexdigest()]
            for name, rows in sorted(self.hashes.items())
        }
        content = {**identity, "lengths": lengths, "fields": fields}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def finish(self, path: Path) -> None:
        if not self.lengths:
            raise DataError(f"cannot write {path}: a store needs at least one trajectory; got none")
        if self.pending_rows:
            self._flush()
        returns = np.asarray(self.returns)
        self.file["start"] = np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int64)
        self.file["returns"] = returns
        statistics = StoreStatistics(
            observation_mean=self.mean.astype(np.float32),
            observation_std=np.sqrt(self.deviation / self.count).astype(np.float32),
            return_mean=float(returns.mean()),
            return_min=float(returns.min()),
            return_max=float(returns.max()),
            return_quantiles=np.quantile(returns, QUANTILES),
        )
        self.file.attrs.update(asdict(statistics))


def _open_file(path: Path) -> h5py.File:
    if not path.is_file():
        raise DataError(
            f"no store at {path}; build one with `python -m data.build --exorl FOLDER --task TASK --out {path}`"
        )
    try:
        file = h5py.File(path, "r")
    except PermissionError:
        raise
    except OSError as error:
        raise DataError(
            f"{path} is not a trajectory store, or only part of one ({error}); "
            "build it again with `python -m data.build`"
        ) from error
    problem = None
    if file.attrs.get("format") != FORMAT:
        problem = "is an HDF5 file, but not a trajectory store"
    elif file.attrs.get("format_version") != FORMAT_VERSION:
        problem = f"has store format {file.attrs.get('format_version')}, and this code reads {FORMAT_VERSION}"
    elif not file.attrs.get("complete", False):
        problem = "is only half written"
    if problem:
        file.close()
        raise DataError(f"{path} {problem}; build it again with `python -m data.build`")
    return file


def _fields(file: h5py.File) -> tuple[str, ...]:
    own = [name for name in ("observation", *_STEP_FIELDS, "physics") if name in file]
    return (*own, *(f"extras/{key}" for key in file.get("extras", {})))
