"""Orders of the tokens that give all devices the same work under a causal mask."""

import numpy as np

from rlring.errors import UsageError


def zigzag_order(length: int, ring: int) -> np.ndarray:
    """Returns order[length], the index of the token at each place, such that shard r holds chunks r and
    2 * ring - 1 - r of 2 * ring chunks.

    All shards then have the same work under a causal mask. Example, length 8, ring 2: [0 1 6 7 | 2 3 4 5].

    Raises:
        UsageError: 2 * ring does not divide length.
    """
    if length % (2 * ring):
        raise UsageError(
            f"the zigzag order cuts the sequence into 2 * ring = {2 * ring} equal chunks; got length={length}. "
            f"Pad the sequence to {-(-length // (2 * ring)) * 2 * ring} tokens."
        )
    chunks = np.arange(length).reshape(2 * ring, -1)
    return np.concatenate([chunks[[r, 2 * ring - 1 - r]].reshape(-1) for r in range(ring)])


def striped_order(length: int, ring: int) -> np.ndarray:
    """Returns order[length], the index of the token at each place, such that shard r holds tokens r, r + ring, ...

    Striped Attention (2311.09431). All shards then have the same work under a causal mask: each ring step computes a
    triangle, whereas in zigzag order it computes whole rectangles. Example, length 8, ring 2: [0 2 4 6 | 1 3 5 7].

    Raises:
        UsageError: ring does not divide length.
    """
    if length % ring:
        raise UsageError(
            f"the striped order gives all ring = {ring} shards the same number of tokens; got length={length}. "
            f"Pad the sequence to {-(-length // ring) * ring} tokens."
        )
    return np.arange(length).reshape(-1, ring).T.reshape(-1)


def inverse_order(order: np.ndarray) -> np.ndarray:
    """Returns the inverse permutation of `order`: `x[order][inverse_order(order)]` is x."""
    inverse = np.empty_like(order)
    inverse[order] = np.arange(len(order))
    return inverse
