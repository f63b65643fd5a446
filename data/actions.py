"""The range of actions, [-1, 1], and how far a number outside of it may be a rounding."""

import numpy as np
from jaxtyping import Float

from data.errors import DataError

ROUNDING = 1e-6  # eight times the distance from 1 to the next float32


def clipped_actions(actions: Float[np.ndarray, "M A"], source: str) -> Float[np.ndarray, "M A"]:
    """Returns the actions within [-1, 1]: the very same array, or where some are off by up to ROUNDING a clipped copy.

    DataError, with `source` and the step, when one is further outside or not a number.
    """
    size = np.abs(actions)
    # Written so that NaN fails too.
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
