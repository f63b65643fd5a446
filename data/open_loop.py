"""Whole episodes in one call: actions that are known beforehand need no Python between steps (`mujoco.rollout`)."""

from typing import NamedTuple

import mujoco
import numpy as np
from jaxtyping import Float, Float32, Float64
from mujoco import rollout

from data.dmc import Environment
from data.states import SHOWN_AT_ONCE

_STATE = mujoco.mjtState.mjSTATE_FULLPHYSICS
_AT_ONCE = 1000  # actions in a call: memory stays flat


class Played(NamedTuple):
    """What M actions led to: a row after each of them."""

    observation: Float32[np.ndarray, "M O"]
    reward: Float32[np.ndarray, " M"]
    physics: Float64[np.ndarray, "M P"]


def can_play(task: str) -> bool:
    """Returns whether `play` knows the task: walker, cheetah and point mass, which never end before their time."""
    return task in SHOWN_AT_ONCE


def play(environment: Environment, actions: Float[np.ndarray, "M A"]) -> Played:
    """Returns what as many `step`s return, to the last bit, much faster; the episode is over. For tasks of `can_play`.

    dm_control's PhysicsError when the simulation breaks down.
    """
    pieces = np.split(actions, range(_AT_ONCE, len(actions), _AT_ONCE))
    physics = np.concatenate([_checked(environment, piece) for piece in pieces])
    observation, reward = environment.outcomes_at(physics, actions)
    return Played(observation, reward.astype(np.float32), physics)


def states_after(environment: Environment, actions: Float[np.ndarray, "M A"]) -> Float64[np.ndarray, "M P"]:
    """Returns the physics state after each of the actions, from the environment's present state on.

    They are, to the last bit, those that as many `step`s lead to. The environment is left in the last of them. Nothing
    is checked: a simulation that breaks down stays where it did.
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
    # The warm start of the constraint solver is no part of that state, and decides the last bits of a contact.
    states, _ = rollout.rollout(model, data, start, held, initial_warmstart=data.qacc_warmstart[None].copy())
    after = states[0, environment.substeps - 1 :: environment.substeps]
    size = environment.physics_state().size
    return after[:, 1 : 1 + size]  # behind the time
