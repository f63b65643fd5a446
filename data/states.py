"""Computes rewards and observations of many physics states, one at a time or vectorised with dm_control's own code."""

from collections.abc import Iterator
from types import MethodType, SimpleNamespace
from typing import Any

import mujoco
import numpy as np
from dm_control.mujoco import engine
from dm_control.rl import control
from dm_control.utils import rewards
from jaxtyping import Float32, Float64

from data.tasks import maze

_POINT_MASSES = ("point_mass-easy", "point_mass-hard")
_BODIES = (
    *(f"walker-{name}" for name in ("stand", "walk", "run", "flip", "spin")),
    *(f"cheetah-{name}" for name in ("run", "run_backward", "walk", "walk_backward", "flip", "flip_backward")),
)
# Tasks whose reward code works elementwise on arrays of states. A test checks that the results are bitwise equal to
# those computed one state at a time. SHOWN_AT_ONCE is the same for observations.
PAID_AT_ONCE = frozenset(
    {*_BODIES, *_POINT_MASSES, "hopper-hop", "pendulum-swingup"}
    | {f"quadruped-{name}" for name in ("stand", "walk", "run", "jump")}
    | {f"{name}-reach_{room}" for name in ("point_mass_maze", "pointmass") for room in maze.ROOMS}
)
SHOWN_AT_ONCE = frozenset({*_BODIES, *_POINT_MASSES, *maze.BUILDERS})

_AT_ONCE = 1000  # states that are held in memory at a time, with all values computed from them
_STATE = mujoco.mjtState.mjSTATE_QPOS | mujoco.mjtState.mjSTATE_QVEL | mujoco.mjtState.mjSTATE_ACT
# The fields of MuJoCo's data that the tasks of a body read, besides positions, velocities and the control.
_COMPUTED = {
    "cheetah": ("sensordata", "subtree_angmom"),
    "hopper": ("xipos", "sensordata"),
    "pendulum": ("xmat",),
    "point_mass": ("geom_xpos",),
    "point_mass_maze": ("geom_xpos",),
    "pointmass": ("geom_xpos",),
    "quadruped": ("xmat", "sensordata"),
    "walker": ("xpos", "xmat", "sensordata", "subtree_angmom"),
}


def rewards_of(
    name: str,
    task: control.Task,
    physics: engine.Physics,
    states: Float64[np.ndarray, "M P"],
    controls: Float64[np.ndarray, "M A"],
) -> Float64[np.ndarray, " M"]:
    """Returns the rewards of task `name` for M pairs of a state and the control that led to it, in any order."""
    if name in PAID_AT_ONCE:
        return np.concatenate([piece.rewards(name, task) for piece in _pieces(name, physics, states, controls)])
    return np.array([task.get_reward(physics) for _ in _visited(physics, states, controls)], np.float64)


def outcomes_of(
    name: str,
    task: control.Task,
    physics: engine.Physics,
    states: Float64[np.ndarray, "M P"],
    controls: Float64[np.ndarray, "M A"],
) -> tuple[Float32[np.ndarray, "M O"], Float64[np.ndarray, " M"]]:
    """Returns observations, flattened in dm_control's order, and rewards of M pairs of a state and the control that led
    to it. `name` is a task of SHOWN_AT_ONCE."""
    shown, paid = [], []
    for piece in _pieces(name, physics, states, controls):
        shown.append(piece.observations(task))
        if name in PAID_AT_ONCE:
            paid.append(piece.rewards(name, task))
    if not paid:
        paid.append(rewards_of(name, task, physics, states, controls))
    return np.concatenate(shown), np.concatenate(paid)


