import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agents.cli import ConfigError
from agents.results import (
    Goal,
    Result,
    append_results,
    from_json,
    merged_versions,
    read_results,
    to_json,
    write_results,
)


def result(**changes) -> Result:
    values = {
        "experiment": "dark/at-0",
        "series": "dark/at",
        "agent": "at",
        "task": "point_mass-dark",
        "seed": 0,
        "context_trajectories": 4,
        "context_tokens": 64,
        "mode": "prompted",
        "context": "own",
        "group": 3,
        "episode_index": 0,
        "return_": 5.0,
        "steps": 16,
        "checkpoint_step": 100,
        "versions": {"jax": "0.12.0"},
    }
    return Result(**values | changes)


def test_a_line_has_the_published_keys():
    assert set(json.loads(to_json(result()))) == {
        "experiment",
        "agent",
        "task",
        "seed",
        "context_trajectories",
        "context_tokens",
        "mode",
        "context",
        "group",
        "episode_index",
        "return",
        "steps",
        "checkpoint_step",
        "versions",
        "run",
        "series",
        "settings_id",
        "settings",
        "trained_with",
    }


@given(
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(min_size=1),
    st.integers(0, 2**60),
    st.dictionaries(st.text(), st.text()),
)
def test_a_line_returns_what_was_written(return_: float, agent: str, group: int, versions: dict[str, str]):
    written = result(return_=return_, agent=agent, group=group, versions=versions)
    line = to_json(written)
    assert "\n" not in line
    assert from_json(line) == written
    new = {"run", "series", "settings_id", "settings", "trained_with"}
    before = json.dumps({key: value for key, value in json.loads(line).items() if key not in new})
    assert from_json(before) == written


def test_a_line_of_a_later_version_may_hold_more():
    assert from_json(json.dumps(json.loads(to_json(result())) | {"new": 1})) == result()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "prompt"}, "mode must be one of prompted, self; got 'prompt'"),
        ({"context": "other"}, "context must be one of own, foreign, none; got 'other'"),
        ({"context": "none"}, "without context has 0 context_trajectories; got 4"),
        ({"group": -1}, "group must be a whole number of 0 or more; got -1"),
        ({"steps": 1.5}, "steps must be a whole number"),
        ({"seed": True}, "seed must be a whole number"),
        ({"agent": ""}, "agent must be a name"),
        ({"return_": float("nan")}, "return must be a finite number; got nan"),
        ({"return_": "5"}, "return must be a finite number; got '5'"),
        ({"versions": ["jax"]}, "versions must map"),
        ({"settings": "x"}, "settings must map"),
        ({"places": 4}, "a result of a map has places and a world, and no other has; got places=4, world=None"),
        ({"world": 4}, "a result of a map has places and a world"),
        ({"places": 4, "world": 0, "age": -1}, "age must be a whole number of 0 or more; got -1"),
        ({"places": 4, "world": -1}, "world must be a whole number of 0 or more; got -1"),
    ],
)
def test_a_result_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        result(**changes)


def test_appended_batches_are_read_in_order(tmp_path: Path):
    path = tmp_path / "new" / "results.jsonl"
    first, second = [result(group=0), result(group=1)], [result(group=2)]
    append_results(path, first)
    append_results(path, second)
    assert read_results(path) == first + second
    assert read_results(path.parent) == first + second


def test_a_torn_last_line_does_not_count_and_is_told(tmp_path: Path):
    path = tmp_path / "results.jsonl"
    append_results(path, [result(group=0), result(group=1)])
    path.write_bytes(path.read_bytes()[:-20])
    notes: list[str] = []
    assert read_results(path, say=notes.append) == [result(group=0)]
    assert len(notes) == 1
    assert "torn" in notes[0]
    assert str(path) in notes[0]


def test_notes_go_to_stderr(tmp_path: Path, capsys: pytest.CaptureFixture):
    path = tmp_path / "results.jsonl"
    path.write_text(to_json(result()) + "\n{")
    read_results(path)
    assert capsys.readouterr().err.startswith("note: the last line")


