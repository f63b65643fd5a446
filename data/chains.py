"""ChainSampler draws chains of N trajectories by (seed, step, row), by default sorted from lowest to highest return.

A chain of hindsight (Liu and Abbeel 2023, arXiv 2305.16554) is a sequence of whole trajectories of one task. All of
them are conditioned on the return R* of the best one. Three trajectories of two steps:

    trajectory         0  0    1  1    2  2
    reward             0  0    0  1    1  1        R* = 2
    return_to_go       2  2    2  2    2  1        R* - sum_{k<t} r_k within each trajectory
    previous_reward    0  0    0  0    1  1        of the previous timestep, across trajectories

With `lengths="mixed"` every row is cut at random into shorter chains, which stand side by side as segments. So a model
learns to act after any number of trajectories, and a row holds several last trajectories:

    segment            0  0  0  0    1  1  1  1  1  1    2  2
    trajectory         0  0  1  1    0  0  1  1  2  2    0  0

Where the task hides a goal, the goal of a chain is the place where one of its trajectories came to rest.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np

from data.chain_batch import ChainBatch
from data.draws import CUT, PROMPT, SAMPLE, TARGET, generator_of, row_indices, split_episodes
from data.errors import DataError
from data.growth import Growth
from data.hindsight import GoalSampling, HindsightGoals, hidden_goal_task
from data.store import TrajectoryStore
from data.tasks import GoalTask
from data.timesteps import Chains, StoredTimesteps

Sort = Literal["ascending", "descending", "random", "time"]
Split = Literal["train", "held_out", "all"]
Lengths = Literal["full", "mixed"]

_TARGET_CHAINS = 512


class ChainSampler:
    """Draws chains of `trajectories` trajectories from a store; every draw is a pure function of its arguments.

    `sort`: the order within a chain: by return, "time" (as in the store; with annealed goals, as drawn) or "random".
    `target`: the return that conditions a trajectory: "max" (of the chain's best), "own" (its own) or a number.
    `split`: "train", "held_out" or "all"; "held_out" is a share `held_out`, the same for every seed, "train" the rest.
    `best`: draws only the trajectories of highest return that make up this share of the split's time steps ("%BC" of
    Chen et al. 2021); where the goal is hidden, their return for the place where each came to rest counts.
    `lengths`: "full" for chains of `trajectories`, "mixed" for chains of random length that add up to `trajectories`.
    `growth` shortens chains early in training. `goals`: how hidden goals are chosen (None: the defaults); only for
    stores with hidden goals. Can be pickled: a copy reads the store again in its own process.
    """

    def __init__(
        self,
        store: TrajectoryStore,
        *,
        trajectories: int,
        sort: Sort = "ascending",
        target: Literal["max", "own"] | float = "max",
        seed: int,
        split: Split = "train",
        held_out: float = 0.1,
        best: float = 1.0,
        lengths: Lengths = "full",
        goals: GoalSampling | None = None,
        growth: Growth | None = None,
    ) -> None:
        _check_choice("sort", sort, get_args(Sort))
        _check_choice("split", split, get_args(Split))
        _check_choice("lengths", lengths, get_args(Lengths))
        if isinstance(target, str):
            _check_choice("target", target, ("max", "own"), "a number")
        elif not np.isfinite(target):
            raise DataError(f"target must be 'max', 'own' or a finite number; got {target}")
        if trajectories < 1:
            raise DataError(f"a chain needs trajectories >= 1; got {trajectories}")
        if not 0 <= held_out < 1:
            raise DataError(f"held_out is a share of the episodes, 0 <= held_out < 1; got {held_out}")
        if not 0 < best <= 1:
            raise DataError(f"best is a share of the time steps, 0 < best <= 1; got {best}")
        if seed < 0:
            raise DataError(f"seed must be 0 or more; got {seed}")
        self.store, self.trajectories, self.sort, self.target = store, trajectories, sort, target
        self.seed, self.split, self.held_out, self.lengths = seed, split, held_out, lengths
        self.growth = growth or Growth()
        self.growth.check(trajectories)
        self.longest = store.longest
        self.task: GoalTask | None = hidden_goal_task(store, goals)
        self.goals = goals or GoalSampling()
        self._pools = split_episodes(store.episodes, held_out)
        self._timesteps: StoredTimesteps | None = None
        self._goals: HindsightGoals | None = None
        if best < 1:
            self._pools[split] = self._highest(self._pools[split], best)
        if len(self.pool) < trajectories:
            raise DataError(
                f"{store.path} has {len(self.pool)} episodes in split {split!r} (held_out={held_out}), too few for "
                f"chains of {trajectories}; lower trajectories, or collect more episodes"
            )

    @property
    def timesteps(self) -> int:
        """M, the timesteps of a sampled row: `trajectories` times the length of the store's longest episode."""
        return self.trajectories * self.longest

    @property
    def pool(self) -> np.ndarray:
        """The indices of the episodes that this sampler draws from, ascending; i64."""
        return self._pools[self.split]

    def sample(
        self, step: int, rows: int | Sequence[int] | np.ndarray, places: Sequence[int] | np.ndarray | None = None
    ) -> ChainBatch:
        """Returns the batch rows `rows` of training step `step` (a number n means rows 0 to n-1). With `places`, only
        the timesteps at these positions of each row, as `ChainBatch.take` would.

        A timestep does not depend on which others are requested, and observations and actions are read from the store
        only around those requested. So several hosts or workers can share a batch, or a chain.
        """
        indices = row_indices(rows)
        places = np.arange(self.timesteps) if places is None else np.asarray(places, np.int64)
        batch = self._stored().empty(len(indices), places)
        for length, cuts in sorted(self._cuts(step, indices).items()):
            # Chains of one length are drawn together, which is fast. Chains without a requested timestep are skipped.
            cuts = [cut for cut in cuts if ((places >= cut.start) & (places < cut.start + length * self.longest)).any()]
            if not cuts:
                continue
            generators = [generator_of(self.seed, SAMPLE, step, indices[cut.row], cut.chain) for cut in cuts]
            chains = self._arranged(*self._draw(generators, self.pool, length))
            row, start, number = (np.asarray(values) for values in zip(*cuts, strict=True))
            place = places - start[:, None]
            chain, column = np.nonzero((place >= 0) & (place < length * self.longest))
            at = row[chain], column
            self._stored().put(chains, chain, place[chain, column], batch, at, number[chain])
        return batch

    def _cuts(self, step: int, indices: np.ndarray) -> dict[int, list["_Cut"]]:
        """Returns where each chain of each row begins, grouped by the number of trajectories of the chain."""
        most = self.growth.at(step, self.trajectories)
        if self.lengths == "full":
            chains = range(self.trajectories // most)
            return {most: [_Cut(row, n * most * self.longest, n) for row in range(len(indices)) for n in chains]}
        by_length: dict[int, list[_Cut]] = {}
        for row, index in enumerate(indices):
            random, start, chain = generator_of(self.seed, CUT, step, index), 0, 0
            while start < self.trajectories:
                length = int(random.integers(1, min(most, self.trajectories - start) + 1))
                by_length.setdefault(length, []).append(_Cut(row, start * self.longest, chain))
                start, chain = start + length, chain + 1
        return by_length

    def prompt(
        self,
        rows_seed: int,
        rows: int | Sequence[int] | np.ndarray,
        trajectories: int,
        goal: np.ndarray | None,
        target: float,
    ) -> ChainBatch:
        """Returns contexts for evaluation: per row, `trajectories` random episodes of the split, sorted as in training.

        Rewards are computed for each row's `goal` [B, G] (None where the task hides none). Every trajectory is
        conditioned on the return `target`. The draw does not depend on `target`, and depends on `goal` only if
        `goals.met` is set. The episodes drawn for n trajectories are among those drawn for more, unless `goals.met` is
        "annealed". With 0 trajectories, M is 0.
        """
        indices, met = row_indices(rows), self.goals.met
        if trajectories < 0 or (met is None and trajectories > len(self.pool)):
            raise DataError(
                f"a context takes 0 to {len(self.pool)} trajectories, the episodes in split {self.split!r}; "
                f"got {trajectories}"
            )
        if self.task is None and goal is not None:
            raise DataError(f"task {self.store.task!r} hides no goal, so a context takes goal=None; got a goal")
        goal = None if goal is None else np.asarray(goal, np.float64)
        if self.task is not None and trajectories:
            expected = (len(indices), self.task.goal_size)
            if np.shape(goal) != expected:
                raise DataError(
                    f"a context of {self.store.task!r} needs a goal a row, {expected}; got {np.shape(goal)}"
                )
        generators = [generator_of(rows_seed, PROMPT, 0, row) for row in indices]
        hindsight = self._hindsight()
        if met is not None and hindsight is not None and goal is not None:
            episodes = hindsight.rarely(generators, self.pool, trajectories, goal)
        else:
            drawn = [generator.permutation(self.pool)[:trajectories] for generator in generators]
            episodes = np.asarray(drawn, np.int64).reshape(len(indices), trajectories)
        chains = self._arranged(episodes, goal, target=float(target))
        places = np.arange(trajectories * self.longest)
        batch = self._stored().empty(len(indices), places)
        if trajectories and len(indices):
            chain, place = (grid.ravel() for grid in np.indices((len(indices), len(places))))
            self._stored().put(chains, chain, place, batch, (chain, place), 0)
        return batch

    def typical_target(self) -> float:
        """Returns a return to condition on in evaluation: `target` if it is a number, else the 90th percentile of R*
        over 512 chains of the train split.
        """
        if isinstance(self.target, float):
            return self.target
        if len(self._pools["train"]) < self.trajectories:
            raise DataError(
                f"{self.store.path} has {len(self._pools['train'])} training episodes, too few for chains of "
                f"{self.trajectories}; lower trajectories or held_out"
            )
        best = []
        for first in range(0, _TARGET_CHAINS, 16):
            rows = np.arange(first, first + 16)
            generators = [generator_of(self.seed, TARGET, 0, row) for row in rows]
            episodes, goal = self._draw(generators, self._pools["train"], self.trajectories)
            best.append(self._rewards(episodes, goal)[0].max(-1))
        return float(np.percentile(np.concatenate(best), 90))

    def typical_targets(self) -> dict[str, float]:
        """Returns {task of the store: `typical_target()`}."""
        return {self.store.task: self.typical_target()}

    def _highest(self, pool: np.ndarray, best: float) -> np.ndarray:
        """Returns the episodes of highest return that make up a share `best` of the pool's steps; ties by index."""
        hindsight = self._hindsight()
        returns = self.store.returns[pool]
        if hindsight is not None:
            pool = pool[hindsight.stays[pool]]
            returns = hindsight.reward(pool[:, None], hindsight.goal[pool]).sum((1, 2), dtype=np.float64)
        ranked = pool[np.argsort(-returns, kind="stable")]
        steps = np.cumsum(self.store.lengths[ranked])
        return np.sort(ranked[: max(1, int(np.searchsorted(steps, best * steps[-1], side="right")))])

    def _stored(self) -> StoredTimesteps:
        if self._timesteps is None:
            self._timesteps = StoredTimesteps(self.store)
        return self._timesteps

    def _hindsight(self) -> HindsightGoals | None:
        if self._goals is None and self.task is not None:
            self._goals = HindsightGoals(self.store, self.task, self.goals)
        return self._goals

    def _draw(
        self, generators: list[np.random.Generator], pool: np.ndarray, trajectories: int
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Returns the episodes [B, N] of each row, unsorted, and the goal [B, G] of each row."""
        hindsight = self._hindsight()
        if hindsight is not None:
            return hindsight.draw(generators, pool, trajectories)
        drawn = [pool[generator.choice(len(pool), trajectories, replace=False)] for generator in generators]
        return np.asarray(drawn, np.int64).reshape(len(generators), trajectories), None

    def _rewards(self, episodes: np.ndarray, goal: np.ndarray | None) -> tuple[np.ndarray, np.ndarray | None]:
        """Returns the episode returns f64[C, N] of `episodes` for `goal` [C, G], and the rewards of their steps
        f32[C, N, longest]; None in place of these where the store has the rewards."""
        hindsight = self._hindsight()
        if hindsight is None or goal is None:
            return self.store.returns[episodes], None
        reward = hindsight.reward(episodes, goal)
        return reward.sum(-1, dtype=np.float64), reward

    def _arranged(self, episodes: np.ndarray, goal: np.ndarray | None, target: float | None = None) -> Chains:
        """Returns chains of `episodes` [C, N], sorted; `target` overrides `self.target`."""
        total, reward = self._rewards(episodes, goal)
        order = self._order(episodes, total)
        episodes, total = (np.take_along_axis(values, order, 1) for values in (episodes, total))
        best = total.max(axis=1, keepdims=True, initial=-np.inf)
        asked: np.ndarray | float = best if self.target == "max" else total
        if target is not None or not isinstance(self.target, str):
            asked = float(self.target) if target is None else target
        return Chains(
            episodes,
            target=np.broadcast_to(asked, total.shape),
            reward=None if reward is None else np.take_along_axis(reward, order[..., None], 1),
        )

    def _order(self, episodes: np.ndarray, total: np.ndarray) -> np.ndarray:
        # The sorts are stable, so that ties keep the order of the draw, which is random and reproducible.
        if self.sort == "random" or (self.sort == "time" and self.goals.met == "annealed"):
            return np.broadcast_to(np.arange(episodes.shape[1]), episodes.shape)
        key = {"ascending": total, "descending": -total, "time": episodes}[self.sort]
        return np.argsort(key, axis=1, kind="stable")

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_timesteps": None, "_goals": None}


class _Cut(NamedTuple):
    """A chain within a row."""

    row: int  # of the batch
    start: int  # the place of its first timestep
    chain: int  # number within the row


def _check_choice(name: str, value: object, choices: tuple[str, ...], other: str = "") -> None:
    if value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise DataError(f"{name} must be one of {listed}{' or ' + other if other else ''}; got {value!r}")
