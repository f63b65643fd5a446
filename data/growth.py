"""Chains that grow in the course of training: short ones teach to look up, long ones to find it among many."""

from collections.abc import Sequence
from dataclasses import dataclass

from data.errors import DataError


@dataclass(frozen=True)
class Growth:
    """Trajectories of a chain by training step: each of `lengths` for an equal share of the first `steps`.

    A row of a batch then holds as many short chains side by side as there is room for, so that every step costs the
    same.
    """

    lengths: tuple[int, ...] = ()
    steps: int = 0

    def at(self, step: int, longest: int) -> int:
        """Returns the trajectories of a chain at a step; `longest` once the growing is over."""
        return self.lengths[step * len(self.lengths) // self.steps] if step < self.steps and self.lengths else longest

    def check(self, longest: int) -> None:
        """Raises DataError unless rows of `longest` trajectories can be cut into each of the lengths."""
        misfit: Sequence[int] = [length for length in self.lengths if length < 1 or longest % length]
        if misfit or list(self.lengths) != sorted(self.lengths):
            raise DataError(
                f"a chain of {longest} trajectories grows through its divisors, the smallest first; got "
                f"{list(self.lengths)}. Use such as {[n for n in (8, 16, 32) if longest % n == 0] or [1]}"
            )
