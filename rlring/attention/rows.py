"""Rows: the layout in which attention is computed. A row is one key/value head of one sequence; there are R = B * K.

Query heads are grouped by the row that they read, N = K * G, so that a block needs one batched matrix product:
q[R, G, T, H], k[R, S, H], v[R, S, H]. Everywhere else arrays have the shapes of attention(), tokens before heads. They
are converted to rows block by block. Such a copy stays in the CPU cache, whereas converting all tokens at once would
copy all inputs and outputs in memory.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32, Shaped

from rlring.attention.score_mod import ModGradients, RowTerms, ScoreMod
from rlring.attention.softmax import PartialAttention


def rows_of_queries(q: Shaped[Array, "B T N H"], kv_heads: int) -> Shaped[Array, "R G T H"]:
    """Returns queries as rows; head n reads key/value head n // G."""
    batch, length, heads, size = q.shape
    grouped = q.reshape(batch, length, kv_heads, heads // kv_heads, size)
    return grouped.transpose(0, 2, 3, 1, 4).reshape(batch * kv_heads, heads // kv_heads, length, size)


def rows_of_keys(k: Shaped[Array, "B S K H"]) -> Shaped[Array, "R S H"]:
    """Returns keys or values as rows."""
    batch, length, heads, size = k.shape
    return k.transpose(0, 2, 1, 3).reshape(batch * heads, length, size)


def tokens_of_rows(out: Float[Array, "R G T H"], batch: int) -> Float[Array, "B T N H"]:
    """Returns the inverse of rows_of_queries(); for rows of keys, use a group axis G of 1."""
    rows, group, length, size = out.shape
    grouped = out.reshape(batch, rows // batch, group, length, size)
    return grouped.transpose(0, 3, 1, 2, 4).reshape(batch, length, rows // batch * group, size)


class Rows(NamedTuple):
    """A set of rows that are computed at once: all rows of some sequences, or some rows of one sequence."""

    first: Int32[Array, ""] | int  # index of the first row
    sequences: int
    heads: int  # key/value heads of each of these sequences
    kv_heads: int  # K
    total: int  # R

    def take(self, x: Float[Array, "B T N H"], start, size: int) -> Float[Array, "r Q H"]:
        """Returns these rows of `size` tokens from `start`, flattened: Q = G * size for queries, `size` for keys."""
        group = x.shape[2] // self.kv_heads
        sequence, head = self._start(group)
        sizes = self.sequences, size, self.heads * group, x.shape[3]
        tokens = lax.dynamic_slice(x, (sequence, start, head, 0), sizes)
        return rows_of_queries(tokens, self.heads).reshape(-1, group * size, x.shape[3])

    def put(self, x: Float[Array, "B T N H"], part: Float[Array, "r Q H"], start) -> Float[Array, "B T N H"]:
        """Returns x with `part` written to these rows from token `start` on; in a loop this is in place."""
        group = x.shape[2] // self.kv_heads
        sequence, head = self._start(group)
        tokens = tokens_of_rows(part.reshape(part.shape[0], group, -1, x.shape[3]), self.sequences)
        return lax.dynamic_update_slice(x, tokens, (sequence, start, head, 0))

    def add(self, x: Float[Array, "B T N H"], part: Float[Array, "r Q H"], start) -> Float[Array, "B T N H"]:
        """Returns x with `part` added to these rows from token `start` on."""
        size = part.shape[1] * self.kv_heads // x.shape[2]
        return self.put(x, self.take(x, start, size) + part, start)

    def take_numbers(self, x: Shaped[Array, "B N T"], start, size: int) -> Shaped[Array, "r Q"]:
        """Like take(), for arrays of one number per query."""
        group = x.shape[1] // self.kv_heads
        sizes = self.sequences, self.heads * group, size
        return lax.dynamic_slice(x, (*self._start(group), start), sizes).reshape(-1, group * size)

    def put_numbers(self, x: Float[Array, "B N T"], part: Float[Array, "r Q"], start) -> Float[Array, "B N T"]:
        """Like put(), for arrays of one number per query."""
        group = x.shape[1] // self.kv_heads
        numbers = part.reshape(self.sequences, self.heads * group, -1)
        return lax.dynamic_update_slice(x, numbers, (*self._start(group), start))

    def put_partial(self, whole: PartialAttention, part: tuple[Array, Array, Array], start) -> PartialAttention:
        """Returns `whole` with `part` (out, exponent, total) written to these rows from query `start` on."""
        out, exponent, total = part
        numbers = (self.put_numbers(x, new, start) for x, new in ((whole.exponent, exponent), (whole.total, total)))
        return PartialAttention(self.put(whole.out, out, start), *numbers)

    def terms(self, mod: ScoreMod, start, size: int, keys) -> RowTerms:
        """Returns slopes, seeds and bias of these rows; of a bias, `size` queries from `start`, and `keys` = (start,
        size)."""
        slopes = bias = seeds = None
        if mod.slopes is not None:
            slopes = self._take_heads(mod.slopes, (), ())
        if mod.bias is not None:
            bias = self._take_heads(mod.bias, (start, keys[0]), (size, keys[1]))
        if mod.seeds is not None:
            group = mod.seeds.shape[1] // self.kv_heads
            seeds = self.take_numbers(mod.seeds, 0, 2).reshape(-1, group, 2)
        return RowTerms(slopes, seeds, bias)

    def add_terms(self, total: ModGradients, part: RowTerms, start, keys) -> ModGradients:
        """Returns the total with the gradients `part` of the result of terms() added."""
        slopes = bias = None
        if total.slopes is not None:
            slopes = self._add_heads(total.slopes, part.slopes, ())
        if total.bias is not None:
            bias = self._add_heads(total.bias, part.bias, (start, keys[0]))
        return ModGradients(slopes, bias)

    def _take_heads(self, x: Shaped[Array, "N ..."], starts: tuple, sizes: tuple) -> Shaped[Array, "r G ..."]:
        group = x.shape[0] // self.kv_heads
        part = lax.dynamic_slice(x, _places(self._start(group)[1], *starts), (self.heads * group, *sizes))
        return jnp.broadcast_to(part, (self.sequences, *part.shape)).reshape(-1, group, *sizes)

    def _add_heads(self, x: Float[Array, "N ..."], part: Float[Array, "r G ..."], starts: tuple) -> Array:
        more = part.reshape(self.sequences, self.heads * part.shape[1], *part.shape[2:]).sum(0)
        place = _places(self._start(part.shape[1])[1], *starts)
        return lax.dynamic_update_slice(x, lax.dynamic_slice(x, place, more.shape) + more, place)

    def of_masks(self, masks):
        """Returns the parts of arrays [B, ...] or [R, ...] that belong to these rows."""

        def take(x: Array) -> Array:
            if x.shape[0] == self.total:
                return lax.dynamic_slice_in_dim(x, self.first, self.sequences * self.heads)
            return lax.dynamic_slice_in_dim(x, self._start(1)[0], self.sequences)

        return jax.tree.map(take, masks)

    def _start(self, group: int):
        """Returns the first sequence and its first head, for arrays with `group` heads per row."""
        return self.first // self.kv_heads, self.first % self.kv_heads * group


def _places(*starts) -> tuple[Int32[Array, ""], ...]:
    """Returns the starts as int32: JAX requires all start indices of a slice to have one type."""
    return tuple(jnp.asarray(start, jnp.int32) for start in starts)


def all_rows(batch: int, kv_heads: int) -> Rows:
    """Returns the set of all rows."""
    return Rows(0, batch, kv_heads, kv_heads, batch * kv_heads)


class RowGroups(NamedTuple):
    """A division of the rows into groups. The rows of a group are computed at once, the groups one after the other."""

    count: int
    rows: int  # in each group
    kv_heads: int

    @classmethod
    def of(cls, rows: int, kv_heads: int, most: int) -> "RowGroups":
        """Returns groups of at most `most` rows, and at least one row."""
        fitting = (n for n in range(max(1, min(rows, most)), 0, -1) if rows % n == 0)
        at_once = next(n for n in fitting if n % kv_heads == 0 or kv_heads % n == 0)
        return cls(rows // at_once, at_once, kv_heads)

    def __getitem__(self, index) -> Rows:
        first = 0 if self.count == 1 else index * self.rows
        heads = min(self.rows, self.kv_heads)
        return Rows(first, self.rows // heads, heads, self.kv_heads, self.count * self.rows)
