"""Whole episodes in one call: actions that are known beforehand need no Python between steps (`mujoco.rollout`)."""

import mujoco
import numpy as np
from jaxtyping import Float, Float64
from mujoco import rollout

from data.dmc import Environment

_STATE = mujoco.mjtState.mjSTATE_FULLPHYSICS
_AT_ONCE = 1000  # actions in a call: memory stays flat


def states_after(environment: Environment, actions: Float[np.ndarray, "M A"]) -> Float64[np.ndarray, "M P"]:
    """Returns the physics state after each of the actions, from the environment's present state on.

    They are, to the last bit, those that as many `step`s lead to. The environment is left in the last of them. Nothing
    is checked: a simulation that breaks down goes on as MuJoCo has it, from the model's initial state.
    """
    pieces = np.split(environment.native_action(actions), range(_AT_ONCE, len(actions), _AT_ONCE))
    return np.concatenate([_states_after(environment, piece) for piece in pieces])


def _states_after(environment: Environment, controls: Float64[np.ndarray, "M A"]) -> Float64[np.ndarray, "M P"]:
    model, data = environment.physics.model.ptr, environment.physics.data.ptr
    start = np.empty((1, mujoco.mj_stateSize(model, _STATE)))
    mujoco.mj_getState(model, data, start[0], _STATE)
    held = np.repeat(controls, environment.substeps, axis=0)[None]
    # The warm start of the constraint solver is no part of that state, and decides the last bits of a contact.
    states, _ = rollout.rollout(model, data, start, held, initial_warmstart=data.qacc_warmstart[None].copy())
    after = states[0, environment.substeps - 1 :: environment.substeps]
    size = environment.physics_state().size
    return after[:, 1 : 1 + size]  # behind the time
