"""Reads and writes ExoRL's episode files: a compressed npz per episode, named `<anything>_<index>_<length>.npz`.

Row 0 of action, reward and discount is a dummy; row t holds the action that led *to* observation t (Yarats et al. 2022,
`ExtendedTimeStepWrapper`). A `Trajectory` has no dummy, so its step t is row t + 1 of the file (left: file, right:
`Trajectory`):

    row          0      1      2                      step        0      1
    observation  o0     o1     o2                     observation o0     o1     o2
    action       -      a0     a1         <-->        action      a0     a1
    reward       -      r0     r1                     reward      r0     r1
"""

import io
import json
import os
import re
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from data.actions import clipped_actions
from data.atomic_file import temporary_name
from data.errors import DataError
from data.trajectory import Trajectory

_NAME = re.compile(r".*_(\d+)_(\d+)\.npz")
# The exceptions of zipfile and NumPy for an archive that is damaged or holds pickled objects. They often raise only
# ValueError or RuntimeError; so catch these only around calls of those libraries.
_DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, ValueError, RuntimeError)
_ROWS = ("observation", "action", "reward", "discount")
TASK_REWARDS = "task_rewards"  # the key in `extras` of the rewards of several tasks, one column per task


def write_episode(folder: str | Path, index: int, trajectory: Trajectory) -> Path:
    """Writes `trajectory` as `folder/episode_<index>_<length>.npz` and returns that path.

    Atomic: the file appears under its name only when it is complete; a failed write leaves nothing behind.
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
    # The temporary name is fixed, so that the file of a killed writer is overwritten when the same episode is written
    # again. (atomic_file calls fsync, which would take far longer for thousands of small files.)
    temporary = temporary_name(path)
    try:
        with open(temporary, "wb") as file:
            np.savez_compressed(file, **arrays, **trajectory.extras)
        os.replace(temporary, path)
    except BaseException as error:
        if isinstance(error, OSError):
            error.filename = str(path)
        temporary.unlink(missing_ok=True)
        raise
    return path


def read_episode(path: str | Path) -> Trajectory:
    """Returns the episode at `path`, without the dummy row.

    Unknown keys with a row per observation (such as a skill) go to `extras`; other unknown keys are left out. If the
    file has rewards of several tasks, as in ExoRL's maze, `reward` is that of the first task, and `extras` holds all as
    TASK_REWARDS. Actions up to 1e-6 (eight float32 rounding errors) outside [-1, 1] are clipped. DataError, which names
    the file, when it is truncated, damaged or no npz, holds Python objects, lacks a key, has wrong shapes or a length
    other than in its name, or holds NaN or an action further outside.
    """
    path = Path(path)
    arrays = _read_arrays(path)
    _check_keys(path, _ROWS, arrays)
    rows = len(arrays["observation"]) if arrays["observation"].ndim else 0
    for name in _ROWS:
        if arrays[name].ndim < 1 or len(arrays[name]) != rows:
            raise DataError(
                f"{path}: {name} has shape {arrays[name].shape}; ExoRL episodes have as many rows in every array, and "
                f"observation has {rows} (row 0 of {name} is a dummy)"
            )
    _check_length(path, rows)
    rewards = arrays.pop("reward")
    if rewards.size > rows:
        arrays[TASK_REWARDS] = rewards
    trajectory = Trajectory(
        observation=arrays.pop("observation"),
        action=arrays.pop("action")[1:],
        reward=_first_column(path, rewards)[1:],
        discount=_scalar_rows(path, "discount", arrays.pop("discount"))[1:],
        physics=arrays.pop("physics", None),
        extras={key: values for key, values in arrays.items() if values.ndim and len(values) == rows},
        source=str(path),
    )
    action = clipped_actions(trajectory.action, str(path))
    return trajectory if action is trajectory.action else replace(trajectory, action=action)


def read_reward(path: str | Path) -> Float32[np.ndarray, " M"]:
    """Returns the rewards of the episode at `path`, as in `read_episode`, without decoding the other arrays."""
    path = Path(path)
    arrays = _read_arrays(path, only="reward")
    _check_keys(path, ("reward",), arrays)
    _check_length(path, len(arrays["reward"]) if arrays["reward"].ndim else 0)
    reward = _first_column(path, arrays["reward"])[1:]
    if reward.dtype.kind not in "fiu" or not np.isfinite(reward).all():
        raise DataError(f"{path}: every reward must be a finite number; delete the episode or collect it again")
    return reward.astype(np.float32)


def list_episodes(folder: str | Path) -> list[Path]:
    """Returns the paths of the episodes in `folder` (or in `folder/buffer`, as in ExoRL's zips), sorted by file name.

    ExoRL's own loader has the same order. DataError when there are no episodes, or an npz file has another kind of
    name.
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


def collected(folder: Path) -> dict[str, Any]:
    """Returns the content of a folder's `collect.json`: task, policy, seed, episode_steps and versions; {} if there is
    none. DataError when the file was not written by `data.collect`."""
    note = folder / "collect.json"
    if not note.is_file():
        return {}
    try:
        content = json.loads(note.read_text())
        return {**content, "task": str(content["task"]), "versions": {**(content.get("versions") or {})}}
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise DataError(
            f"{note}: not what data.collect writes ({error!r}); delete it if the episodes are whole"
        ) from None


def episode_length(path: str | Path) -> int:
    """Returns the number of steps, as given in an episode's file name; DataError for any other name."""
    named = _NAME.fullmatch(Path(path).name)
    if named is None:
        raise DataError(f"{path}: not named like an ExoRL episode, <name>_<index>_<length>.npz")
    return int(named[2])


def episode_index(path: str | Path) -> int | None:
    """Returns the index given in an episode's file name; None for any other name."""
    named = _NAME.fullmatch(Path(path).name)
    return None if named is None else int(named[1])


def is_whole(path: str | Path) -> bool:
    """Returns whether the file is a zip archive that lists an observation array; the list is at the end of the file.

    An episode appears under its name only when it is complete, so this only has to find files truncated by a power
    failure. Reading every array would take as long as collecting the episodes.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return "observation.npy" in archive.namelist()
    except _DAMAGE:
        return False


def _check_keys(path: Path, names: tuple[str, ...], arrays: dict[str, np.ndarray]) -> None:
    missing = [name for name in names if name not in arrays]
    if missing:
        raise DataError(
            f"{path}: not an ExoRL episode: it lacks {', '.join(missing)}; got keys {sorted(arrays)}. "
            "Move the file elsewhere"
        )


def _check_length(path: Path, rows: int) -> None:
    named = _NAME.fullmatch(path.name)
    if named and int(named[2]) != rows - 1:
        raise DataError(
            f"{path}: the name says {int(named[2])} steps and the file holds {rows - 1}; it was cut off or renamed. "
            "Delete it, or collect it again"
        )


def _read_arrays(path: Path, only: str | None = None) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise DataError(f"{path}: no such episode")
    content = path.read_bytes()
    if not content.startswith(b"PK\x03\x04"):
        raise DataError(f"{path}: not an npz file; delete it, or collect the episode again")
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            names = [name for name in archive.namelist() if only in (None, name.removesuffix(".npy"))]
            return {name.removesuffix(".npy"): _read_array(archive, name) for name in names}
    except _DAMAGE as error:
        raise DataError(
            f"{path}: cut off or damaged, or holding Python objects ({error}); delete it, or collect the episode again"
        ) from error


def _read_array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    # Reads to the end of the member, where zipfile compares the checksum; np.load stops before that.
    content = io.BytesIO(archive.read(name))
    return np.lib.format.read_array(content, allow_pickle=False)


def _first_column(path: Path, rewards: np.ndarray) -> np.ndarray:
    if rewards.ndim == 2 and rewards.shape[1]:
        return rewards[:, 0]
    return _scalar_rows(path, "reward", rewards)


def _scalar_rows(path: Path, name: str, values: np.ndarray) -> np.ndarray:
    if values.size != len(values):
        raise DataError(f"{path}: {name} has shape {values.shape}; expected one number a row, ({len(values)}, 1)")
    return values.reshape(len(values))


def _with_dummy(values: np.ndarray, fill: float) -> np.ndarray:
    return np.concatenate([np.full_like(values[:1], fill), values])
