"""The range of actions, [-1, 1], and the tolerance for rounding errors outside it."""

import numpy as np
from jaxtyping import Float

from data.errors import DataError

ROUNDING = 1e-6  # eight times the distance from 1 to the next float32


def clipped_actions(actions: Float[np.ndarray, "M A"], source: str) -> Float[np.ndarray, "M A"]:
    """Returns the same array if all actions are within [-1, 1], else a copy clipped to it.

    DataError, which names `source` and the step, when an action is more than ROUNDING outside, or NaN.
    """
    size = np.abs(actions)
    # This form of the comparison also catches NaN.
    if (size <= 1.0).all():
        return actions
    wrong = ~(size <= 1.0 + ROUNDING).all(axis=1)
    if wrong.any():
        step = int(np.flatnonzero(wrong)[0])
        raise DataError(
            f"{source}: actions lie in [-1, 1]; step {step} has {actions[step].tolist()}. Clip it to the range, or "
            "collect the episode again"
        )
    return np.clip(actions, -1.0, 1.0)
