"""The saved state of an interrupted evaluation, in one file beside the results.

The file only saves time. When it is missing, damaged, of another evaluation or too large for the disk, the earlier
episodes are played again, with the same results.
"""

import contextlib
import shutil
import zipfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from agents.results import say_note
from data.atomic_file import atomic_file

FILE = "evaluating.npz"


def save(folder: Path, label: str, episode: int, state: Any) -> None:
    """Saves the state before episode `episode`, replacing an earlier file. label: identifies the evaluation."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(state)]
    needed = sum(leaf.nbytes for leaf in leaves) + 2**20
    if 2 * needed > shutil.disk_usage(folder).free:
        say_note(f"{folder / FILE} would take {needed / 2**20:,.0f} MiB: not kept, the disk has little room.")
        return
    arrays = {f"{index}": leaf.reshape(-1).view(np.uint8) for index, leaf in enumerate(leaves)}
    with atomic_file(folder / FILE) as file:
        np.savez(file, label=np.array(label), episode=np.array(episode), **arrays)


def restore(folder: Path, label: str, like: Any) -> tuple[int, Any] | None:
    """Returns the saved episode index and state, with the structure and sharding of `like`; None if there is none."""
    found = None
    damage = zipfile.BadZipFile, KeyError, EOFError, ValueError
    with contextlib.suppress(FileNotFoundError, *damage), open(folder / FILE, "rb") as raw, np.load(raw) as file:
        if str(file["label"]) == label:
            leaves = [_like(file[f"{index}"], leaf) for index, leaf in enumerate(jax.tree.leaves(like))]
            found = int(file["episode"]), jax.tree.unflatten(jax.tree.structure(like), leaves)
    return found


def delete(folder: Path) -> None:
    """Deletes the file."""
    (folder / FILE).unlink(missing_ok=True)


def _like(kept: np.ndarray, leaf: jax.Array) -> jax.Array:
    value = kept.view(leaf.dtype).reshape(leaf.shape)
    return jax.device_put(value, leaf.sharding) if leaf.committed else jax.numpy.asarray(value)
