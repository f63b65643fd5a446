"""rows.py: tokens become rows and come back, whichever rows are computed at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlring.attention.rows import RowGroups, rows_of_keys, rows_of_queries, tokens_of_rows

BATCH, LENGTH, KV_HEADS, GROUP, SIZE = 2, 7, 6, 2, 4


def arrays():
    """Queries, keys, and a number for each query."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (BATCH, LENGTH, KV_HEADS * GROUP, SIZE), (BATCH, LENGTH, KV_HEADS, SIZE), (BATCH, KV_HEADS * GROUP, LENGTH)
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def test_rows_of_all_tokens():
    q, k, _ = arrays()
    rows = rows_of_queries(q, KV_HEADS)
    assert rows.shape == (BATCH * KV_HEADS, GROUP, LENGTH, SIZE)
    np.testing.assert_array_equal(rows[7, 1], q[1, :, 3])  # row 7: sequence 1, key/value head 1; its second query head
    np.testing.assert_array_equal(rows_of_keys(k)[7], k[1, :, 1])
    np.testing.assert_array_equal(tokens_of_rows(rows, BATCH), q)


@pytest.mark.parametrize(
    ("most", "at_once"), [(1, 1), (2, 2), (3, 3), (4, 3), (5, 3), (6, 6), (11, 6), (12, 12), (99, 12)]
)
def test_groups_of_rows(most, at_once):
    groups = RowGroups.of(BATCH * KV_HEADS, KV_HEADS, most)
    assert (groups.rows, groups.count) == (at_once, BATCH * KV_HEADS // at_once)
    q, k, numbers = arrays()
    q_rows, k_rows = rows_of_queries(q, KV_HEADS), rows_of_keys(k)
    by_sequence, by_row = jnp.arange(BATCH), jnp.arange(BATCH * KV_HEADS)
    copies = [jnp.zeros_like(x) for x in (q, k, numbers)]
    for group in range(groups.count):
        rows, these = groups[group], slice(group * at_once, (group + 1) * at_once)
        part = rows.take(q, 2, 3), rows.take(k, 2, 3), rows.take_numbers(numbers, 2, 3)
        np.testing.assert_array_equal(part[0], q_rows[these, :, 2:5].reshape(at_once, -1, SIZE))
        np.testing.assert_array_equal(part[1], k_rows[these, 2:5])
        every = numbers.reshape(BATCH * KV_HEADS, GROUP, LENGTH)
        np.testing.assert_array_equal(part[2], every[these, :, 2:5].reshape(at_once, -1))
        copies = [
            rows.put(copies[0], part[0], 2),
            rows.add(copies[1], part[1], 2),
            rows.put_numbers(copies[2], part[2], 2),
        ]
        np.testing.assert_array_equal(rows.of_masks(by_row), by_row[these])
        np.testing.assert_array_equal(rows.of_masks(by_sequence), np.unique(by_row[these] // KV_HEADS))
    within = (jnp.arange(LENGTH) >= 2) & (jnp.arange(LENGTH) < 5)
    for copy, whole in zip(copies[:2], (q, k), strict=True):
        np.testing.assert_array_equal(copy, jnp.where(within[:, None, None], whole, 0))
    np.testing.assert_array_equal(copies[2], jnp.where(within, numbers, 0))
