"""Computes single timesteps of chains, so that a part of a chain can be built without the rest."""

from typing import NamedTuple

import numpy as np

from data.chain_batch import ChainBatch
from data.lazy_field import LazyField
from data.store import TrajectoryStore


class Chains(NamedTuple):
    """C chains of N trajectories, in the order of the chain."""

    episodes: np.ndarray  # i64[C, N], indices into the store
    target: np.ndarray  # f64[C, N], the return that each trajectory is conditioned on
    reward: np.ndarray | None  # f32[C, N, longest], padded with 0; None: the rewards of the store


class StoredTimesteps:
    """Computes the timesteps of chains from the fields of a store."""

    def __init__(self, store: TrajectoryStore) -> None:
        self.store = store
        self.observation, self.action, self.reward = (
            LazyField(store, field) for field in ("observation", "action", "reward")
        )

    def put(
        self,
        chains: Chains,
        chain: np.ndarray,
        place: np.ndarray,
        batch: ChainBatch,
        at: tuple[np.ndarray, np.ndarray],
        segment: np.ndarray | int,
    ) -> np.ndarray:
        """Writes L timesteps into a batch: position `place` [L] of chain `chain` [L] goes to row and column `at` (both
        [L]) with segment index `segment`. Returns the index within its chain of each real timestep's trajectory.

        A position behind the last timestep of its chain is padding. There only `position` is written.
        """
        segment = np.broadcast_to(segment, chain.shape)
        batch.position[at] = place
        length, start = self.store.lengths[chains.episodes], self.store.start
        ends = np.cumsum(length, axis=1)
        real = place < ends[chain, -1]
        chain, place, segment, at = chain[real], place[real], segment[real], (at[0][real], at[1][real])

        count, longest = chains.episodes.shape[1], self.store.longest
        # One search serves all chains: the ends of chain c are shifted to lie between c * size and (c + 1) * size.
        size = count * longest + 1
        shifted = ends + np.arange(len(ends))[:, None] * size
        trajectory = np.searchsorted(shifted.ravel(), chain * size + place, side="right") - chain * count
        step = place - (ends - length)[chain, trajectory]
        episode = chains.episodes[chain, trajectory]
        row = start[episode] + step

        # The previous timestep is one step earlier or the last of the previous trajectory. The first timestep has none.
        crosses, has_before = (step == 0) & (place > 0), place > 0
        trajectory_before = trajectory - crosses
        step_before = np.where(crosses, length[chain, trajectory_before], step) - 1
        step_before = np.maximum(step_before, 0)
        row_before = start[chains.episodes[chain, trajectory_before]] + step_before

        # The reward earned so far in a trajectory needs all rewards of that trajectory, and of no other.
        touched, own = np.unique(chain * count + trajectory, return_inverse=True)
        if chains.reward is None:
            index, is_step = self.store.step_rows(chains.episodes.ravel()[touched])
            paid = np.where(is_step, self.reward[index], np.float32(0))
            reward, reward_before = self.reward[row], self.reward[row_before]
        else:
            paid = chains.reward.reshape(-1, longest)[touched]
            reward = chains.reward[chain, trajectory, step]
            reward_before = chains.reward[chain, trajectory_before, step_before]
        # float64, because these are sums of thousands of rewards, and the return to go is a difference of such sums.
        earned = np.cumsum(paid, axis=-1, dtype=np.float64)
        earned_before = np.where(step > 0, earned[own, step - 1], 0.0)

        batch.observation[at] = self.observation[row + episode]
        batch.action[at] = self.action[row]
        batch.reward[at] = reward
        batch.return_to_go[at] = chains.target[chain, trajectory] - earned_before
        batch.previous_action[at] = np.where(has_before[:, None], self.action[row_before], np.float32(0))
        batch.previous_reward[at] = np.where(has_before, reward_before, np.float32(0))
        batch.segment[at] = segment
        batch.step[at] = step
        batch.last[at] = trajectory == count - 1
        return trajectory

    def empty(self, rows: int, places: np.ndarray) -> ChainBatch:
        """Returns a batch of padding with `rows` rows and one column for each position in `places`."""
        size = (rows, len(places))
        whole = {"step", "position", "segment"}
        wide = {
            "observation": self.store.observation_size,
            "action": self.store.action_size,
            "previous_action": self.store.action_size,
        }
        batch = ChainBatch(
            *(
                np.zeros((*size, wide[name]) if name in wide else size, np.int32 if name in whole else np.float32)
                for name in ChainBatch._fields
            )
        )
        batch.position[:] = np.maximum(places, 0)
        batch.segment[:] = -1
        return batch