def test_appending_after_a_torn_line_removes_it(tmp_path: Path):
    path = tmp_path / "results.jsonl"
    append_results(path, [result(group=0), result(group=1)])
    path.write_bytes(path.read_bytes()[:-20])
    append_results(path, [result(group=2)])
    notes: list[str] = []
    assert read_results(path, say=notes.append) == [result(group=0), result(group=2)]
    assert notes == []


def test_appending_after_a_line_that_lacks_only_its_end_keeps_it(tmp_path: Path):
    path = tmp_path / "results.jsonl"
    path.write_text(to_json(result(group=0)))
    assert read_results(path) == [result(group=0)]
    append_results(path, [result(group=1)])
    assert read_results(path) == [result(group=0), result(group=1)]


def changed(key: str, written: str) -> str:
    """Returns a line with something odd in one place."""
    values = json.loads(to_json(result()))
    return json.dumps(values | {key: "HERE"}).replace('"HERE"', written)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 of .*results.jsonl is no result: not JSON"),
        ("[]", "line 2 of .* not a JSON object, but list"),
        ('{"agent": "at"}', "line 2 of .* lacks experiment, task"),
        ("[" * 100_000, "line 2 of .* not JSON that a result is written in"),
        (changed("return", "9" * 401), "line 2 of .* return must be a finite number; got a long number"),
        (changed("return", "9" * 5000), "line 2 of .* not JSON that a result is written in"),
        (changed("return", "NaN"), "line 2 of .* return must be a finite number; got nan"),
        (changed("seed", "9" * 401), "line 2 of .* seed must be a whole number of 0 or more and below 2"),
        (changed("run", '["a"]'), r"line 2 of .* run must be a name; got \['a'\]"),
        (changed("series", "5"), "line 2 of .* series must be a name; got 5"),
        (changed("settings_id", "5"), "line 2 of .* settings_id must be a name; got 5"),
        (changed("experiment", '["a/b"]'), "line 2 of .* experiment must be a name"),
        (changed("agent", '"\\ud800"'), "line 2 of .* agent must be a name"),
    ],
    ids=range(13),
)
def test_a_broken_line_that_is_not_torn_is_an_error(tmp_path: Path, line: str, message: str):
    path = tmp_path / "results.jsonl"
    path.write_text(f"{to_json(result())}\n{line}\n")
    with pytest.raises(ConfigError, match=message):
        read_results(path)


def test_missing_results_name_the_command_that_makes_them(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"there are no results at .*nowhere"):
        read_results(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=f"Evaluate the run first: python -m agents.evaluate {tmp_path}"):
        read_results(tmp_path)


def test_an_empty_file_holds_no_episodes(tmp_path: Path):
    path = tmp_path / "results.jsonl"
    path.touch()
    assert read_results(path) == []


def test_the_newest_checkpoint_of_each_seed_counts(tmp_path: Path):
    path = tmp_path / "results.jsonl"
    old, new = result(checkpoint_step=100), result(checkpoint_step=200)
    other = result(checkpoint_step=150, seed=1, experiment="dark/at-1")
    append_results(path, [old, new, other])
    notes: list[str] = []
    assert read_results(path, say=notes.append) == [new, other]
    assert notes == ["1 episodes of older checkpoints do not count"]


def test_the_later_line_of_an_episode_counts(tmp_path: Path):
    path = tmp_path / "results.jsonl"
    append_results(path, [result(return_=1.0), result(return_=2.0)])
    notes: list[str] = []
    assert read_results(path, say=notes.append) == [result(return_=2.0)]
    assert notes == ["1 episodes were written twice; the later line counts"]


def test_the_same_file_named_twice_is_read_once(tmp_path: Path):
    append_results(tmp_path / "results.jsonl", [result()])
    notes: list[str] = []
    assert read_results(tmp_path, tmp_path, say=notes.append) == [result()]
    assert notes == []


