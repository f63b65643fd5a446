"""A curriculum of chain lengths: training starts with short chains and ends with long ones.

Short chains teach a model to look up earlier timesteps; long ones teach it to find them among many.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from data.errors import DataError


@dataclass(frozen=True)
class Growth:
    """The number of trajectories of a chain, by training step: each of `lengths` for an equal share of the first
    `steps` steps.

    While chains are short, a row of a batch holds several of them side by side, so that every step costs the same.
    """

    lengths: tuple[int, ...] = ()
    steps: int = 0

    def at(self, step: int, longest: int) -> int:
        """Returns the number of trajectories of a chain at training step `step`; `longest` from step `steps` on."""
        return self.lengths[step * len(self.lengths) // self.steps] if step < self.steps and self.lengths else longest

    def check(self, longest: int) -> None:
        """Raises DataError unless `lengths` ascend and all divide `longest`, the number of trajectories of a row."""
        misfit: Sequence[int] = [length for length in self.lengths if length < 1 or longest % length]
        if misfit or list(self.lengths) != sorted(self.lengths):
            raise DataError(
                f"a chain of {longest} trajectories grows through its divisors, the smallest first; got "
                f"{list(self.lengths)}. Use such as {[n for n in (8, 16, 32) if longest % n == 0] or [1]}"
            )