class States:
    """M physics states with the interface of dm_control's Physics; every array has M as an additional last dimension.

    The methods of a domain's Physics class, such as `walker.Physics.torso_height`, are dm_control's own code, run on
    these arrays.
    """

    def __init__(
        self,
        name: str,
        physics: engine.Physics,
        states: Float64[np.ndarray, "M P"],
        controls: Float64[np.ndarray, "M A"],
    ) -> None:
        """Computes for every state the fields of MuJoCo's data that the task `name` reads."""
        source = [(field, getattr(physics.data, field)) for field in _COMPUTED[name.split("-")[0]]]
        computed = {field: np.empty((len(states), *values.shape)) for field, values in source}
        for row in _visited(physics, states, controls):
            for field, values in source:
                computed[field][row] = values
        positions, velocities = physics.model.nq, physics.model.nq + physics.model.nv
        self._count, self._class = len(states), type(physics)
        self.model = physics.model
        self.data = SimpleNamespace(
            **{field: np.moveaxis(values, 0, -1) for field, values in computed.items()},
            qpos=states[:, :positions].T,
            qvel=states[:, positions:velocities].T,
            ctrl=controls.T,
        )
        named = {field: _Named(getattr(physics.named.data, field), values) for field, values in vars(self.data).items()}
        self.named = SimpleNamespace(model=physics.named.model, data=SimpleNamespace(**named))

    def __len__(self) -> int:
        return self._count

    def __getattr__(self, name: str) -> Any:
        return MethodType(getattr(self._class, name), self)

    def mass_to_target_dist(self) -> Float64[np.ndarray, " M"]:
        """Returns the point mass's distance from its target. (dm_control's method would return one norm over all
        states.)"""
        offsets = np.ascontiguousarray(self.mass_to_target().T)
        return np.sqrt([offset.dot(offset) for offset in offsets])

    def rewards(self, name: str, task: control.Task) -> Float64[np.ndarray, " M"]:
        """Returns the rewards of the states; `name` is a task of PAID_AT_ONCE."""
        paid = _point_mass_reward(self) if name in _POINT_MASSES else task.get_reward(self)
        return np.broadcast_to(paid, len(self))

    def observations(self, task: control.Task) -> Float32[np.ndarray, "M O"]:
        """Returns the observations of the states, flattened in dm_control's order, for a task of SHOWN_AT_ONCE."""
        parts = task.get_observation(self).values()
        return np.concatenate([np.reshape(part, (-1, len(self))) for part in parts]).T.astype(np.float32)


class _Named:
    """dm_control's access by name to a field, for many states."""

    def __init__(self, indexer: Any, values: np.ndarray) -> None:
        self._axes, self._values = indexer.axes, values

    def __getitem__(self, key: Any) -> np.ndarray:
        items = key if isinstance(key, tuple) else (key,)
        return self._values[tuple(axis.convert_key_item(item) for axis, item in zip(self._axes, items, strict=False))]


def _point_mass_reward(states: States) -> Float64[np.ndarray, " M"]:
    """Returns the reward of `dm_control.suite.point_mass`, whose own code would average over the states too."""
    size = states.named.model.geom_size["target", 0]
    near = rewards.tolerance(states.mass_to_target_dist(), bounds=(0, size), margin=size)
    small = rewards.tolerance(states.control(), margin=1, value_at_margin=0, sigmoid="quadratic").mean(axis=0)
    return near * ((small + 4) / 5)


def _visited(
    physics: engine.Physics, states: Float64[np.ndarray, "M P"], controls: Float64[np.ndarray, "M A"]
) -> Iterator[int]:
    """Yields the index of each state while `physics` is in that state with its control, as after a step."""
    physics.reset()
    model, data = physics.model.ptr, physics.data.ptr
    # After a dm_control step, a reward sees positions, velocities and the sensors that depend on them, all of the new
    # state, and nothing that depends on forces. The first half of a MuJoCo step computes just these values. Contacts
    # and constraints affect only forces; disabling them halves the time.
    with physics.model.disable("contact", "constraint"):
        for row in range(len(states)):
            mujoco.mj_setState(model, data, states[row], _STATE)
            data.ctrl[:] = controls[row]
            mujoco.mj_step1(model, data)
            yield row
    physics.reset()


def _pieces(
    name: str, physics: engine.Physics, states: Float64[np.ndarray, "M P"], controls: Float64[np.ndarray, "M A"]
) -> Iterator[States]:
    """Yields the states in order, at most _AT_ONCE at a time."""
    for start in range(0, len(states), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        yield States(name, physics, states[part], controls[part])
