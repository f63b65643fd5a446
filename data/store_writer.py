"""write_store writes trajectories to a store, one in memory at a time; `data.store` describes the layout."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

import h5py
import numpy as np
from tqdm import tqdm

from data.atomic_file import Sink, atomic_file
from data.errors import DataError
from data.origin import Origin
from data.store import QUANTILES, STEP_FIELDS, StoreStatistics, TrajectoryStore
from data.store_file import HEAD, check_own, seal
from data.trajectory import Trajectory

_CHUNK_ROWS = 4096


def write_store(
    path: str | Path,
    trajectories: Iterable[Trajectory],
    *,
    task: str,
    source: str,
    keep_physics: bool = False,
    origin: Origin | None = None,
    control: str | None = None,
    goal: str | None = None,
    skipped: Sequence[str] = (),
    progress: bool = False,
) -> TrajectoryStore:
    """Writes `trajectories`, one in memory at a time, to a store at `path` and returns the opened store.

    `origin` records the source files and settings, so that a later build can find the store up to date. It does not
    enter `content_hash`. `skipped` has a message per episode that was left out, with the reason; it is read after all
    trajectories are written. `keep_physics` keeps the physics states and `extras`, which only relabelling needs.
    `goal="hindsight"` marks a task whose goal is chosen when chains are drawn.

    DataError when a trajectory differs in shape from the first, when there are no trajectories, and when `path` holds
    something other than a store, which is never replaced. OSError with the path when the disk is full. After either
    error no partial file is left, and an older store at `path` stays.
    """
    path = Path(path)
    with atomic_file(path, check_old=check_own) as sink:
        bar = tqdm(trajectories, desc=f"writing {path.name}", unit="episode", disable=not progress)
        with bar, h5py.File(sink, "w", userblock_size=HEAD) as file:
            writer = _Writer(file, sink, keep_physics=keep_physics)
            for trajectory in bar:
                writer.append(trajectory)
            writer.finish(path)
            identity = {"task": task, "goal": goal or "", "control": control or ""}
            file.attrs.update(**identity, content_hash=writer.content_hash(identity))
            file.attrs.update(source=source.encode(errors="backslashreplace").decode())
            (origin or Origin()).write(file)
            if skipped:
                file["skipped"] = [message.encode(errors="backslashreplace") for message in skipped]
            file.attrs.update({f"{name}_version": version for name, version in simulator_versions().items()})
        sink.check()
        seal(sink)
    return TrajectoryStore.open(path)


def simulator_versions() -> dict[str, str]:
    """Returns the installed versions of dm_control and mujoco; the rewards that relabelling computes depend on them."""
    return {name: metadata.version(name) for name in ("dm_control", "mujoco")}


class Counted:
    """An iterable of trajectories with a known length, which the progress bar shows."""

    def __init__(self, trajectories: Iterable[Trajectory], count: int) -> None:
        self.trajectories, self.count = trajectories, count

    def __iter__(self) -> Iterator[Trajectory]:
        return iter(self.trajectories)

    def __len__(self) -> int:
        return self.count


class _Writer:
    """Appends trajectories to resizable datasets in blocks, and keeps running statistics and hashes."""

    def __init__(self, file: h5py.File, sink: Sink, *, keep_physics: bool) -> None:
        self.file, self.sink, self.keep_physics = file, sink, keep_physics
        self.hashes: dict[str, hashlib._Hash] = {}  # one per field, of its rows
        self.datasets: dict[str, h5py.Dataset] = {}
        self.pending: dict[str, list[np.ndarray]] = {}
        self.pending_rows = 0
        self.lengths: list[int] = []
        self.returns: list[float] = []
        self.count = 0
        self.mean: np.ndarray = np.zeros(())  # of the observations so far
        self.deviation: np.ndarray = np.zeros(())  # the sum of their squared deviations from the mean

    def append(self, trajectory: Trajectory) -> None:
        arrays = {name: getattr(trajectory, name) for name in ("observation", *STEP_FIELDS)}
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
        # Merges two means and two sums of squared deviations without cancellation (Chan et al. 1979).
        count, mean = len(block), block.mean(axis=0)
        difference = mean - self.mean
        total = self.count + count
        self.deviation = (
            self.deviation + ((block - mean) ** 2).sum(axis=0) + difference**2 * (self.count * count / total)
        )
        self.mean = self.mean + difference * (count / total)
        self.count = total

    def content_hash(self, identity: dict[str, str]) -> str:
        """Returns the hash of all fields, the lengths and `identity`; call it after `finish`. It does not depend on how
        the rows were split into blocks and chunks."""
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