def test_writing_replaces(tmp_path: Path):
    path = tmp_path / "results.jsonl"
    append_results(path, [result(group=0)])
    write_results(path, [result(group=1)])
    assert read_results(path) == [result(group=1)]
    assert [entry.name for entry in tmp_path.iterdir()] == ["results.jsonl"]


def line_of_before(**values) -> str:
    """A line as it was written before results had these fields."""
    new = {"run", "series", "settings_id", "settings", "trained_with", "evaluation_seed", "world"}
    written = {key: value for key, value in json.loads(to_json(result())).items() if key not in new}
    return json.dumps(written | values)


@pytest.mark.parametrize(
    ("experiment", "seed", "series"),
    [("dark/at-0", 0, "dark/at"), ("dark/at-1", 1, "dark/at"), ("dark/at-1", 0, "dark/at-1"), ("t-5", 5, "t-5")],
)
def test_lines_of_before_name_no_series(experiment, seed, series):
    read = from_json(line_of_before(experiment=experiment, seed=seed))
    assert (read.run, read.series) == (experiment, series)


@pytest.mark.parametrize(
    ("written", "goal"),
    [
        ({"group": 5}, Goal(0, 0, 5, None)),
        ({"group": 3_000_005}, Goal(0, 3, 5, None)),
        ({"group": 3_000_005, "places": 64}, Goal(0, 3, 5, 1)),
        ({"group": 5, "places": 64, "settings": {"evaluate.queries": 2}}, Goal(0, 0, 5, 2)),
    ],
    ids=str,
)
def test_a_group_of_before_was_two_numbers(written, goal):
    read = from_json(line_of_before(**written))
    assert read.goal == goal
    assert from_json(to_json(read)) == read


@pytest.mark.parametrize(
    ("changes", "free"),
    [
        ({"context_trajectories": 0, "context": "none"}, True),
        ({"context_trajectories": 0, "context": "none", "episode_index": 1}, False),  # it has seen episode 0
        ({"context_trajectories": 4}, False),
        ({"mode": "self"}, True),
        ({"mode": "self", "episode_index": 1}, False),
    ],
)
def test_context_free(changes, free: bool):
    assert result(**changes).context_free is free


def test_merged_versions_lists_every_version():
    results = [result(versions={"jax": "0.12.0"}), result(versions={"jax": "0.10.2", "mujoco": "3.17.0"})]
    assert merged_versions(results) == {"jax": "0.10.2, 0.12.0", "mujoco": "3.17.0"}


def test_the_best_checkpoint_stands_beside_a_newer_one_and_a_lengthened_run_in_place_of_itself(tmp_path: Path):
    path = tmp_path / "results.jsonl"
    made = {"series": "s", "settings_id": "a"}
    newest, best = result(**made), result(settings_id="b", settings={"evaluate.checkpoint": "best"}, checkpoint_step=50)
    longer = result(settings_id="c", settings={"train.updates": [100, 200]}, checkpoint_step=200, series="s")
    write_results(path, [newest, best])
    assert read_results(path, say=print) == [newest, best]
    append_results(path, [longer])
    assert read_results(path, say=lambda note: None) == [best, longer]


def test_two_runs_of_one_name_are_not_taken_for_one(tmp_path: Path):
    a, b = tmp_path / "a" / "results.jsonl", tmp_path / "b" / "results.jsonl"
    append_results(a, [result()])
    append_results(b, [result()])
    assert len(read_results(a, b, say=lambda note: None)) == 1  # a copy
    append_results(b, [result(group=4, settings_id="other", return_=1.0)])
    assert len(read_results(a, b, say=lambda note: None)) == 2  # other settings
    append_results(b, [result(return_=1.0)])
    with pytest.raises(
        ConfigError, match=r"a/results.jsonl and .*b/results.jsonl hold two runs named 'dark/at-0'.*other name"
    ):
        read_results(a, b)
