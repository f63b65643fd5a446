"""Twelve attention masks, each as a mask of rlring and independently as a NumPy array."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from rlring.attention import BlockMask, FunctionMask, Mask

BLOCKS = 32  # blocks per sequence in the block masks


class Case(NamedTuple):
    """A mask of self-attention over tokens at positions 0, 1, 2, ...

    `ours` takes the positions in any order, int32[B, T], and returns rlring's mask for tokens in that order.
    """

    name: str
    seen: np.ndarray  # bool[T, T]: query, key
    ours: Callable[[np.ndarray], Mask]


def cases(length: int) -> list[Case]:
    """Returns the twelve masks for a sequence of `length` tokens; windows and segments are fractions of the length."""
    place, wide, narrow, block = np.arange(length), max(1, length // 8), max(1, length // 16), -(-length // BLOCKS)
    q, k = place[:, None], place[None]
    causal, near = k <= q, (k <= q) & (q - k < wide)
    document, question = (_segments(length, *shares) for shares in ((0.1, 0.35, 0.6), (0.25, 0.5, 0.75)))
    same = document[:, None] == document[None]
    table = np.random.default_rng(0).random((BLOCKS, BLOCKS)) < 0.3
    table |= np.eye(BLOCKS, dtype=bool)

    def shares_question(q, k, q_segment, k_segment):  # segment 0 is the question, the other segments are answers
        return (k <= q) & ((q_segment == k_segment) | (k_segment == 0))

    def global_and_window(q, k, *_):
        return (k <= q) & ((q - k < wide) | (k < narrow))

    def prefix(q, k, *_):
        return (k <= q) | (k < length // 4)

    return [
        Case("full", np.ones((length, length), bool), Mask.full),
        Case("causal", causal, Mask.causal),
        Case("window", near, lambda x: Mask.causal(x, window=wide)),
        Case("two-sided window", abs(q - k) <= narrow, lambda x: Mask.full(x, window=(narrow, narrow))),
        Case("packed, full", same, lambda x: Mask.full(x, document[x])),
        Case("packed, causal", same & causal, lambda x: Mask.causal(x, document[x])),
        Case("packed, window", same & near, lambda x: Mask.causal(x, document[x], window=wide)),
        Case("prefix", causal | (k < length // 4), lambda x: FunctionMask.of(prefix, x)),
        Case(
            "shared question",
            causal & ((question[:, None] == question[None]) | (question[None] == 0)),
            lambda x: FunctionMask.of(shares_question, x, question[x]),
        ),
        Case("global and window", near | (causal & (k < narrow)), lambda x: FunctionMask.of(global_and_window, x)),
        Case("block-causal", k // block <= q // block, lambda x: Mask.causal(x // block)),
        Case(
            "block-sparse",
            causal & table[q // block, k // block],
            lambda x: BlockMask.of(Mask.causal(x), jnp.asarray(table), block_size=block),
        ),
    ]


def _segments(length: int, *starts: float) -> np.ndarray:
    """Returns the segment index of each token, int32[T]; segments 1, 2, ... start at these fractions of the length."""
    return np.searchsorted(length * np.array(starts), np.arange(length), side="right").astype(np.int32)
