"""Offline-RL data: trajectories, the store that holds them, and the chains drawn from it. NumPy only, no JAX."""

import os

from data.interrupts import guard_imports, is_command

if is_command():
    guard_imports()

# Nothing here renders, and dm_control warns at import when there is no display. To render, set MUJOCO_GL=egl or osmesa.
os.environ.setdefault("MUJOCO_GL", "disabled")

from data.chains import ChainBatch, ChainSampler, GoalSampling
from data.errors import DataError
from data.growth import Growth
from data.store import TrajectoryStore
from data.trajectory import Trajectory
from data.transitions import TransitionBatch, TransitionSampler
from data.worlds import WorldSampler

__all__ = [
    "ChainBatch",
    "ChainSampler",
    "DataError",
    "GoalSampling",
    "Growth",
    "Trajectory",
    "TrajectoryStore",
    "TransitionBatch",
    "TransitionSampler",
    "WorldSampler",
]
