"""Source: a common interface for reading episodes from any supported format, one at a time."""

from pathlib import Path
from typing import Protocol, runtime_checkable

import h5py
import numpy as np
from jaxtyping import Int

from data.errors import DataError
from data.exorl import collected, episode_length, list_episodes, read_episode
from data.formats import flat, minari
from data.store import TrajectoryStore
from data.store_file import is_store
from data.trajectory import Trajectory


@runtime_checkable
class Source(Protocol):
    """Episodes in a file or folder of any supported format; `lengths` has the number of steps of each episode."""

    path: Path
    task: str | None
    """Name of the task whose rewards the episodes hold; None where the source does not say."""
    control: str | None
    """What the control costs of relabelled rewards were computed from (`data.relabel`); None otherwise."""
    lengths: Int[np.ndarray, " E"]

    def read(self, episode: int) -> Trajectory:
        """Returns one episode; DataError when it is damaged."""


class EpisodeFolder:
    """A `Source` for a folder of ExoRL's npz files."""

    def __init__(self, path: Path) -> None:
        self.path, self.control = path, None
        self.paths = list_episodes(path)
        self.lengths = np.array([episode_length(one) for one in self.paths])
        self.task: str | None = collected(self.paths[0].parent).get("task")

    def read(self, episode: int) -> Trajectory:
        """Returns one episode."""
        return read_episode(self.paths[episode])


class Store:
    """A `Source` for a TrajectoryStore; DataError for a task with a hidden goal, whose store holds no rewards."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.store = TrajectoryStore.open(path)
        if self.store.goal:
            raise DataError(f"{path} holds no rewards: {self.store.task} hides its goal; convert its episodes instead")
        self.task: str | None = self.store.task
        self.control = self.store.control
        self.lengths = self.store.lengths

    def read(self, episode: int) -> Trajectory:
        """Returns one episode."""
        return self.store.trajectory(episode)


def open_source(path: Path) -> Source:
    """Opens the episodes at `path`: a folder of npz files, a Minari dataset, a store or a flat HDF5 file.

    DataError when `path` is none of these, or is damaged.
    """
    if path.is_dir():
        return minari.Dataset(path) if minari.is_dataset(path) else EpisodeFolder(path)
    if not path.is_file():
        raise DataError(
            f"nothing at {path}; name a store, a flat HDF5 file, a Minari dataset or a folder of ExoRL episodes"
        )
    return flat.File(path) if h5py.is_hdf5(path) and not is_store(path) else Store(path)
