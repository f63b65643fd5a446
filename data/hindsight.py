"""Goals chosen in hindsight, for stores of a task that hides its goal.

Exploration data is collected without a goal, and the stored physics states allow computing its rewards for any goal. So
the goal of a training chain is a place where one of its trajectories came to rest, and the rewards of all trajectories
of the chain are computed for that goal.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float

from data.errors import DataError
from data.store import TrajectoryStore
from data.tasks import GoalTask, goal_task

# A trajectory rests at a goal if it ends within this many goal radii of it: so it is rewarded in several timesteps.
NEAR = 0.7
_SEARCHED = 1024  # the most episodes in which `rarely` looks for those that met the goal


@dataclass(frozen=True)
class GoalSampling:
    """How the goal of a training chain is chosen where the task hides its goal.

    The goal is the place where some trajectory spent its last `stay_steps` steps. That trajectory is in the chain, and
    so are 0 to `met_most` (uniform) others that met the goal, found among `candidates` random episodes. The rest of the
    chain is random.

    If `met` is a probability, each of the other trajectories independently came to rest at the goal with that
    probability, and otherwise never met it. An episode can then be drawn twice. So it is known how much information a
    longer context holds (`agents.prediction`). With met="annealed" the probability rises along the chain, and is i / n
    for the i-th of n others, counted from 0: the history of a learner that acts like an expert ever more often (noise
    annealing, Zisman et al. 2023, arXiv 2312.12275).
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
        """Returns the probability that each of `count` trajectories has met the goal, in chain order; `met` must be
        set."""
        if self.met == "annealed":
            return np.arange(count) / max(count, 1)
        assert self.met is not None
        return np.full(count, float(self.met))


class HindsightGoals:
    """Computes rewards of stored episodes for any goal, and draws chains of episodes that share a goal.

    Holds the physics states of the whole store in memory.
    """

    def __init__(self, store: TrajectoryStore, task: GoalTask, sampling: GoalSampling) -> None:
        self.store, self.task, self.sampling = store, task, sampling
        self.physics = store.column("physics")
        index, _ = store.step_rows(np.arange(store.episodes))
        last = index[:, -1] + np.arange(store.episodes) + 1
        self.goal = task.hindsight_goal(self.physics[last])  # f64[E, G], where every episode ended
        # The states after the last `stay_steps` steps. An episode of fewer steps never counts as staying.
        stay = sampling.stay_steps
        rows = last[:, None] - np.minimum(np.arange(stay), store.lengths[:, None])
        met = task.reward(self.physics[rows], self.goal[:, None, :]) > 0
        self.stays = met.all(axis=1) & (store.lengths >= stay)  # bool[E]

    def reward(self, episodes: np.ndarray, goal: np.ndarray) -> np.ndarray:
        """Returns the reward of each step of `episodes` [B, N] for `goal` [B, G]; f32[B, N, longest], 0 at padding."""
        index, valid = self.store.step_rows(episodes)
        # The reward of a step depends on the state it led to, one row after the state it started from.
        reached = self.physics[index + episodes[..., None] + 1]
        return np.where(valid, self.task.reward(reached, goal[:, None, None, :]), 0).astype(np.float32)

    def resting(self, pool: np.ndarray) -> np.ndarray:
        """Returns the episodes of a pool that end at rest, so that their end can be a goal; DataError if none do."""
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
        """Returns episodes [B, count], a row per generator; each met the row's `goal` [B, G] with the probability of
        `sampling.chances`.

        An episode that met the goal came to rest there, so that its rewards determine the place. An episode that only
        passes by is within a radius of the goal for a timestep or two, which leaves open on which side. All other
        episodes are never rewarded. Episodes are drawn with replacement. If all have the same probability, a smaller
        `count` gives the first episodes of a larger one. If no episode of the pool rests at the goal, episodes that
        pass by take their place. If all episodes met the goal (near the start) or none did, any episode is drawn; this
        happens for about one goal in a hundred of point_mass-dark.
        """
        episodes, met = np.empty((len(generators), count), np.int64), self.sampling.chances(count)
        for row, generator in enumerate(generators):
            # In a large pool, a random part is enough to find episodes that met the goal and episodes that did not.
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
        """Returns episodes [B, N] of `pool`, a row per generator, and the goal [B, G] of each row.

        Without `sampling.met`, the episodes of a row are distinct and in random order. With it, they are those of
        `rarely` followed by the episode whose end is the goal.
        """
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
        # The first N-1 candidates are the random part of the chain. Only the candidates after them are searched for the
        # goal, so that the random part stays random. Testing a few dozen episodes is far cheaper than an index over all
        # pairs of goal and episode.
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
    """Returns the task of a store whose goals are to be chosen in hindsight, or None if the store holds rewards.

    DataError when `goals` is given for a store that holds rewards, and when goals cannot be chosen for the store.
    """
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
