"""BlockMask: a mask limited to the blocks of positions that a table shows."""

from dataclasses import dataclass, field
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int32

from rlring.attention.block_view import Bounds
from rlring.attention.mask import Mask
from rlring.errors import UsageError, shown

Places = Int32[Array | np.ndarray, "B ..."]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BlockMask(Mask):
    """A causal, full or windowed mask, limited to the blocks that a table shows.

    A query at position p sees a key at position r if the mask shows it and `table[p // block_size, r // block_size]` is
    true. Tokens at positions outside the table see nothing and are not seen. Blocks are blocks of positions, so the
    tokens may be in any order. The table may be traced. Its memory is quadratic in the number of blocks, on every
    device.
    """

    table: Bool[Array, "B Q K"] = field(kw_only=True)
    # Summed-area table: the number of true entries above and left of each place. Four of them give any rectangle's.
    counts: Int32[Array, "B Q+1 K+1"] = field(kw_only=True)
    block_size: int = field(kw_only=True, metadata={"static": True})  # positions

    kind: ClassVar[str | None] = "block mask"

    @classmethod
    def of(cls, mask: Mask, table: Bool[Array, "B Q K"] | Bool[Array, "Q K"], *, block_size: int) -> "BlockMask":
        """Returns the mask limited to the blocks of the table; a table [Q, K] is used for all sequences.

        Raises:
            UsageError: the mask is not a plain Mask, the table is not an array of booleans with these dimensions, or
                block_size is below 1.
        """
        if type(mask) is not Mask:
            got = mask.kind if isinstance(mask, Mask) else shown(mask)
            raise UsageError(
                f"a block mask is made of a causal or full Mask; got {got or 'a ' + type(mask).__name__}. The table "
                "can be an operand of a FunctionMask."
            )
        rows, shape, dtype = mask.rows, getattr(table, "shape", ()), getattr(table, "dtype", None)
        if len(shape) not in (2, 3) or (len(shape) == 3 and shape[0] != rows) or dtype != np.bool_:
            raise UsageError(
                f"the table of a block mask is bool[Q, K], or bool[B, Q, K] with B={rows} sequences, the same for all "
                f"heads; got {shown(table) if dtype is None else f'{dtype}{list(shape)}'}."
            )
        if isinstance(block_size, bool) or not isinstance(block_size, int | np.integer) or block_size < 1:
            raise UsageError(f"a block of a mask has at least one position; got block_size={shown(block_size)}.")
        table = jnp.broadcast_to(jnp.asarray(table), (rows, *shape[-2:]))
        counts = jnp.pad(table.cumsum(1, dtype=jnp.int32).cumsum(2, dtype=jnp.int32), ((0, 0), (1, 0), (1, 0)))
        return mask.as_kind(cls, table=table, counts=counts, block_size=int(block_size))

    def visible(self) -> Bool[Array, "B T S"]:
        q, k = self.q_position // self.block_size, self.k_position // self.block_size
        _, rows, columns = self.table.shape
        inside = ((q >= 0) & (q < rows))[:, :, None] & ((k >= 0) & (k < columns))[:, None]
        return super().visible() & inside & _entries(self.table, q[:, :, None], k[:, None])

    def maybe_needed(self) -> Bool[Array, "B T S"]:
        return Mask.visible(self)

    def maybe_visible(self, q: Bounds, k: Bounds) -> Bool[Array, "..."]:
        shown, _, _ = self._counted(q, k)
        return super().maybe_visible(q, k) & (shown > 0).any(0)

    def fully_visible(self, q: Bounds, k: Bounds) -> Bool[Array, "..."]:
        shown, entries, is_inside = self._counted(q, k)
        return super().fully_visible(q, k) & (is_inside & (shown == entries)).all(0)

    def _counted(self, q: Bounds, k: Bounds) -> tuple[Int32[Array, "B ..."], Int32[Array, "B ..."], Bool[Array, "..."]]:
        """Returns, for pairs of blocks of tokens, the number of true entries of the table in the rectangle of their
        positions, the size of this rectangle, and whether all tokens are inside of the table."""

        def edges(bounds: Bounds, entries: int):
            first, last = bounds.low_position // self.block_size, bounds.high_position // self.block_size
            return jnp.clip(first, 0, entries), jnp.clip(last, -1, entries - 1) + 1, (first >= 0) & (last < entries)

        (top, bottom, q_inside), (left, right, k_inside) = (
            edges(bounds, entries) for bounds, entries in zip((q, k), self.table.shape[1:], strict=True)
        )
        lower, upper = (_entries(self.counts, row, right) - _entries(self.counts, row, left) for row in (bottom, top))
        return lower - upper, (bottom - top) * (right - left), q_inside & k_inside


def _entries(table: Array, row: Places, column: Places) -> Array:
    """Returns the entries of each sequence's table at `row` and `column`, which broadcast."""
    return jax.vmap(lambda table, row, column: table.at[row, column].get(mode="clip"))(table, row, column)
