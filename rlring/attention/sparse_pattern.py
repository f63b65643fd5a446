"""SparsePattern: which blocks of keys each head sees with S2 attention (2407.17678)."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Array, Bool, Integer

from rlring.attention.mask import Mask
from rlring.errors import UsageError


@dataclass(frozen=True)
class SparsePattern:
    """Which blocks of keys each head sees. Block i of positions sees block j <= i if j is near or strided:

        near      i - j < local_blocks, so always the block itself
        strided   (j + head * step + offset) % stride == 0, with step = max(1, stride // kv_heads)

    `head` is the index of a key/value head: all query heads that share it see the same blocks. Blocks are blocks of
    positions, so the pattern does not depend on the order of the tokens. A key that is no longer near is either
    seen by all later queries or by none. Example, local_blocks 2, stride 4, two key/value heads, `#` near, `+` strided:

        head 0   block i   0  # . . . . . . .     head 1   0  # . . . . . . .
                           1  # # . . . . . .              1  # # . . . . . .
                           2  + # # . . . . .              2  . # # . . . . .
                           3  + . # # . . . .              3  . . # # . . . .
                           4  + . . # # . . .              4  . . + # # . . .
                           5  + . . . # # . .              5  . . + . # # . .
                           6  + . . . + # # .              6  . . + . . # # .
                           7  + . . . + . # #              7  . . + . . . # #

    Raises:
        UsageError: a block, local_blocks or stride below 1.
    """

    block: int = 64  # positions
    local_blocks: int = 16
    stride: int = 8  # with 1, every causal key is seen
    offset: int = 0

    def __post_init__(self):
        for name in ("block", "local_blocks", "stride"):
            if getattr(self, name) < 1:
                reason = ": a token sees itself" if name == "local_blocks" else ""
                raise UsageError(
                    f"sparse.{name} is at least 1{reason}; got {getattr(self, name)}. Leave it out for the default."
                )

    def is_strided(
        self,
        block: Integer[Array | np.ndarray, "..."],
        head: Integer[Array | np.ndarray, "..."] | int,
        *,
        kv_heads: int,
    ) -> Bool[Array | np.ndarray, "..."]:
        """Returns whether the blocks are strided for key/value head `head` of `kv_heads`; block and head broadcast."""
        step = max(1, self.stride // kv_heads)
        return (block + head * step + self.offset) % self.stride == 0

    def is_near(
        self, q_position: Integer[Array | np.ndarray, "..."], k_position: Integer[Array | np.ndarray, "..."]
    ) -> Bool[Array | np.ndarray, "..."]:
        """Returns whether keys are in the near blocks of queries, or later; the two broadcast."""
        # Divides only query positions: a division for every pair of tokens would cost more than the attention itself.
        return k_position >= (q_position // self.block - (self.local_blocks - 1)) * self.block

    def density(self, length: int, *, kv_heads: int) -> float:
        """Returns the share of the causal blocks of a sequence of `length` tokens that is seen, averaged over heads."""
        blocks = -(-length // self.block)
        strided = self.is_strided(np.arange(blocks), np.arange(kv_heads)[:, None], kv_heads=kv_heads)
        seen_from = np.maximum(blocks - self.local_blocks - np.arange(blocks), 0)  # blocks that see it, if strided
        near = np.minimum(np.arange(blocks) + 1, self.local_blocks).sum()
        return float((near + (strided * seen_from).sum() / kv_heads) / (blocks * (blocks + 1) / 2))


def check_mask(mask: Mask) -> None:
    """Raises UsageError unless the mask is a plain causal mask without a window."""
    if mask.kind is not None:
        raise UsageError(
            f"attention scheme 'sparse' needs a causal mask without a window; got a {mask.kind}. Use another scheme."
        )
    if not mask.is_causal or mask.window is not None:
        raise UsageError(
            "attention scheme 'sparse' needs a causal mask without a window; got "
            f"is_causal={mask.is_causal}, window={mask.window}. Its window is sparse.local_blocks * sparse.block; "
            "for any other mask use another scheme."
        )
