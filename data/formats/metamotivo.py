"""Writes metamotivo's transition buffer, as read by TD-JEPA's `DictBuffer.load`: one HDF5 file and one JSON file.

    buffer.hdf5     observation, action, physics, reward, next-observation, next-terminated, next-physics
    config.json     capacity, device and state of the buffer (full)

A row is a transition, and every dataset has two dimensions. "-" marks a nested key: `batch["next"]["physics"]`.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from data.atomic_file import atomic_folder
from data.errors import DataError
from data.formats.hdf5 import Rows, new_file
from data.trajectory import Trajectory


def write(folder: Path, episodes: Iterable[Trajectory], notes: Mapping[str, str]) -> None:
    """Writes a buffer to `folder`, with `notes` as attributes of its HDF5 file.

    DataError when `folder` exists, or an episode has no physics states, from which metamotivo computes rewards.
    """
    with atomic_folder(folder) as temporary:
        with new_file(temporary / "buffer.hdf5", has_head=False) as file:
            file.attrs.update(notes)
            rows = Rows(file)
            for episode in episodes:
                rows.append(_transitions(episode))
            rows.flush()
        config = {"capacity": rows.count, "device": "cpu", "nested_key_separator": "-", "_idx": 0, "_is_full": True}
        config["__target__"] = "metamotivo.buffers.transition.DictBuffer"
        (temporary / "config.json").write_text(json.dumps(config, indent=4))


def _transitions(episode: Trajectory) -> dict[str, np.ndarray]:
    if episode.physics is None:
        raise DataError(
            f"{episode.source}: has no physics, which metamotivo's buffers hold; convert a folder of episodes, not a "
            "store of relabelled ones"
        )
    return {
        "observation": episode.observation[:-1],
        "action": episode.action,
        "physics": episode.physics[:-1],
        "reward": episode.reward[:, None],
        "next-observation": episode.observation[1:],
        "next-terminated": (episode.discount == 0)[:, None],
        "next-physics": episode.physics[1:],
    }
