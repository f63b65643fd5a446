"""Goals chosen in hindsight, for stores of a task that hides its goal.

Exploration data knows no goal; its physics lets it be paid for any. So a training chain takes as goal a place where one
of its trajectories came to rest, and every trajectory of the chain is paid for that one goal.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float

from data.errors import DataError
from data.store import TrajectoryStore
from data.tasks import GoalTask, goal_task

NEAR = 0.7  # radii of the goal within which a trajectory comes to rest: it is paid for its last timesteps, not for one
_SEARCHED = 1024


@dataclass(frozen=True)
class GoalSampling:
    """How training chains come by a goal where the task hides one.

    The goal is where some trajectory spent its last `stay_steps` steps. That trajectory is in the chain, and 0 to
    `met_most` (uniform) others that met the goal too, found among `candidates` random ones; the rest is random.
    With `met`, a chance, every other one came to rest at the goal with that chance and otherwise never met it, each on
    its own, and may be there twice: how much a longer context can tell is then known (`agents.prediction`).
    With met="annealed" the chance rises along the chain, i / n for the i-th of n others: the history of a learner that
    does what an expert would ever more often (noise annealing, Zisman et al. 2023, arXiv 2312.12275).
    """

    stay_steps: int = 4
    met_most: int = 2
    candidates: int = 64
    met: float | Literal["annealed"] | None = None

    def __post_init__(self) -> None:
        is_chance = not isinstance(self.met, str | None) and 0 <= self.met <= 1
        if not is_chance and self.met not in (None, "annealed"):
            raise DataError(f"goals.met is a chance, 0 <= met <= 1, or 'annealed'; got {self.met!r}")
        if self.stay_steps < 1 or self.met_most < 0 or self.candidates < 0:
            raise DataError(f"goals needs stay_steps >= 1, met_most >= 0 and candidates >= 0; got {self}")

    def chances(self, count: int) -> Float[np.ndarray, " count"]:
        """Returns the chance of each of `count` trajectories to have met the goal, in their order; needs `met`."""
        if self.met == "annealed":
            return np.arange(count) / max(count, 1)
        assert self.met is not None
        return np.full(count, float(self.met))


class HindsightGoals:
    """The physics of a store in memory, what any goal pays there, and draws of chains that share a goal."""

    def __init__(self, store: TrajectoryStore, task: GoalTask, sampling: GoalSampling) -> None:
        self.store, self.task, self.sampling = store, task, sampling
        self.physics = store.column("physics")
        index, _ = store.step_rows(np.arange(store.episodes))
        last = index[:, -1] + np.arange(store.episodes) + 1
        self.goal = task.hindsight_goal(self.physics[last])  # f64[E, G], where every episode ended
        # The states that the last steps led to; an episode too short for that many never stays.
        stay = sampling.stay_steps
        rows = last[:, None] - np.minimum(np.arange(stay), store.lengths[:, None])
        met = task.reward(self.physics[rows], self.goal[:, None, :]) > 0
        self.stays = met.all(axis=1) & (store.lengths >= stay)  # bool[E]

    def reward(self, episodes: np.ndarray, goal: np.ndarray) -> np.ndarray:
        """Returns what each step of `episodes` [B, N] is paid under `goal` [B, G]; f32[B, N, longest], 0 at padding."""
        index, valid = self.store.step_rows(episodes)
        # The reward of a step is that of the state it led to, one row behind the one it acted on.
        reached = self.physics[index + episodes[..., None] + 1]
        return np.where(valid, self.task.reward(reached, goal[:, None, None, :]), 0).astype(np.float32)

    def resting(self, pool: np.ndarray) -> np.ndarray:
        """Returns the episodes of a pool whose end can be a goal; DataError where there is none."""
        resting = pool[self.stays[pool]]
        if not len(resting):
            raise DataError(
                f"{self.store.path}: in none of the {len(pool)} episodes does the body stay in one place for its last "
                f"{self.sampling.stay_steps} steps, so no goal can be taken in hindsight; lower goals.stay_steps, or "
                "collect with `--policy waypoints`"
            )
        return resting

    def rarely(
        self, generators: list[np.random.Generator], pool: np.ndarray, count: int, goal: np.ndarray
    ) -> np.ndarray:
        """Returns, a row per generator, episodes [B, count] of which each has met the goal [B, G] with its chance.

        One that has met it came to rest there, so that it tells the place: what only passed by is within a radius of
        the goal for a timestep or two, and leaves open on which side. All others are never paid.
        Drawn with replacement; where all have one chance, the first of many are those of few. Where none of the pool
        came to rest at the goal, those that passed by stand in; a goal that all have met (beside the start) or none
        leaves no choice: about one in a hundred of point_mass-dark's.
        """
        episodes, met = np.empty((len(generators), count), np.int64), self.sampling.chances(count)
        for row, generator in enumerate(generators):
            # Of a large pool a part is enough to find some that met, and some that did not.
            part = pool[np.sort(generator.choice(len(pool), min(_SEARCHED, len(pool)), replace=False))]
            is_paid = (self.reward(part[None], goal[row : row + 1])[0] > 0).any(-1)
            distance = np.linalg.norm(self.goal[part] - goal[row], axis=-1)
            rests = self.stays[part] & (distance <= NEAR * self.task.radius)
            share, chance = generator.random((count, 2)).T
            for choices, wanted in (((rests, is_paid), chance < met), ((~is_paid,), chance >= met)):
                found = next((part[chosen] for chosen in choices if chosen.any()), part)
                episodes[row, wanted] = found[(share[wanted] * len(found)).astype(np.int64)]
        return episodes

    def draw(
        self, generators: list[np.random.Generator], pool: np.ndarray, trajectories: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns, a row per generator, distinct episodes [B, N] of `pool` in random order, and their goal [B, G]."""
        resting, others = self.resting(pool), trajectories - 1
        if self.sampling.met is not None:
            anchor = np.asarray([resting[generator.integers(len(resting))] for generator in generators], np.int64)
            rare = self.rarely(generators, pool, others, self.goal[anchor])
            return np.concatenate([rare, anchor[:, None]], axis=1), self.goal[anchor]
        count = min(others + self.sampling.candidates, len(pool) - 1)
        anchors, wanted, candidates, shuffles = [], [], [], []
        for generator in generators:
            anchor = resting[generator.integers(len(resting))]
            anchors.append(anchor)
            wanted.append(min(int(generator.integers(self.sampling.met_most + 1)), others))
            drawn = pool[generator.choice(len(pool), count + 1, replace=False)]
            candidates.append(drawn[drawn != anchor][:count])
            shuffles.append(generator.permutation(trajectories))
        anchor_B = np.asarray(anchors, np.int64)
        candidate_BC = np.asarray(candidates, np.int64).reshape(len(generators), count)
        goal = self.goal[anchor_B]
        # The first N-1 candidates are the random ones; only those behind them are searched, so that "the rest at
        # random" stays random. Testing a few dozen is far cheaper than an index over all pairs of goal and episode.
        searched = candidate_BC[:, others:]
        met = (self.reward(searched, goal) > 0).any(-1)
        chosen = met & (np.cumsum(met, axis=1) <= np.asarray(wanted, np.int64)[:, None])
        episodes = np.empty((len(generators), trajectories), np.int64)
        for row, shuffle in enumerate(shuffles):
            found = searched[row, chosen[row]]
            members = np.concatenate([candidate_BC[row, : others - len(found)], found, anchor_B[row : row + 1]])
            episodes[row] = members[shuffle]
        return episodes, goal


def hidden_goal_task(store: TrajectoryStore, goals: GoalSampling | None) -> GoalTask | None:
    """Returns the task whose goals are to be chosen in hindsight, or None if the store's rewards are already paid."""
    if store.goal is None:
        if goals is not None:
            raise DataError(f"{store.path}: task {store.task!r} hides no goal; leave out goals, or use another store")
        return None
    task = goal_task(store.task)
    if task is None:
        problem = f"{store.task!r} is no task with a hidden goal"
    elif "physics" not in store.fields:
        problem = "it holds no physics"
    else:
        return task
    raise DataError(
        f"{store.path}: its goals are to be chosen in hindsight, but {problem}; build it again with "
        "`python -m data.build`"
    )
