"""The files of evaluation results, results.jsonl: one JSON line per episode. All other outputs are made from them."""

import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from agents.cli import ConfigError
from agents.config import EvaluateConfig
from agents.result import CONTEXTS as CONTEXTS
from agents.result import MODES as MODES
from agents.result import NEW, Result
from agents.result import ORACLE as ORACLE
from agents.result import Goal as Goal
from data.atomic_file import atomic_file

FILE_NAME = "results.jsonl"
_JSON_KEYS = {one.name: one.name.rstrip("_") for one in fields(Result)}  # `return` is a Python keyword


def say_note(text: str) -> None:
    """Prints a note to stderr."""
    print(f"note: {text}", file=sys.stderr)


def to_json(result: Result) -> str:
    """Returns the JSON line of a result, without a newline."""
    values = {key: getattr(result, name) for name, key in _JSON_KEYS.items()}
    is_as_before = not result.evaluation_seed and result.group < _GROUPS_OF_A_SEED
    of_map = {"places": not result.places, "world": not result.places, "age": result.age is None}
    left_out = of_map | {"met": not result.met, "evaluation_seed": is_as_before}
    for name in (name for name, is_out in left_out.items() if is_out):
        del values[name]
    plain = {key: dict(value) if isinstance(value, Mapping) else value for key, value in values.items()}
    return json.dumps(plain, allow_nan=False)


def from_json(line: str) -> Result:
    """Returns the Result of a line. Raises ConfigError when the line is invalid. Unknown keys are ignored: a later
    version may write more.
    """
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"not JSON ({error.msg} at column {error.colno})") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise ConfigError(f"not JSON that a result is written in ({error})") from error
    if not isinstance(values, dict):
        raise ConfigError(f"not a JSON object, but {type(values).__name__}")
    missing = [key for key in _JSON_KEYS.values() if key not in values and key not in NEW]
    if missing:
        raise ConfigError(f"lacks {', '.join(missing)}")
    return Result(**_as_now({name: values[key] for name, key in _JSON_KEYS.items() if key in values}))


_GROUPS_OF_A_SEED = 1_000_000


def _as_now(values: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of a line, with the fields that older files lack filled in. In these, group holds
    evaluation_seed * 1,000,000 + group, and the series of a sweep's run "<sweep>/<agent>-<seed>" is its name without
    the seed."""
    seed, experiment, group = (values[name] for name in ("seed", "experiment", "group"))
    if not values.get("series") and isinstance(experiment, str) and "/" in experiment:
        values["series"] = experiment.removesuffix(f"-{seed}")
    if "evaluation_seed" not in values and isinstance(group, int) and group >= 0:
        values["evaluation_seed"], values["group"] = divmod(group, _GROUPS_OF_A_SEED)
    if values.get("places") and "world" not in values and isinstance(group, int):
        settings = values.get("settings")
        queries = settings.get("evaluate.queries") if isinstance(settings, dict) else None
        values["world"] = values["group"] // (queries or EvaluateConfig().queries)
    return values


def append_results(path: Path, results: Iterable[Result]) -> None:
    """Appends a line per result, and returns once they are written to disk.

    A torn last line, left by a write that was interrupted, is removed first.
    """
    lines = "".join(to_json(result) + "\n" for result in results).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        file.seek(0)
        content = file.read()
        tail = content[content.rfind(b"\n") + 1 :]
        if tail and _is_result(tail):  # complete except for its newline
            lines = b"\n" + lines
        elif tail:
            file.truncate(len(content) - len(tail))
        file.write(lines)  # mode "a" writes at the end, whatever the read position
        file.flush()
        os.fsync(file.fileno())


def write_results(path: Path, results: Iterable[Result]) -> None:
    """Writes results to `path`, replacing an existing file."""
    with atomic_file(path) as file:
        file.write("".join(to_json(result) + "\n" for result in results).encode())


def read_results(*paths: Path, say: Callable[[str], object] = say_note) -> list[Result]:
    """Returns the episodes of all files. A path is a results.jsonl, or a run folder that holds one.

    For each run, task and settings, only the episodes of the newest checkpoint are returned; of an episode written
    twice, only the later line. `say` is called with a note about everything left out, torn last lines included. Raises
    ConfigError for a missing file, an invalid line that is not a torn last one, and two different runs of one name.
    """
    distinct: dict[tuple[str | int, ...], Result] = {}
    places: dict[tuple[str | int, ...], Path] = {}
    count = 0
    for path in dict.fromkeys(paths):
        read = _read_file(path, say)
        count += len(read)
        for key, result in {result.key: result for result in read}.items():
            _refuse_namesake(result, distinct.get(key), path, places.get(key, path))
            distinct[key], places[key] = result, path
    if len(distinct) < count:
        say(f"{count - len(distinct)} episodes were written twice; the later line counts")
    newest: dict[tuple[object, ...], int] = {}
    for result in distinct.values():
        newest[_line(result)] = max(result.checkpoint_step, newest.get(_line(result), 0))
    current = [result for result in distinct.values() if result.checkpoint_step == newest[_line(result)]]
    if len(current) < len(distinct):
        say(f"{len(distinct) - len(current)} episodes of older checkpoints do not count")
    return current


def merged_versions(results: Iterable[Result]) -> dict[str, str]:
    """Returns the version of every package that the episodes were played with (`merged`)."""
    return merged(result.versions for result in results)


def merged(versions: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """Returns the version of every package; where versions differ, all of them, separated by commas."""
    found: dict[str, set[str]] = {}
    for one in versions:
        for name, version in one.items():
            found.setdefault(name, set()).update(str(version).split(", "))
    return {name: ", ".join(sorted(found[name])) for name in sorted(found)}


def _line(result: Result) -> tuple[object, ...]:
    """Returns a key that all checkpoints of one run share, also when the run was lengthened in between."""
    settings = {name: value for name, value in result.settings.items() if name != "train.updates"}
    return *result.player[:-1], result.settings_id != "", json.dumps(settings, sort_keys=True)


def _refuse_namesake(result: Result, other: Result | None, path: Path, place: Path) -> None:
    """Raises ConfigError when two folders have the same run name but different returns. Copies of a run are allowed."""
    if other is None or place == path or other.return_ == result.return_:
        return
    raise ConfigError(
        f"{place} and {path} hold two runs named {result.run!r} with the same settings and other returns; they would "
        "count as one. Draw them apart, or train one under another name."
    )


def _is_result(line: bytes) -> bool:
    try:
        from_json(line.decode(errors="replace"))
    except ConfigError:
        return False
    return True


def _read_file(path: Path, say: Callable[[str], object]) -> list[Result]:
    path = path / FILE_NAME if path.is_dir() else path
    if not path.exists():
        evaluate = (path.parent / "config.json").exists()
        advice = f"python -m agents.evaluate {path.parent}" if evaluate else "Give the folder of an evaluated run."
        raise ConfigError(f"there are no results at {path}. {'Evaluate the run first: ' if evaluate else ''}{advice}")
    *ended, torn = path.read_bytes().split(b"\n")
    results = []
    for number, line in enumerate(ended, start=1):
        if line.strip():
            try:
                results.append(from_json(line.decode(errors="replace")))
            except ConfigError as error:
                raise ConfigError(f"line {number} of {path} is no result: {error}. Remove the line.") from error
    if torn and _is_result(torn):
        results.append(from_json(torn.decode()))
    elif torn:
        say(f"the last line of {path} is torn (an evaluation was cut off while writing) and does not count")
    return results
