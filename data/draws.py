"""Random draws that are pure functions of what they are for, and which rows and episodes they are of."""

from collections.abc import Sequence

import numpy as np

# The second half of every random key: which use the numbers are for, so that no two uses ever share them.
SAMPLE, PROMPT, TARGET, SPLIT, CUT, VISITS, WORLD = range(7)


def generator_of(seed: int, use: int, step: int, row: int, chain: int = 0) -> np.random.Generator:
    """Returns the numbers of one use, step, row and chain."""
    # Philox is keyed and counted: (seed, use) and (step, row, chain) name a stream outright, without hashing or shared
    # state. The low counter word, 2^64 blocks, is the stream's own.
    return np.random.Generator(np.random.Philox(key=[seed, use], counter=[0, chain, step, row]))


def row_indices(rows: int | Sequence[int] | np.ndarray) -> np.ndarray:
    """Returns the rows asked for; a number n means rows 0 to n-1."""
    return np.arange(rows) if isinstance(rows, (int, np.integer)) else np.asarray(rows, np.int64).reshape(-1)


def split_episodes(episodes: int, held_out: float) -> dict[str, np.ndarray]:
    """Returns the episodes of each split, ascending."""
    # Of no seed: what one run holds out, no other run may train on.
    shuffled = generator_of(0, SPLIT, 0, 0).permutation(episodes)
    count = max(1, round(episodes * held_out)) if held_out > 0 else 0
    return {"train": np.sort(shuffled[count:]), "held_out": np.sort(shuffled[:count]), "all": np.arange(episodes)}
