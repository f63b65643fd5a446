"""mask.py: who sees whom, blocks and bounds that agree with the whole, and the zigzag order."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlring.attention import Mask, inverse_order, striped_order, zigzag_order
from rlring.errors import UsageError


def row(*values: int):
    return jnp.array([values], jnp.int32)


def drawn(mask: Mask) -> list[str]:
    return ["".join("#" if seen else "." for seen in line) for line in np.asarray(mask.visible()[0])]


def test_as_drawn_in_the_docstring():
    mask = Mask.causal(row(0, 1, 2, 0, 1, 2), row(0, 0, 0, 1, 1, -1), window=2)
    assert drawn(mask) == ["#.....", "##....", ".##...", "...#..", "...##.", "......"]


def test_full_and_shared_positions():
    assert drawn(Mask.full(row(0, 1, 2))) == ["###", "###", "###"]
    assert drawn(Mask.full(row(0, 1, 2), window=1)) == ["###", ".##", "..#"]
    assert drawn(Mask.causal(row(0, 0, 1, 1))) == ["##..", "##..", "####", "####"]
    assert drawn(Mask.causal(row(2, 0, 1))) == ["###", ".#.", ".##"]


def test_window_without_tokens():
    with pytest.raises(UsageError, match=r"a window holds at least the token itself, .*; got window=0. Use None"):
        Mask.causal(row(0), window=0)


@st.composite
def any_mask(draw) -> Mask:
    """Two rows of 12 queries and 8 keys with few distinct values, so that all relations happen."""

    def numbers(low, high, length):
        values = draw(st.lists(st.integers(low, high), min_size=2 * length, max_size=2 * length))
        return jnp.array(values, jnp.int32).reshape(2, length)

    q, k = sorted_or_not(draw, numbers(0, 9, 12)), sorted_or_not(draw, numbers(0, 9, 8))
    low = draw(st.sampled_from([-1, 0]))
    segments = numbers(low, 1, 12), numbers(low, 1, 8)
    if draw(st.booleans()):
        segments = jnp.zeros_like(q), jnp.zeros_like(k)
    return Mask(q, k, *segments, draw(st.booleans()), draw(st.sampled_from([None, 1, 3])))


def sorted_or_not(draw, x):
    return jnp.sort(x, axis=1) if draw(st.booleans()) else x


@settings(max_examples=60, deadline=None)
@given(any_mask())
def test_blocks_and_bounds_agree_with_the_whole(mask):
    whole = np.asarray(mask.visible())
    q_bounds, k_bounds = mask.q_bounds(3), mask.k_bounds(4)
    for i in range(4):
        for j in range(2):
            block = np.asarray(mask.block(3 * i, 3, 4 * j, 4).visible())
            np.testing.assert_array_equal(block, whole[:, 3 * i : 3 * i + 3, 4 * j : 4 * j + 4])
            q, k = (type(b)(*(x[:, n : n + 1] for x in b)) for b, n in ((q_bounds, i), (k_bounds, j)))
            assert mask.maybe_visible(q, k)[0] or not block.any()
            assert block.all() or not mask.fully_visible(q, k)[0]


def test_bounds_are_tight_for_plain_causal():
    mask = Mask.causal(jnp.arange(12, dtype=jnp.int32)[None])
    q, k = mask.q_bounds(4), mask.k_bounds(4)
    first, last = (type(k)(*(x[:, n : n + 1] for x in k)) for n in (0, 2))
    assert mask.maybe_visible(q, last).tolist() == [False, False, True]
    assert mask.fully_visible(q, first).tolist() == [False, True, True]
    windowed = replace(mask, window=3)
    assert windowed.maybe_visible(q, first).tolist() == [True, True, False]


def test_padding_is_nowhere():
    padded = Mask.full(row(0, 1)).padded(3, 4)
    assert drawn(padded) == ["##..", "##..", "...."]


def test_zigzag():
    assert zigzag_order(8, 2).tolist() == [0, 1, 6, 7, 2, 3, 4, 5]
    order = zigzag_order(48, 4)
    np.testing.assert_array_equal(order[inverse_order(order)], np.arange(48))
    np.testing.assert_array_equal(np.arange(48)[order][inverse_order(order)], np.arange(48))
    work = [sum(order.reshape(4, -1)[r] + 1) for r in range(4)]  # keys that the tokens of a shard see
    assert len(set(work)) == 1


def test_zigzag_needs_equal_chunks():
    with pytest.raises(UsageError, match=r"2 \* ring = 8 equal chunks; got length=12. Pad the sequence to 16 tokens"):
        zigzag_order(12, 4)


def test_striped():
    assert striped_order(8, 2).tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
    order = striped_order(48, 4)
    np.testing.assert_array_equal(order[inverse_order(order)], np.arange(48))
    with pytest.raises(UsageError, match=r"same number of tokens; got length=10. Pad the sequence to 12 tokens"):
        striped_order(10, 4)
