"""ChainBatch: chains of trajectories as arrays, the input of a sequence model."""

from typing import NamedTuple

import numpy as np


class ChainBatch(NamedTuple):
    """B rows of M timesteps. A row holds one chain, or several chains side by side with different `segment` indices.

    Padding stands at the end of each chain. It has segment -1, keeps its `position`, and is 0 in all other fields.
    """

    observation: np.ndarray  # f32[B, M, O]
    action: np.ndarray  # f32[B, M, A]
    reward: np.ndarray  # f32[B, M]
    return_to_go: np.ndarray  # f32[B, M]
    previous_action: np.ndarray  # f32[B, M, A], of the previous timestep of the chain; zeros at timestep 0
    previous_reward: np.ndarray  # f32[B, M], likewise
    step: np.ndarray  # i32[B, M], time step within its trajectory
    last: np.ndarray  # f32[B, M], 1 in the last trajectory of the chain; in map tasks, in each place's second visit
    position: np.ndarray  # i32[B, M], timestep index within the chain; padding continues the count
    segment: np.ndarray  # i32[B, M], index of the chain within the row, or -1 for padding

    def take(self, order: np.ndarray) -> "ChainBatch":
        """Returns the timesteps in another order: column i of the result is timestep `order[i]`.

        An index outside 0..M-1 gives padding. So an order longer than M pads the rows, for example
        `zigzag_order` of the padded length.
        """
        order = np.asarray(order)
        inside = (order >= 0) & (order < self.segment.shape[1])

        def pick(values: np.ndarray, fill: int = 0) -> np.ndarray:
            picked = np.full((len(values), len(order), *values.shape[2:]), fill, values.dtype)
            picked[:, inside] = values[:, order[inside]]
            return picked

        position = pick(self.position)
        position[:, ~inside] = np.maximum(order[~inside], 0)
        return ChainBatch(*(pick(values) for values in self[:-2]), position=position, segment=pick(self.segment, -1))
