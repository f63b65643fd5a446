"""WorldSampler draws chains of visits to the places of a world by (seed, step, row), for the map tasks.

A place has a sign, which the observation shows in every timestep of a visit, and a hidden goal, which gives the reward.
In training each place of a chain is visited twice, at random times, by two different stored trajectories that come to
rest within the goal's radius. The second visit is the query, because the first one has shown where the goal is:

    place              2  0  1  0  3  2  3  1
    last               0  0  0  1  0  1  1  1        1 in the queries

Only the sign links the two visits of a place: the previous action and reward of a visit's first timestep are 0, and
the return to go is always 0.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Float64
from scipy.spatial import cKDTree

from data.chain_batch import ChainBatch
from data.chains import ChainSampler, Split
from data.draws import VISITS, WORLD, generator_of, row_indices
from data.errors import DataError
from data.growth import Growth
from data.hindsight import NEAR, GoalSampling, HindsightGoals, hidden_goal_task
from data.store import TrajectoryStore
from data.tasks.map import sample_signs
from data.timesteps import Chains, StoredTimesteps


class Visits(NamedTuple):
    """C chains of N visits."""

    episodes: np.ndarray  # i64[C, N]
    goal: np.ndarray  # f64[C, N, G]
    sign: np.ndarray  # f32[C, N, S]
    is_query: np.ndarray  # bool[C, N]


class Queries(NamedTuple):
    """Q queries in each of W worlds. A query is a second visit to one of the world's places, uniform over the order in
    which they were visited."""

    place: np.ndarray  # i64[W, Q], index of the place in the order of the visits
    goal: Float64[np.ndarray, "W Q G"]
    sign: Float32[np.ndarray, "W Q S"]


class WorldSampler:
    """Draws chains of `trajectories` visits from a store. `trajectories` is even, or 1 for a query alone.

    Every draw is a pure function of its arguments. `split`, `held_out`, `best` and `growth` are as for `ChainSampler`.
    Can be pickled. DataError for a store whose task has no places, and when no two episodes rest in one place.
    """

    def __init__(
        self,
        store: TrajectoryStore,
        *,
        trajectories: int,
        seed: int,
        split: Split = "train",
        held_out: float = 0.1,
        best: float = 1.0,
        growth: Growth | None = None,
    ) -> None:
        task = hidden_goal_task(store, None)
        if task is None or not task.sign_size:
            raise DataError(f"{store.path}: task {store.task!r} has no places; use a map, such as 'point_mass-map'")
        growth = growth or Growth()
        odd = [length for length in (*growth.lengths, trajectories) if (length % 2 and length > 1) or length < 1]
        if odd:
            raise DataError(f"chains of a map visit every place twice: trajectories must be even, or 1; got {odd[0]}")
        growth.check(trajectories)
        self.store, self.task, self.trajectories = store, task, trajectories
        self.seed, self.split, self.growth = seed, split, growth
        self.longest = store.longest
        chosen = ChainSampler(store, trajectories=1, seed=seed, split=split, held_out=held_out, best=best)
        self.pool = chosen.pool
        self._timesteps: StoredTimesteps | None = None
        self._resting: _Resting | None = None

    @property
    def timesteps(self) -> int:
        """M, the timesteps of a sampled row: `trajectories` times the length of the store's longest episode."""
        return self.trajectories * self.longest

    def sample(
        self, step: int, rows: int | Sequence[int] | np.ndarray, places: Sequence[int] | np.ndarray | None = None
    ) -> ChainBatch:
        """Returns the batch rows `rows` of training step `step` (a number n means rows 0 to n-1). With `places`, only
        the timesteps at these positions of each row. A timestep does not depend on which others are requested."""
        indices = row_indices(rows)
        places = np.arange(self.timesteps) if places is None else np.asarray(places, np.int64)
        length = self.growth.at(step, self.trajectories)
        span = length * self.longest
        column = np.flatnonzero((places >= 0) & (places < self.timesteps))
        numbers, own = np.unique(places[column] // span, return_inverse=True)
        generators = [generator_of(self.seed, VISITS, step, row, chain) for row in indices for chain in numbers]
        visits = self._rests().pairs(generators, max(2, length))
        visits = Visits(*(field[:, -length:] for field in visits))  # for length 1, only the query of the pair
        chain = (np.arange(len(indices))[:, None] * len(numbers) + own).ravel()
        at = np.repeat(np.arange(len(indices)), len(column)), np.tile(column, len(indices))
        place = np.tile(places[column] % span, len(indices))
        return self._put(visits, chain, place, at, np.tile(numbers[own], len(indices)), (len(indices), places))

    def history(
        self, rows_seed: int, rows: int | Sequence[int] | np.ndarray, places: int, seen: int, queries: int
    ) -> tuple[ChainBatch, Queries]:
        """Returns contexts and queries for evaluation, one world of `places` places per row.

        Each place is visited once; the context holds the last `seen` visits. If `seen` is 0, M is 0. The queries do not
        depend on `seen`. For any `places` >= `queries` they are the same, but for the times at which their places were
        visited.
        """
        if not 0 <= seen <= places or places < 1:
            raise DataError(f"of a world of {places} places 0 to {places} can be seen; got {seen}")
        indices = row_indices(rows)
        worlds = [self._rests().world(generator_of(rows_seed, WORLD, 0, row), places) for row in indices]
        drawn = Visits(*(np.stack(field) for field in zip(*worlds, strict=True)))
        # The places are drawn first, so that the queried ones are the same for any world size; then they are ordered.
        order = [generator_of(rows_seed, WORLD, places, row, 1).permutation(places) for row in indices]
        row, visited = np.arange(len(indices))[:, None], np.stack(order)
        place = np.argsort(visited, axis=1)[:, np.arange(queries) % places]
        whole = Visits(*(field[row, visited] for field in drawn))
        pick = row, place
        last = Visits(*(field[:, places - seen :] for field in whole))
        timesteps = np.arange(seen * self.longest)
        chain, at = (grid.ravel() for grid in np.indices((len(indices), len(timesteps))))
        prompt = self._put(last, chain, at, (chain, at), np.zeros_like(chain), (len(indices), timesteps))
        return prompt, Queries(place, whole.goal[pick], whole.sign[pick])

    def typical_target(self) -> float:
        """Returns 0: chains of visits are not conditioned on a return."""
        return 0.0

    def typical_targets(self) -> dict[str, float]:
        """Returns {task of the store: 0}."""
        return {self.store.task: self.typical_target()}

    def _put(self, visits: Visits, chain, place, at, segment, shape: tuple[int, np.ndarray]) -> ChainBatch:
        """Returns a batch of `shape` with `place` [L] of `chain` [L] written to row and column `at` (both [L])."""
        if self._timesteps is None:
            self._timesteps = StoredTimesteps(self.store)
        batch = self._timesteps.empty(*shape)
        signs = np.zeros((*batch.segment.shape, self.task.sign_size), np.float32)
        if len(chain):
            reward = self._rests().reward(visits.episodes, visits.goal)
            nothing = np.zeros(visits.episodes.shape)
            chains = Chains(visits.episodes, target=nothing, reward=reward)
            visit = self._timesteps.put(chains, chain, place, batch, at, segment)
            real = batch.segment[at] >= 0
            at, visit = (at[0][real], at[1][real]), (chain[real], visit)
            signs[at] = visits.sign[visit]
            batch.last[at] = visits.is_query[visit]
        begins = batch.step == 0
        return batch._replace(
            observation=np.concatenate([batch.observation, signs], axis=-1),
            return_to_go=np.zeros_like(batch.return_to_go),
            previous_action=np.where(begins[..., None], np.float32(0), batch.previous_action),
            previous_reward=np.where(begins, np.float32(0), batch.previous_reward),
        )

    def _rests(self) -> "_Resting":
        if self._resting is None:
            self._resting = _Resting(HindsightGoals(self.store, self.task, GoalSampling()), self.pool)
        return self._resting

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_timesteps": None, "_resting": None}


class _Resting:
    """The trajectories of a pool that come to rest, indexed by the place where they do."""

    def __init__(self, hindsight: HindsightGoals, pool: np.ndarray) -> None:
        self.hindsight, self.task = hindsight, hindsight.task
        self.reach = NEAR * self.task.radius
        self.episodes = pool[hindsight.stays[pool]]
        self.ends = hindsight.goal[self.episodes]
        self.tree = cKDTree(self.ends) if len(self.episodes) else None
        alone = np.ones(0, bool) if self.tree is None else self._near(self.ends, count=True) < 2
        self.paired = np.flatnonzero(~alone)
        if not len(self.paired):
            raise DataError(
                f"{hindsight.store.path}: no two of the {len(pool)} episodes come to rest in one place, so none can be "
                "visited twice; collect more with `--policy waypoints`"
            )

    def pairs(self, generators: list[np.random.Generator], visits: int) -> Visits:
        """Returns a chain per generator in which every place is visited twice."""
        half, size = visits // 2, (len(generators), visits // 2)
        query = np.empty(size, np.int64)
        share, place, sign = np.empty(size), np.empty((len(generators), visits), np.int64), []
        for row, generator in enumerate(generators):
            query[row] = self.paired[generator.integers(len(self.paired), size=half)]
            share[row] = generator.random(half)
            place[row] = generator.permutation(visits) % half
            sign.append(sample_signs(generator, half))
        first = np.empty(size, np.int64)
        for at, near in np.ndenumerate(self._near(self.ends[query])):
            others = np.sort([index for index in near if index != query[at]])
            first[at] = others[int(share[at] * len(others))]
        # Both visits of place 0, then both of place 1, and so on; a stable sort keeps the earlier visit first.
        order = np.argsort(place, axis=1, kind="stable")
        chain = np.arange(len(generators))[:, None]
        episodes, is_query = np.empty(place.shape, np.int64), np.zeros(place.shape, bool)
        episodes[chain, order[:, 0::2]] = self.episodes[first]
        episodes[chain, order[:, 1::2]] = self.episodes[query]
        is_query[chain, order[:, 1::2]] = True
        signs = np.asarray(sign, np.float32).reshape(*size, -1)
        return Visits(episodes, self.ends[query][chain, place], signs[chain, place], is_query)

    def world(self, generator: np.random.Generator, places: int) -> Visits:
        """Returns one visit [N, ...] to each of `places` places. Goals are drawn as the environment draws them. A
        smaller number of places gives the first visits of a larger one."""
        goals, chosen, signs = [], [], []
        for _ in range(places):
            found: list[int] = []
            while not found:  # a goal where no stored trajectory rests is drawn again
                goal = self.task.sample_goal(generator)
                found = sorted(self._near(goal))
            goals.append(goal)
            chosen.append(found[int(generator.random() * len(found))])
            signs.append(sample_signs(generator))
        return Visits(self.episodes[chosen], np.stack(goals), np.stack(signs), np.zeros(places, bool))

    def reward(self, episodes: np.ndarray, goal: np.ndarray) -> np.ndarray:
        """Returns the rewards f32[C, N, longest] of `episodes` [C, N] for the goals [C, N, G] of their places."""
        paid = self.hindsight.reward(episodes.reshape(-1, 1), goal.reshape(-1, goal.shape[-1]))
        return paid.reshape(*episodes.shape, -1)

    def _near(self, points: np.ndarray, *, count: bool = False):
        assert self.tree is not None  # without resting episodes, __init__ has raised DataError
        return self.tree.query_ball_point(points, self.reach, return_length=count)
