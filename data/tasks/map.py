"""Maps: a world of many places, each with a sign that is shown and a goal that is not.

An episode is a visit to one of the places. Its observation holds the place's sign, a random vector; where the goal is
only reward tells, or an earlier visit to the same sign. So what counts is how many places an agent still knows when it
comes back to one of them, however long ago: capacity, where the dark tasks ask for coverage. Bodies, starts, rewards
and episodes are those of the dark tasks, and so the same exploration data serves both.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32

from data.tasks.dark import PointMassDark, ReacherDark

SIGN_SIZE = 32
_NORM = SIGN_SIZE**0.5 / 2  # entries of half a unit: as large as the rest of a normalised observation, and not larger


def sample_signs(rng: np.random.Generator | np.random.RandomState, *count: int) -> Float32[np.ndarray, "*count S"]:
    """Returns signs: normal vectors, all of one length."""
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
