"""Random draws that are pure functions of what they are for, and which rows and episodes they are of."""

from collections.abc import Sequence

import numpy as np

# The second half of every random key: which use the numbers are for, so that no two uses ever share them.
SAMPLE, PROMPT, TARGET, _SPLIT_BEFORE, CUT, VISITS, WORLD, TRANSITION = range(8)
GOLDEN = (5**0.5 - 1) / 2


def generator_of(seed: int, use: int, step: int, row: int, chain: int = 0) -> np.random.Generator:
    """Returns the numbers of one use, step, row and chain."""
    # Philox is keyed and counted: (seed, use) and (step, row, chain) name a stream outright, without hashing or shared
    # state. The low counter word, 2^64 blocks, is the stream's own.
    return np.random.Generator(np.random.Philox(key=[seed, use], counter=[0, chain, step, row]))


def row_indices(rows: int | Sequence[int] | np.ndarray) -> np.ndarray:
    """Returns the rows asked for; a number n means rows 0 to n-1."""
    return np.arange(rows) if isinstance(rows, (int, np.integer)) else np.asarray(rows, np.int64).reshape(-1)


def split_episodes(episodes: int, held_out: float) -> dict[str, np.ndarray]:
    """Returns the episodes of each split, ascending; within two episodes `held_out` is their share.

    Which split an episode is in depends on its place in the store alone: of no seed, because what one run holds out no
    other may train on, and not on how many episodes there are, so that a store that grows moves none. A larger share
    holds out the episodes of a smaller one too.
    """
    every = np.arange(episodes)
    # Multiples of the golden section spread evenly however many there are, within any regular part of them too.
    is_out = every * GOLDEN % 1 < held_out
    return {"train": every[~is_out], "held_out": every[is_out], "all": every}
