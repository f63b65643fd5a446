"""Reads and writes Minari datasets (Farama Foundation; format 0.5.4, HDF5): a group per episode, with one observation
more than actions.

    walker-walk-v0/data/metadata.json
    walker-walk-v0/data/main_data.hdf5      episode_0/observations [M+1, O], actions [M, A], rewards, terminations,
                                            truncations [M], infos/physics [M+1, P], infos/discount [M+1], ...

Arrays that have no place in Minari's format are in `infos`, with a row per observation, so that a dataset written here
is read back unchanged. The minari library is not needed; `minari.MinariDataset("walker-walk-v0/data")` reads the files.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from data.atomic_file import atomic_folder, refuse_existing
from data.errors import DataError
from data.formats.hdf5 import damage_named, new_file, numbers, opened
from data.store_file import checksum_of
from data.trajectory import Trajectory

VERSION = "0.5.4"
_DATA, _META = "main_data.hdf5", "metadata.json"


def write(folder: Path, episodes: Iterable[Trajectory], notes: Mapping[str, str]) -> None:
    """Writes a dataset to `folder`, whose name becomes the dataset's; `notes` go into its metadata.

    DataError when `folder` exists, or its name does not end in a version (`-v0`). After an error no partial folder is
    left.
    """
    refuse_existing(folder)
    if not re.fullmatch(r"[-\w]+-v\d+", folder.name):
        raise DataError(f"a Minari dataset is named NAME-vN, such as walker-walk-v0; got --out {folder}")
    with atomic_folder(folder) as temporary:
        metadata = _write_episodes(temporary / "data" / _DATA, episodes)
        metadata["rlring_checksum"] = _checksum(temporary / "data" / _DATA)
        size = (temporary / "data" / _DATA).stat().st_size / 1e6
        metadata |= {"dataset_id": folder.name, "minari_version": VERSION, "dataset_size": round(size, 1)}
        metadata |= {f"rlring_{name}": note for name, note in notes.items()}
        (temporary / "data" / _META).write_text(json.dumps(metadata, indent=2) + "\n")


def is_dataset(folder: Path) -> bool:
    """Returns whether a folder is a Minari dataset, or the `data` folder of one."""
    return _data_folder(folder) is not None


class Dataset:
    """A Minari dataset opened for reading; a `Source`."""

    def __init__(self, path: Path) -> None:
        """Opens the dataset; DataError when it is not in HDF5, or is damaged."""
        self.path = path
        folder = _data_folder(path)
        assert folder is not None
        metadata = _metadata(folder / _META)
        if metadata.get("data_format", "hdf5") != "hdf5":
            raise DataError(
                f"{path}: Minari's {metadata['data_format']!r} files are not read; convert it to hdf5 first"
            )
        count = metadata.get("total_episodes")
        if not isinstance(count, int) or count < 1:
            raise DataError(f"{folder / _META}: total_episodes must be 1 or more; got {count!r}")
        task, control = (str(metadata.get(f"rlring_{name}") or "") for name in ("task", "control"))
        self.task, self.control = task or None, control or None
        self._data = folder / _DATA
        if metadata.get("rlring_checksum", "") not in ("", _checksum(self._data)):
            raise DataError(
                f"{self._data}: damaged or cut off: not what the checksum in its metadata says; make it again"
            )
        self._file = opened(self._data)
        with damage_named(self._data, self._file):
            self.lengths = np.array([len(self._numbers(episode, "rewards")) for episode in range(count)])

    def read(self, episode: int) -> Trajectory:
        """Returns one episode."""
        steps = int(self.lengths[episode])
        with damage_named(self._data, self._file):
            infos = self._infos(episode, steps)
            discount = infos.pop("discount", None)
            ended = self._numbers(episode, "terminations", steps)[:]
            return Trajectory(
                observation=self._numbers(episode, "observations", steps + 1)[:],
                action=self._numbers(episode, "actions", steps)[:],
                reward=self._numbers(episode, "rewards", steps)[:],
                discount=1.0 - ended.astype(np.float32) if discount is None else discount[1:],
                physics=infos.pop("physics", None),
                extras=infos,
                source=f"{self._data} episode {episode}",
            )

    def _numbers(self, episode: int, name: str, rows: int | None = None) -> h5py.Dataset:
        group = self._file.get(f"episode_{episode}")
        if not isinstance(group, h5py.Group):
            raise DataError(f"{self._data}: it lacks episode_{episode}, which its metadata counts; download it again")
        return numbers(self._data, group, name, rows)

    def _infos(self, episode: int, steps: int) -> dict[str, np.ndarray]:
        """Returns the arrays of numbers in `infos` that have a row per observation."""
        group = self._file[f"episode_{episode}"].get("infos")
        if not isinstance(group, h5py.Group):
            return {}
        fitting = {name: one for name, one in group.items() if isinstance(one, h5py.Dataset) and one.ndim}
        return {
            name: numbers(self._data, group, name)[:]
            for name, one in fitting.items()
            if one.dtype.kind in "fiu" and len(one) == steps + 1
        }


def _write_episodes(path: Path, episodes: Iterable[Trajectory]) -> dict[str, Any]:
    count, steps, first = 0, 0, None
    with new_file(path, has_head=False, track_order=True) as file:
        for count, episode in enumerate(episodes, start=1):
            first = first or episode
            group = file.create_group(f"episode_{count - 1}")
            group.attrs.update(id=count - 1, total_steps=episode.length)
            for name, values in _arrays(episode).items():
                group.create_dataset(name, data=values, maxshape=(None, *values.shape[1:]), chunks=True)
            steps += episode.length
    if first is None:
        raise DataError(f"cannot write {path}: a dataset needs at least one episode; got none")
    return {
        "total_episodes": count,
        "total_steps": steps,
        "data_format": "hdf5",
        "observation_space": _box(first.observation.shape[1], np.inf),
        "action_space": _box(first.action.shape[1], 1.0),
    }


def _arrays(episode: Trajectory) -> dict[str, np.ndarray]:
    terminations = np.zeros(episode.length, bool)
    terminations[-1] = episode.discount[-1] == 0
    infos = {"discount": np.concatenate([[1], episode.discount]).astype(np.float32), **episode.extras}
    if episode.physics is not None:
        infos["physics"] = episode.physics
    return {
        "observations": episode.observation,
        "actions": episode.action,
        "rewards": episode.reward,
        "terminations": terminations,
        "truncations": (np.arange(episode.length) == episode.length - 1) & ~terminations,
        **{f"infos/{name}": values for name, values in infos.items()},
    }


def _box(size: int, bound: float) -> str:
    space = {"type": "Box", "dtype": "float32", "shape": [size], "low": [-bound] * size, "high": [bound] * size}
    return json.dumps(space)


def _data_folder(folder: Path) -> Path | None:
    for one in (folder, folder / "data"):
        if (one / _META).is_file() and (one / _DATA).is_file():
            return one
    return None


def _checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return "crc32 {:08x} of {} bytes".format(*checksum_of(file))


def _metadata(path: Path) -> dict[str, Any]:
    try:
        metadata = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: damaged ({error}); download it again") from None
    if not isinstance(metadata, dict):
        raise DataError(f"{path}: not the metadata of a Minari dataset")
    return metadata
