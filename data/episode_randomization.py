"""Reads and restores the values of MuJoCo's compiled model that a suite task draws for every episode."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from dm_control import mujoco
from jaxtyping import Float, Float64


class EpisodeRandomization(NamedTuple):
    """Entries of the compiled model that a task draws for every episode, and that the physics state does not hold."""

    field: str
    row: str | slice
    columns: tuple[str, ...] | None


# The entries that must be stored with an episode, besides its physics states, so that its rewards can be computed
# again. Found by reading every task's initialize_episode; tests/data/test_relabel.py compares whole models of two
# episodes.
EPISODE_RANDOMIZATIONS: dict[str, tuple[EpisodeRandomization, ...]] = {
    "finger-turn_easy": (EpisodeRandomization("site_pos", "target", ("x", "z")),),
    "finger-turn_hard": (EpisodeRandomization("site_pos", "target", ("x", "z")),),
    "fish-swim": (EpisodeRandomization("geom_pos", "target", ("x", "y", "z")),),
    "manipulator-bring_ball": (
        EpisodeRandomization("body_pos", "target_ball", ("x", "z")),
        EpisodeRandomization("body_quat", "target_ball", ("qw", "qy")),
    ),
    "manipulator-bring_peg": (
        EpisodeRandomization("body_pos", "target_peg", ("x", "z")),
        EpisodeRandomization("body_quat", "target_peg", ("qw", "qy")),
    ),
    "manipulator-insert_ball": (
        EpisodeRandomization("body_pos", "target_ball", ("x", "z")),
        EpisodeRandomization("body_quat", "target_ball", ("qw", "qy")),
        EpisodeRandomization("body_pos", "cup", ("x", "z")),
        EpisodeRandomization("body_quat", "cup", ("qw", "qy")),
    ),
    "manipulator-insert_peg": (
        EpisodeRandomization("body_pos", "target_peg", ("x", "z")),
        EpisodeRandomization("body_quat", "target_peg", ("qw", "qy")),
        EpisodeRandomization("body_pos", "slot", ("x", "z")),
        EpisodeRandomization("body_quat", "slot", ("qw", "qy")),
    ),
    "point_mass-hard": (EpisodeRandomization("wrap_prm", slice(0, 4), None),),
    "reacher-easy": (EpisodeRandomization("geom_pos", "target", ("x", "y")),),
    "reacher-hard": (EpisodeRandomization("geom_pos", "target", ("x", "y")),),
    "stacker-stack_2": (EpisodeRandomization("body_pos", "target", ("x", "z")),),
    "stacker-stack_4": (EpisodeRandomization("body_pos", "target", ("x", "z")),),
    "swimmer-swimmer6": (EpisodeRandomization("geom_pos", "target", ("x", "y")),),
    "swimmer-swimmer15": (EpisodeRandomization("geom_pos", "target", ("x", "y")),),
}

# The tasks above, and one that draws a terrain, which is too large to store and on which no reward depends.
_CHANGES_MODEL = {*EPISODE_RANDOMIZATIONS, "quadruped-escape"}


def changes_model(task: str) -> bool:
    """Returns whether an episode may change the compiled model, so that two environments cannot share one."""
    return task in _CHANGES_MODEL


def read(task: str, physics: mujoco.Physics) -> dict[str, Float64[np.ndarray, " E"]]:
    """Returns the current episode's values by name: `target`, or `gains` of `point_mass-hard`; {} for most tasks."""
    entries = EPISODE_RANDOMIZATIONS.get(task, ())
    return {_key(task): np.concatenate([np.ravel(_entries(physics, entry)) for entry in entries])} if entries else {}


def write(task: str, physics: mujoco.Physics, values: Mapping[str, Float[np.ndarray, " E"]]) -> None:
    """Writes values from `read` back into the model; they take effect when the physics is next computed."""
    for entry in EPISODE_RANDOMIZATIONS.get(task, ()):
        value = values[_key(task)]
        size = _entries(physics, entry).size
        _entries(physics, entry, value[:size])
        values = {_key(task): value[size:]}


def _entries(physics: mujoco.Physics, entry: EpisodeRandomization, value: np.ndarray | None = None) -> np.ndarray:
    """Returns the model's current entries; if `value` is given, writes it first."""
    if entry.columns is None:
        array, index = getattr(physics.model, entry.field), entry.row
    else:
        array, index = getattr(physics.named.model, entry.field), (entry.row, list(entry.columns))
    if value is not None:
        array[index] = value
    return np.array(array[index])


def _key(task: str) -> str:
    return "gains" if task == "point_mass-hard" else "target"
