"""LazyField: one field of a store, whose rows are read from disk when first used and then kept in memory."""

import numpy as np

from data.store import TrajectoryStore

BLOCK = 256  # rows read at a time


class LazyField:
    """The rows of one field. `field[rows]` reads the blocks of rows that were not read before.

    So a host that works on a part of every chain never reads the rest.
    """

    def __init__(self, store: TrajectoryStore, field: str) -> None:
        self.store, self.field = store, field
        shape, dtype = store.shape(field), store.dtype(field)
        self.is_read = np.zeros(-(-shape[0] // BLOCK), bool)
        self._values = np.empty(shape, dtype)  # the system allocates pages of it only when they are written

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        blocks = rows // BLOCK
        if not self.is_read[blocks].all():
            self._read(np.unique(blocks[~self.is_read[blocks]]))
        return self._values[rows]

    def _read(self, blocks: np.ndarray) -> None:
        for run in np.split(blocks, np.flatnonzero(np.diff(blocks) != 1) + 1):
            rows = slice(int(run[0]) * BLOCK, min((int(run[-1]) + 1) * BLOCK, len(self._values)))
            self._values[rows] = self.store.rows(self.field, rows)
            self.is_read[run] = True
