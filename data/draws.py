"""Random streams keyed by seed, use, step and row; which rows a batch has; which episodes a split has."""

from collections.abc import Sequence

import numpy as np

# The second half of every random key: what the numbers are used for. No two uses share a random stream.
SAMPLE, PROMPT, TARGET, _SPLIT_BEFORE, CUT, VISITS, WORLD, TRANSITION = range(8)
GOLDEN = (5**0.5 - 1) / 2


def generator_of(seed: int, use: int, step: int, row: int, chain: int = 0) -> np.random.Generator:
    """Returns a generator whose stream is a function of all five arguments."""
    # Philox has a key, here (seed, use), and a counter, here (step, row, chain), so it needs no hashing and no shared
    # state. The lowest of the four counter words starts at 0, which leaves 2^64 blocks to each stream.
    return np.random.Generator(np.random.Philox(key=[seed, use], counter=[0, chain, step, row]))


def row_indices(rows: int | Sequence[int] | np.ndarray) -> np.ndarray:
    """Returns row indices as an array; a number n means rows 0 to n-1."""
    return np.arange(rows) if isinstance(rows, (int, np.integer)) else np.asarray(rows, np.int64).reshape(-1)


def split_episodes(episodes: int, held_out: float) -> dict[str, np.ndarray]:
    """Returns the ascending episode indices of the splits "train", "held_out" and "all". The held-out share is
    `held_out` within two episodes.

    The split of an episode depends only on its index in the store. It does not depend on a seed, so that no run trains
    on episodes that another run holds out. It does not depend on the number of episodes, so that no episode changes its
    split when a store grows. A larger share holds out all episodes of a smaller share.
    """
    every = np.arange(episodes)
    # Multiples of the golden ratio modulo 1 spread evenly for any count, also over a regular subset of the episodes.
    is_out = every * GOLDEN % 1 < held_out
    return {"train": every[~is_out], "held_out": every[is_out], "all": every}
