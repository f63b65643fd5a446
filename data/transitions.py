"""TransitionSampler draws transitions (s, a, r, d, s') by (seed, step, row), for agents that learn a value function."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from data.chains import ChainSampler, Split
from data.draws import TRANSITION, generator_of, row_indices
from data.errors import DataError
from data.lazy_field import LazyField
from data.store import TrajectoryStore
from data.tasks import goal_task

FIELDS = ("observation", "action", "reward", "discount")


class TransitionBatch(NamedTuple):
    """B rows of M = 1 transitions; the axis M stands where other batches have their sequence axis."""

    observation: np.ndarray  # f32[B, M, O]
    action: np.ndarray  # f32[B, M, A]
    reward: np.ndarray  # f32[B, M]
    discount: np.ndarray  # f32[B, M], 0 where the episode terminated; 1 also where the time limit truncated it
    next_observation: np.ndarray  # f32[B, M, O]
    key: np.ndarray  # u32[B, M, 2], different random bits for each transition, for random numbers in a loss


class TransitionSampler:
    """Draws transitions uniformly from a store; every draw is a pure function of its arguments.

    `split` and `held_out` are as for `ChainSampler`. Can be pickled. DataError for a task that hides its goal, because
    its store holds no rewards.
    """

    timesteps = 1

    def __init__(self, store: TrajectoryStore, *, seed: int, split: Split = "train", held_out: float = 0.1) -> None:
        if goal_task(store.task) is not None:
            raise DataError(
                f"{store.path} holds no rewards, because {store.task} hides its goal: no value can be learnt. "
                "Use a task whose observation tells all, or an agent that reads chains"
            )
        self.store, self.seed = store, seed
        self.chains = ChainSampler(store, trajectories=1, target="own", seed=seed, split=split, held_out=held_out)
        self.episodes = self.chains.pool
        self.ends = np.cumsum(store.lengths[self.episodes])
        self._columns: dict[str, LazyField] | None = None

    def sample(
        self, step: int, rows: int | Sequence[int] | np.ndarray, places: Sequence[int] | np.ndarray | None = None
    ) -> TransitionBatch:
        """Returns the transitions `rows` of training step `step` (a number n means rows 0 to n-1); M is 1. `places` is
        ignored."""
        indices = row_indices(rows)
        # Row r uses words 2r and 2r + 1 of the step's random stream, whichever other rows are requested.
        words = generator_of(self.seed, TRANSITION, step, 0).integers(
            0, 2**64, (int(indices.max(initial=-1)) + 1, 2), dtype=np.uint64
        )[indices]
        chosen = ((words[:, 0] >> 11).astype(np.float64) * 2.0**-53 * self.ends[-1]).astype(np.int64)
        place = np.searchsorted(self.ends, chosen, side="right")
        episode = self.episodes[place]
        # `ends` counts only the episodes of the split, so the row is found by its distance from the episode's end.
        row = self.store.start[episode + 1] - (self.ends[place] - chosen)
        columns = self._read()
        fields = (
            columns["observation"][row + episode],  # every earlier episode has one observation more than steps
            columns["action"][row],
            columns["reward"][row],
            columns["discount"][row],
            columns["observation"][row + episode + 1],
            np.ascontiguousarray(words[:, 1:]).view(np.uint32),
        )
        return TransitionBatch(*(values[:, None] for values in fields))

    def typical_targets(self) -> dict[str, float]:
        """Returns {task of the store: the 90th percentile of the returns of sampled episodes of the train split}."""
        return self.chains.typical_targets()

    def _read(self) -> dict[str, LazyField]:
        if self._columns is None:
            self._columns = {field: LazyField(self.store, field) for field in FIELDS}
        return self._columns

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_columns": None}
