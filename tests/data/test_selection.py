"""selection: which whole episodes are built, and how they are parted; checked against plain loops."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data import DataError
from data.selection import Selection, Shard, shards_of

HERE = Path("datasets")


def named(lengths):
    return [Path("datasets") / f"episode_{index:06d}_{length}.npz" for index, length in enumerate(lengths)]


def as_infom(lengths, skip, most):
    """The episodes that InFOM's dataset_aggregator takes, by its rule read in its repository."""
    size, chosen = 0, []
    for index, length in enumerate(lengths):
        size += length
        if size <= skip:
            continue
        if size > skip + most:
            break
        chosen.append(index)
    return chosen


@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(0, 400), st.integers(1, 400))
def test_a_slice_is_infoms(lengths, skip, most):
    expected = as_infom(lengths, skip, most)
    selection = Selection(skip, most)
    if expected:
        assert selection.choose(lengths, HERE) == expected
    else:
        with pytest.raises(
            DataError, match=r"--skip-steps \d+ leaves nothing|--limit-steps \d+ is less than the first"
        ):
            selection.choose(lengths, HERE)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=60), st.integers(30, 400))
def test_spread_fits_and_reaches_from_end_to_end(lengths, most):
    chosen = Selection(limit_steps=most, spread=True).choose(lengths, HERE)
    assert sum(lengths[index] for index in chosen) <= most
    assert chosen == sorted(set(chosen))
    steps = np.diff([-0.5, *chosen, len(lengths) - 0.5])
    width = len(lengths) / len(chosen)
    assert (np.abs(steps[1:-1] - width) <= 1).all()
    assert (np.abs(steps[[0, -1]] - width / 2) <= 1).all()


def test_spread_of_equal_episodes():
    assert Selection(limit_steps=3500, spread=True).choose([1000] * 9, HERE) == [1, 4, 7]
    assert Selection(3000, 2000, spread=True).choose([1000] * 9, HERE) == [4, 7]
    assert Selection(limit_steps=10**9, spread=True).choose([5] * 7, HERE) == list(range(7))


@given(st.integers(1, 50), st.integers(1, 12))
def test_shards_are_the_whole(count, shards):
    paths = named([10] * count)
    if shards > count:
        with pytest.raises(DataError, match=f"only {count} episodes are chosen"):
            Shard(0, shards).choose(paths)
        return
    parts = [Shard.parse(f"{index}/{shards}").choose(paths) for index in range(shards)]
    assert [path for part in parts for path in part] == paths
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_the_names_of_shards(tmp_path):
    out = tmp_path / "walker.v2.h5"
    for index in (0, 2):
        Shard(index, 3).path(out).touch()
    (tmp_path / "walker.shard-0-of-3.h5").touch()
    assert shards_of(out) == {Shard(index, 3): tmp_path / f"walker.v2.shard-{index}-of-3.h5" for index in (0, 2)}


@pytest.mark.parametrize("text", ["3/3", "0/0", "-1/2", "1", "a/b", "1/2/3", ""])
def test_shards_that_are_none(text):
    with pytest.raises(DataError, match="--shard is I/N, with I from 0 to N - 1, such as 0/8; got"):
        Shard.parse(text)


def test_selections_that_are_none():
    for options, message in (
        ({"limit_steps": 0}, "--limit-steps must be 1 or more; got 0"),
        ({"skip_steps": -1}, "--skip-steps must be 0 or more; got -1"),
        ({"spread": True}, "--spread takes as many episodes as --limit-steps has room for; give that too"),
    ):
        with pytest.raises(DataError, match=message):
            Selection(**options)
    with pytest.raises(DataError, match=r"--skip-steps 30 leaves nothing of datasets, which has 30 steps"):
        Selection(30).choose([10, 20], HERE)
    with pytest.raises(DataError, match=r"is less than the first episode of datasets that is not skipped, 20 steps"):
        Selection(10, 19).choose([10, 20], HERE)
