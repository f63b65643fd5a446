"""State coverage of a collector: the share of cells that it has visited.

A point mass moves on a square. Its cells are a grid of 40 by 40, without those inside the walls of the maze. For all
other bodies, a cell is a code of 16 bits: the signs of 16 random projections of the observation (SimHash; Tang et al.
2017, arXiv 1611.04717). All collectors of a body have the same 65,536 cells. Most of them are unreachable, so these
shares can only be compared with each other.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float, Int

from data import Trajectory
from data.tasks.catalogue import body

SIDE = 40  # cells along a side of the square
HALF = 0.29  # metres from its centre to the joint limits
BITS = 16


class Coverage:
    """The cells of a body, and which of them have been visited. cell: returns the cells of an episode's states."""

    def __init__(self, cell: Callable[[Trajectory], Int[np.ndarray, " N"]], reachable: Bool[np.ndarray, " C"]):
        self.cell, self.reachable = cell, reachable
        self.visited = np.zeros(len(reachable), bool)

    def add(self, episode: Trajectory) -> None:
        """Marks the cells of an episode as visited."""
        self.visited[self.cell(episode)] = True

    @property
    def share(self) -> float:
        """The share of the reachable cells that have been visited, 0 to 1."""
        return float((self.visited & self.reachable).sum() / self.reachable.sum())


def make_coverage(task: str, observation_size: int) -> Coverage:
    """Returns the coverage of a task's body, with no cell visited."""
    if body(task) in ("point_mass", "point_mass_maze"):
        return Coverage(_square, _open(walls=body(task) == "point_mass_maze"))
    directions = np.random.default_rng(observation_size).normal(size=(observation_size, BITS))
    weights = 2 ** np.arange(BITS)
    return Coverage(lambda episode: (episode.observation @ directions > 0) @ weights, np.ones(2**BITS, bool))


def _square(episode: Trajectory) -> Int[np.ndarray, " N"]:
    assert episode.physics is not None
    place = np.floor((episode.physics[:, :2] + HALF) / (2 * HALF) * SIDE).astype(int)
    x, y = np.clip(place, 0, SIDE - 1).T
    return x * SIDE + y


def _open(*, walls: bool) -> Bool[np.ndarray, " C"]:
    """Returns the cells whose centres the mass, a ball of radius 0.01 m, can reach. The walls form a cross."""
    middle = (np.arange(SIDE) + 0.5) / SIDE * 2 * HALF - HALF
    x, y = (axis.ravel() for axis in np.meshgrid(middle, middle, indexing="ij"))
    return ~(walls & (_within(x, y) | _within(y, x)))


def _within(along: Float[np.ndarray, " C"], across: Float[np.ndarray, " C"]) -> Bool[np.ndarray, " C"]:
    return (np.abs(along) < 0.19) & (np.abs(across) < 0.03)
