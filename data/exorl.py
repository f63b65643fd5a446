"""ExoRL's episodes on disk, read and written: one compressed npz each, named `<anything>_<index>_<length>.npz`.

Row 0 of action, reward and discount is a dummy; row t holds the action that led *to* observation t (Yarats et al. 2022,
`ExtendedTimeStepWrapper`). A `Trajectory` has no dummy, so a step t here is row t + 1 there:

    row          0      1      2                      step        0      1
    observation  o0     o1     o2                     observation o0     o1     o2
    action       -      a0     a1         <-->        action      a0     a1
    reward       -      r0     r1                     reward      r0     r1
"""

import io
import os
import re
import zipfile
import zlib
from pathlib import Path

import numpy as np

from data.errors import DataError
from data.trajectory import Trajectory

_NAME = re.compile(r".*_(\d+)_(\d+)\.npz")
_ROWS = ("observation", "action", "reward", "discount")


def write_episode(folder: str | Path, index: int, trajectory: Trajectory) -> Path:
    """Writes `trajectory` as `folder/episode_<index>_<length>.npz` and returns that path.

    Atomic: the file appears under its name only when it is whole; a failed write leaves nothing behind.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"episode_{index:06d}_{trajectory.length}.npz"
    arrays = {
        "observation": trajectory.observation,
        "action": _with_dummy(trajectory.action, 0),
        "reward": _with_dummy(trajectory.reward[:, None], 0),
        "discount": _with_dummy(trajectory.discount[:, None], 1),
    }
    if trajectory.physics is not None:
        arrays["physics"] = trajectory.physics
    taken = sorted(set(trajectory.extras) & {*_ROWS, "physics"})
    if taken:
        raise DataError(f"{trajectory.source}: extras may not use the episode's own keys; got {taken}; rename them")
    # The name ends in .tmp so that no reader takes it for an episode; it is fixed, so that a killed writer's
    # leftover is overwritten when the same episode is written again.
    temporary = folder / f".{path.name}.tmp"
    try:
        with open(temporary, "wb") as file:
            np.savez_compressed(file, **arrays, **trajectory.extras)
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)
        raise
    return path


def read_episode(path: str | Path) -> Trajectory:
    """Returns the episode at `path`, dummy row dropped; unknown keys go to `extras`.

    DataError when the file is cut off or no npz, holds Python objects, lacks a key, has wrong shapes or a length other
    than its name says, or holds NaN.
    """
    path = Path(path)
    arrays = _read_arrays(path)
    missing = [name for name in _ROWS if name not in arrays]
    if missing:
        raise DataError(
            f"{path}: not an ExoRL episode: it lacks {', '.join(missing)}; got keys {sorted(arrays)}. "
            "Move the file elsewhere"
        )
    rows = len(arrays["observation"]) if arrays["observation"].ndim else 0
    for name in _ROWS:
        if arrays[name].ndim < 1 or len(arrays[name]) != rows:
            raise DataError(
                f"{path}: {name} has shape {arrays[name].shape}; ExoRL episodes have as many rows in every array, and "
                f"observation has {rows} (row 0 of {name} is a dummy)"
            )
    named = _NAME.fullmatch(path.name)
    if named and int(named[2]) != rows - 1:
        raise DataError(
            f"{path}: the name says {int(named[2])} steps and the file holds {rows - 1}; it was cut off or renamed. "
            "Delete it, or collect it again"
        )
    return Trajectory(
        observation=arrays.pop("observation"),
        action=arrays.pop("action")[1:],
        reward=_scalar_rows(path, "reward", arrays.pop("reward"))[1:],
        discount=_scalar_rows(path, "discount", arrays.pop("discount"))[1:],
        physics=arrays.pop("physics", None),
        extras=arrays,
        source=str(path),
    )


def list_episodes(folder: str | Path) -> list[Path]:
    """Returns the episodes of `folder` (or of `folder/buffer`, as in ExoRL's zips) in file-name order, ExoRL's own.

    DataError when there are none, or when an npz file there is not named like an episode.
    """
    folder = Path(folder)
    if (folder / "buffer").is_dir():
        folder = folder / "buffer"
    how = (
        "Collect some with `python -m data.collect --task ... --out FOLDER`, or unpack a zip of "
        "https://dl.fbaipublicfiles.com/exorl/<domain>/<algorithm>.zip there"
    )
    if not folder.is_dir():
        raise DataError(f"no dataset at {folder}: there is no such folder. {how}")
    paths = sorted(path for path in folder.glob("*.npz") if not path.name.startswith("."))
    if not paths:
        raise DataError(f"no dataset at {folder}: it holds no <name>_<index>_<length>.npz. {how}")
    for path in paths:
        if not _NAME.fullmatch(path.name):
            raise DataError(
                f"{path}: not named like an ExoRL episode, <name>_<index>_<length>.npz; move it out of the dataset"
            )
    return paths


def episode_length(path: str | Path) -> int:
    """Returns the number of steps that the name of an episode from `list_episodes` says."""
    named = _NAME.fullmatch(Path(path).name)
    if named is None:
        raise DataError(f"{path}: not named like an ExoRL episode, <name>_<index>_<length>.npz")
    return int(named[2])


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: no such episode") from None
    if not content.startswith(b"PK\x03\x04"):
        raise DataError(f"{path}: not an npz file; delete it, or collect the episode again")
    try:
        # NumPy's only word for "this holds pickled objects" is a plain ValueError; nothing of ours runs in here.
        with np.load(io.BytesIO(content), allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, ValueError) as error:
        raise DataError(
            f"{path}: cut off or damaged, or holding Python objects ({error}); delete it, or collect the episode again"
        ) from error


def _scalar_rows(path: Path, name: str, values: np.ndarray) -> np.ndarray:
    if values.size != len(values):
        raise DataError(f"{path}: {name} has shape {values.shape}; expected one number a row, ({len(values)}, 1)")
    return values.reshape(len(values))


def _with_dummy(values: np.ndarray, fill: float) -> np.ndarray:
    return np.concatenate([np.full_like(values[:1], fill), values])
