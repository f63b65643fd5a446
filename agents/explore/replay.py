"""The replay buffer of a collector: its last episodes in memory, and n-step transitions drawn from them."""

import numpy as np
from jaxtyping import Float32

from agents.explore.bonus import Sizes, Transitions
from data import Trajectory


class Replay:
    """The last episodes of at most `episode_steps` steps each, up to `capacity` steps.

    Episode i is stored at place i modulo the number of places, so that the content depends on the episodes alone.
    """

    def __init__(
        self, sizes: Sizes, skill_size: int, episode_steps: int, *, capacity: int, nstep: int, discount: float
    ):
        self.nstep, self.discount = nstep, discount
        self.places = max(1, capacity // episode_steps)
        self.lengths = np.zeros(self.places, np.int64)
        # The operating system allocates these pages when they are first written to.
        self.observation = np.zeros((self.places, episode_steps + 1, sizes.observation), np.float32)
        self.action = np.zeros((self.places, episode_steps, sizes.action), np.float32)
        self.skill = np.zeros((self.places, episode_steps, skill_size), np.float32)
        self.reward, self.ends = (np.zeros((self.places, episode_steps), np.float32) for _ in range(2))

    def add(self, index: int, episode: Trajectory, skill: Float32[np.ndarray, "M Z"]) -> None:
        """Stores episode `index`, replacing the oldest if full. skill: the skill of each action."""
        place, steps = index % self.places, episode.length
        self.lengths[place] = steps
        self.observation[place, : steps + 1] = episode.observation
        self.action[place, :steps], self.skill[place, :steps] = episode.action, skill
        self.reward[place, :steps], self.ends[place, :steps] = episode.reward, episode.discount

    @property
    def is_empty(self) -> bool:
        """Whether no episode is long enough for an n-step transition."""
        return not (self.lengths >= self.nstep).any()

    def sample(self, rng: np.random.Generator, updates: int, batch: int) -> Transitions:
        """Returns transitions [updates, batch, ...] from uniformly drawn episodes, at uniformly drawn steps."""
        rows = updates * batch
        places = np.flatnonzero(self.lengths >= self.nstep)
        place = places[rng.integers(0, len(places), rows)]
        first = rng.integers(0, self.lengths[place] - self.nstep + 1)
        reward, discount = np.zeros(rows, np.float32), np.ones(rows, np.float32)
        for step in range(self.nstep):
            reward += discount * self.reward[place, first + step]
            discount *= np.float32(self.discount) * self.ends[place, first + step]
        drawn = Transitions(
            self.observation[place, first],
            self.action[place, first],
            reward,
            discount,
            self.observation[place, first + self.nstep],
            self.skill[place, first],
        )
        return Transitions(*(x.reshape(updates, batch, *x.shape[1:]) for x in drawn))
