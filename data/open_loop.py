"""Plays a sequence of actions in one call of `mujoco.rollout`, without Python between steps."""

from typing import NamedTuple

import mujoco
import numpy as np
from jaxtyping import Float, Float32, Float64
from mujoco import rollout

from data.dmc import Environment
from data.states import SHOWN_AT_ONCE

_STATE = mujoco.mjtState.mjSTATE_FULLPHYSICS
_AT_ONCE = 1000  # actions per call, so that memory use does not grow with the episode


class Played(NamedTuple):
    """The results of M actions, a row after each action."""

    observation: Float32[np.ndarray, "M O"]
    reward: Float32[np.ndarray, " M"]
    physics: Float64[np.ndarray, "M P"]


def can_play(task: str) -> bool:
    """Returns whether `play` supports the task. It does for tasks of walker, cheetah and point mass, which never
    terminate before the time limit."""
    return task in SHOWN_AT_ONCE


def play(environment: Environment, actions: Float[np.ndarray, "M A"]) -> Played:
    """Plays M actions from the environment's current state. The results equal those of M calls of `step` to the last
    bit, and are computed much faster.

    Only for tasks with `can_play`. Ends the current episode. dm_control's PhysicsError when the simulation diverges.
    """
    pieces = np.split(actions, range(_AT_ONCE, len(actions), _AT_ONCE))
    physics = np.concatenate([_checked(environment, piece) for piece in pieces])
    observation, reward = environment.outcomes_at(physics, actions)
    return Played(observation, reward.astype(np.float32), physics)


def states_after(environment: Environment, actions: Float[np.ndarray, "M A"]) -> Float64[np.ndarray, "M P"]:
    """Returns the physics state after each action, starting from the environment's current state.

    The states equal those after calls of `step` to the last bit. The environment is left in the last state. Does not
    check for divergence: a diverged simulation keeps its last state.
    """
    pieces = np.split(environment.native_action(actions), range(_AT_ONCE, len(actions), _AT_ONCE))
    return np.concatenate([_states_after(environment, piece) for piece in pieces])


def _checked(environment: Environment, actions: np.ndarray) -> np.ndarray:
    with environment.physics.check_invalid_state():
        return states_after(environment, actions)


def _states_after(environment: Environment, controls: Float64[np.ndarray, "M A"]) -> Float64[np.ndarray, "M P"]:
    model, data = environment.physics.model.ptr, environment.physics.data.ptr
    start = np.empty((1, mujoco.mj_stateSize(model, _STATE)))
    mujoco.mj_getState(model, data, start[0], _STATE)
    held = np.repeat(controls, environment.substeps, axis=0)[None]
    # The constraint solver's warm start is not part of that state, and affects the last bits of contact forces.
    states, _ = rollout.rollout(model, data, start, held, initial_warmstart=data.qacc_warmstart[None].copy())
    after = states[0, environment.substeps - 1 :: environment.substeps]
    size = environment.physics_state().size
    return after[:, 1 : 1 + size]  # column 0 is the time
