"""EnvironmentBatch: several environments of one task, stepped together."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32, Float64

from data.dmc import Environment
from data.errors import DataError


class BatchStep(NamedTuple):
    """The result of one step of every environment of a batch; a row per environment."""

    observation: Float32[np.ndarray, "B O"]
    reward: Float64[np.ndarray, " B"]
    terminated: Bool[np.ndarray, " B"]
    truncated: Bool[np.ndarray, " B"]


class EnvironmentBatch:
    """Environments of one task, stepped together; the results are bitwise those of separate environments.

    The task is loaded once and cloned, because loading is slow. Rows may end at different times: a row whose episode is
    over is not stepped until the next reset. Its reward is 0, and it keeps its last observation and flags.
    """

    def __init__(self, task: str, count: int, *, episode_steps: int | None = None) -> None:
        """Creates `count` environments; DataError when there is no such task, or count is below 1."""
        if count < 1:
            raise DataError(f"a batch needs at least one environment; got count={count}")
        first = Environment(task, episode_steps=episode_steps)
        self.environments = [first, *(first.clone() for _ in range(count - 1))]
        self.episode_steps = first.episode_steps
        self.observation_size = first.observation_space.shape[0]
        self.action_size = first.action_space.shape[0]
        self._observation = np.zeros((count, self.observation_size), np.float32)
        self._terminated = np.ones(count, bool)
        self._truncated = np.ones(count, bool)

    def __len__(self) -> int:
        return len(self.environments)

    @property
    def over(self) -> Bool[np.ndarray, " B"]:
        """A mask of the rows whose episode is over."""
        return self._terminated | self._truncated

    def reset(
        self,
        seeds: Sequence[int | Sequence[int]],
        goals: Float[np.ndarray, "B G"] | None = None,
        signs: Float[np.ndarray, "B S"] | None = None,
    ) -> Float32[np.ndarray, "B O"]:
        """Returns the first observations of new episodes, with one seed (and goal, and sign) per row.

        With fewer seeds than rows, the remaining rows count as over, and their observation is 0. DataError for too many
        seeds, or for seeds and goals of different numbers.
        """
        count = len(self)
        if len(seeds) > count or (goals is not None and len(goals) != len(seeds)):
            raise DataError(
                f"a batch of {count} takes up to {count} seeds, with a goal for each or none at all; "
                f"got {len(seeds)} seeds and {None if goals is None else len(goals)} goals"
            )
        self._terminated[:] = self._truncated[:] = True
        self._observation[:] = 0.0
        for row, seed in enumerate(seeds):
            options = {name: given[row] for name, given in (("goal", goals), ("sign", signs)) if given is not None}
            self._observation[row], _ = self.environments[row].reset(seed=seed, options=options)
        self._terminated[: len(seeds)] = self._truncated[: len(seeds)] = False
        return self._observation.copy()

    def step(self, actions: Float[np.ndarray, "B A"]) -> BatchStep:
        """Steps every row with its action. Rows whose episode is over ignore their action."""
        if np.shape(actions) != (len(self), self.action_size):
            raise DataError(
                f"actions of this batch have shape {(len(self), self.action_size)}; got {np.shape(actions)}"
            )
        reward = np.zeros(len(self))
        for row in np.flatnonzero(~self.over):
            taken = self.environments[row].step(actions[row])
            self._observation[row], reward[row], self._terminated[row], self._truncated[row], _ = taken
        return BatchStep(self._observation.copy(), reward, self._terminated.copy(), self._truncated.copy())

    def physics_states(self) -> Float64[np.ndarray, "B P"]:
        """Returns the MuJoCo state of every row."""
        return np.stack([environment.physics_state() for environment in self.environments])
