"""Flat HDF5: all transitions in one sequence, as in InFOM (Zheng et al. 2025), OGBench and D4RL.

    row                 0      1      2      3           an episode of 2 steps, one of 2 steps
    observations        o0     o1     p0     p1
    actions, rewards    0      1      0      1
    next_observations   o1     o2     p1     p2
    terminals           0      1      0      1           1 at the end of an episode, terminated or truncated
    masks               1      1      1      0           the discount: 0 where the episode terminated

D4RL has `timeouts` and no `masks`: there `terminals` is 1 only where an episode terminated.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

import h5py
import numpy as np

from data.errors import DataError
from data.formats.hdf5 import Rows, damage_named, new_file, numbers, opened
from data.trajectory import Trajectory


def write(path: Path, episodes: Iterable[Trajectory], notes: Mapping[str, str]) -> None:
    """Writes a flat file of float32 arrays, with `notes` as its attributes. DataError when `path` exists."""
    with new_file(path) as file:
        file.attrs.update(notes)
        rows = Rows(file)
        for episode in episodes:
            rows.append(transitions(episode))
        rows.flush()


def transitions(episode: Trajectory) -> dict[str, np.ndarray]:
    """Returns an episode as arrays with a row per transition, under InFOM's names."""
    terminals = 1 - episode.discount
    terminals[-1] = 1
    return {
        "observations": episode.observation[:-1],
        "actions": episode.action,
        "rewards": episode.reward,
        "next_observations": episode.observation[1:],
        "terminals": terminals,
        "masks": episode.discount,
    }


class File:
    """A flat file opened for reading; a `Source`."""

    def __init__(self, path: Path) -> None:
        """Opens the file; DataError when it is not a flat file, or holds no rewards."""
        self.path = path
        self._file = opened(path)
        with damage_named(path, self._file):
            self._fields = self._checked()
            ends = self._ends()
            self.task, self.control = self._note("task"), self._note("control")
        self._start = np.concatenate([[0], ends + 1])
        self.lengths = np.diff(self._start)

    def read(self, episode: int) -> Trajectory:
        """Returns one episode; DataError when `next_observations` differ from the next rows of `observations`."""
        rows = slice(self._start[episode], self._start[episode + 1])
        with damage_named(self.path, self._file):
            values = {name: dataset[rows] for name, dataset in self._fields.items()}
        where = f"{self.path}: rows {rows.start} to {rows.stop - 1}"
        observations, following = values["observations"], values["next_observations"]
        wrong = np.flatnonzero((observations[1:] != following[:-1]).any(axis=1))
        if len(wrong):
            row = rows.start + int(wrong[0])
            raise DataError(
                f"{self.path}: next_observations[{row}] is not observations[{row + 1}], within an episode; the rows "
                "are shuffled or shifted, or terminals say wrongly where episodes end"
            )
        steps = len(observations)
        discount = values["masks"] if "masks" in values else 1.0 - values["terminals"].astype(np.float32)
        return Trajectory(
            observation=np.concatenate([observations, following[-1:]]),
            action=values["actions"].reshape(steps, -1),  # InFOM squeezes actions of one number
            reward=_column(where, "rewards", values["rewards"]),
            discount=_column(where, "masks", discount),
            source=where,
        )

    def _note(self, name: str) -> str | None:
        note = self._file.attrs.get(name)
        return note if isinstance(note, str) and note else None

    def _checked(self) -> dict[str, h5py.Dataset]:
        if "rewards" not in self._file and "observations" in self._file:
            raise DataError(
                f"{self.path}: it has no rewards (InFOM calls it reward-free); convert the episodes that it was made of"
            )
        observations = numbers(self.path, self._file, "observations")
        names = ["actions", "rewards", "next_observations", "terminals"]
        names += [name for name in ("masks", "timeouts") if name in self._file]
        others = {name: numbers(self.path, self._file, name, len(observations)) for name in names}
        if observations.ndim != 2 or others["next_observations"].shape != observations.shape or not len(observations):
            raise DataError(
                f"{self.path}: observations and next_observations are rows of numbers, as many of each; got shapes "
                f"{observations.shape} and {others['next_observations'].shape}"
            )
        return {"observations": observations, **others}

    def _ends(self) -> np.ndarray:
        is_end = np.zeros(len(self._fields["observations"]), bool)
        for name in ("terminals", "timeouts"):
            if name in self._fields:
                is_end |= _column(str(self.path), name, self._fields[name][:]) != 0
        is_end[-1] = True
        return np.flatnonzero(is_end)


def _column(where: str, name: str, values: np.ndarray) -> np.ndarray:
    if values.size != len(values):
        raise DataError(f"{where}: {name} has shape {values.shape}; expected one number a row")
    return values.reshape(len(values))
