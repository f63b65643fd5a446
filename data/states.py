"""What tasks pay and show in many physics states: one after the other, or at once in dm_control's own formulas."""

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
# Formulas that take numbers elementwise; a test holds each to the bits of one state after the other.
PAID_AT_ONCE = frozenset(
    {*_BODIES, *_POINT_MASSES, "hopper-hop", "pendulum-swingup"}
    | {f"quadruped-{name}" for name in ("stand", "walk", "run", "jump")}
    | {f"{name}-reach_{room}" for name in ("point_mass_maze", "pointmass") for room in maze.ROOMS}
)
SHOWN_AT_ONCE = frozenset({*_BODIES, *_POINT_MASSES, *maze.BUILDERS})

_AT_ONCE = 1000  # states in memory with all that was computed from them
_STATE = mujoco.mjtState.mjSTATE_QPOS | mujoco.mjtState.mjSTATE_QVEL | mujoco.mjtState.mjSTATE_ACT
# What the formulas of a body read, beside positions, velocities and the control.
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
    """Returns what the task of that name pays where a control has led to a state, for M of them in any order."""
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
    """Returns what a task of SHOWN_AT_ONCE shows of M states, flattened in dm_control's own order, and what it pays."""
    shown, paid = [], []
    for piece in _pieces(name, physics, states, controls):
        shown.append(piece.observations(task))
        if name in PAID_AT_ONCE:
            paid.append(piece.rewards(name, task))
    if not paid:
        paid.append(rewards_of(name, task, physics, states, controls))
    return np.concatenate(shown), np.concatenate(paid)


class States:
    """The physics in M states at once, asked as dm_control's own is: every array has M as one more dimension, its last.

    The methods of a domain's physics (`walker.Physics.torso_height`) are dm_control's own code, run on these arrays.
    """

    def __init__(
        self,
        name: str,
        physics: engine.Physics,
        states: Float64[np.ndarray, "M P"],
        controls: Float64[np.ndarray, "M A"],
    ) -> None:
        """Computes what the task of that name reads of every state."""
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
        """Returns the point mass's distance from its target: dm_control's norm would be one number for all states."""
        offsets = np.ascontiguousarray(self.mass_to_target().T)
        return np.sqrt([offset.dot(offset) for offset in offsets])

    def rewards(self, name: str, task: control.Task) -> Float64[np.ndarray, " M"]:
        """Returns what a task of PAID_AT_ONCE pays."""
        paid = _point_mass_reward(self) if name in _POINT_MASSES else task.get_reward(self)
        return np.broadcast_to(paid, len(self))

    def observations(self, task: control.Task) -> Float32[np.ndarray, "M O"]:
        """Returns what a task of SHOWN_AT_ONCE shows, flattened in dm_control's own order."""
        parts = task.get_observation(self).values()
        return np.concatenate([np.reshape(part, (-1, len(self))) for part in parts]).T.astype(np.float32)


class _Named:
    """dm_control's named access to a field of many states."""

    def __init__(self, indexer: Any, values: np.ndarray) -> None:
        self._axes, self._values = indexer.axes, values

    def __getitem__(self, key: Any) -> np.ndarray:
        items = key if isinstance(key, tuple) else (key,)
        return self._values[tuple(axis.convert_key_item(item) for axis, item in zip(self._axes, items, strict=False))]


def _point_mass_reward(states: States) -> Float64[np.ndarray, " M"]:
    """`dm_control.suite.point_mass`, whose mean over the actions would be one over the states too."""
    size = states.named.model.geom_size["target", 0]
    near = rewards.tolerance(states.mass_to_target_dist(), bounds=(0, size), margin=size)
    small = rewards.tolerance(states.control(), margin=1, value_at_margin=0, sigmoid="quadratic").mean(axis=0)
    return near * ((small + 4) / 5)


def _visited(
    physics: engine.Physics, states: Float64[np.ndarray, "M P"], controls: Float64[np.ndarray, "M A"]
) -> Iterator[int]:
    """Yields every row with the physics in its state and under its control, as a step would have left it."""
    physics.reset()
    model, data = physics.model.ptr, physics.data.ptr
    # dm_control steps physics so that a reward sees positions, velocities and their sensors of the state it led to, and
    # nothing that depends on forces. The first half of a MuJoCo step computes just these; contacts and constraints only
    # enter forces, and without them it takes half the time.
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
    """Yields the states in their order, so many at a time as memory has room for."""
    for start in range(0, len(states), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        yield States(name, physics, states[part], controls[part])
