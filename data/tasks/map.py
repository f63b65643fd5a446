"""Map tasks: a world has many places, each with a sign, which is observed, and a goal, which is hidden.

An episode is a visit to one place. Its observation includes the place's sign, a random vector. Only rewards, or an
earlier visit with the same sign, show where the goal is. So the score depends on how many places an agent remembers,
however long ago it visited them: map tasks measure the capacity of a memory, dark tasks how well an agent covers the
possible goals. Bodies, start states, rewards and episode lengths are those of the dark tasks, so the same exploration
data serves both.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32

from data.tasks.dark import PointMassDark, ReacherDark

SIGN_SIZE = 32
_NORM = SIGN_SIZE**0.5 / 2  # the root mean square of the entries is 0.5, so signs do not dominate the observation


def sample_signs(rng: np.random.Generator | np.random.RandomState, *count: int) -> Float32[np.ndarray, "*count S"]:
    """Returns `count` random signs: normally distributed vectors, scaled to the same norm; float32 [*count, S]."""
    signs = rng.normal(size=(*count, SIGN_SIZE))
    return (signs * (_NORM / np.linalg.norm(signs, axis=-1, keepdims=True))).astype(np.float32)


@dataclass(frozen=True)
class PointMassMap(PointMassDark):
    """`point_mass-dark` at one of the places of a world."""

    name: str = "point_mass-map"
    sign_size: int = SIGN_SIZE
    collected_on: str = "point_mass-dark"


@dataclass(frozen=True)
class ReacherMap(ReacherDark):
    """`reacher-dark` at one of the places of a world."""

    name: str = "reacher-map"
    sign_size: int = SIGN_SIZE
    collected_on: str = "reacher-dark"
