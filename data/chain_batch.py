"""ChainBatch: what a chain of trajectories looks like to a model."""

from typing import NamedTuple

import numpy as np


class ChainBatch(NamedTuple):
    """B rows of M timesteps: one chain each, or several side by side, told apart by their segment.

    Padding, always at the end of a chain, has segment -1 and zeros elsewhere.
    """

    observation: np.ndarray  # f32[B, M, O]
    action: np.ndarray  # f32[B, M, A]
    reward: np.ndarray  # f32[B, M]
    return_to_go: np.ndarray  # f32[B, M]
    previous_action: np.ndarray  # f32[B, M, A], of the chain's timestep before; zeros at timestep 0
    previous_reward: np.ndarray  # f32[B, M], likewise
    step: np.ndarray  # i32[B, M], time step within its trajectory
    last: np.ndarray  # f32[B, M], 1 in the last trajectory of the chain; of a map, in every second visit to a place
    position: np.ndarray  # i32[B, M], timestep index within the chain, padding counted on
    segment: np.ndarray  # i32[B, M], index of the chain within the row, or -1 for padding

    def take(self, order: np.ndarray) -> "ChainBatch":
        """Returns the timesteps in another order: place i holds timestep `order[i]`.

        An index outside 0..M-1 gives padding, so an order longer than M pads (`zigzag_order` of the padded length).
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
