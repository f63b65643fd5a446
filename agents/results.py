"""What an evaluation measured: one JSON line an episode. results.jsonl is the truth, all else is made from it."""

import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from agents.cli import ConfigError
from data.atomic_file import atomic_file

FILE_NAME = "results.jsonl"
ORACLE = "oracle"  # the agent name of a scripted controller that is told what the others must find out
MODES = ("prompted", "self")
CONTEXTS = ("own", "foreign", "none")


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One evaluated episode.

    Attributes:
        group: The goal (or chain) of the episode. Episodes of one group were played one after the other; a bootstrap
            resamples groups. The same (seed, group) under another context must be the same goal, so that the two can
            be paired.
        mode: "prompted" when a context is given, "self" when the agent has its own earlier episodes of the group alone.
        context: What is given: trajectories of the episode's "own" goal, of a "foreign" one (the control), or "none".
        context_trajectories: How much is given before the first episode of the group.
        context_tokens: The same in tokens.
        places: Of the world, where the task is a map; else 0.
        met: The chance with which a trajectory of the context had met the goal; 0 where that was left to the data.
        episode_index: Place of the episode within its group, from 0; it sees the episodes before it, in both modes.
        run: The training run that played.
        series: The seeds of one series are averaged; two series never are.
        settings_id: Equal for equal settings (`agents.identity`); results of other settings are never pooled. Old lines
            have none.
        settings: The settings that are not the default, by dotted name.
        versions: Of the packages that played.
        trained_with: Of the packages that trained.
    """

    experiment: str
    agent: str
    task: str
    seed: int
    context_trajectories: int
    context_tokens: int
    mode: str
    context: str
    group: int
    episode_index: int
    return_: float
    steps: int
    checkpoint_step: int
    versions: Mapping[str, str]
    places: int = 0
    met: float = 0.0
    run: str = ""
    series: str = ""
    settings_id: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    trained_with: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("experiment", "agent", "task", "run", "series", "settings_id"):
            value = getattr(self, name)
            if not isinstance(value, str) or not _is_text(value) or not (value or name in _NEW):
                raise ConfigError(f"a result's {name} must be a name; got {_shown(value)}")
        # Lines of before: of a sweep's run "<sweep>/<agent>-<seed>" the series was all but the seed.
        of_sweep = self.experiment.removesuffix(f"-{self.seed}") if "/" in self.experiment else self.experiment
        for name, value in (("run", self.experiment), ("series", of_sweep)):
            if not getattr(self, name):
                object.__setattr__(self, name, value)
        for name in _COUNTS:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
                limit = " and below 2^63" if isinstance(value, int) and value > 0 else ""
                raise ConfigError(f"a result's {name} must be a whole number of 0 or more{limit}; got {_shown(value)}")
        if not isinstance(self.met, int | float) or not 0 <= self.met <= 1:
            raise ConfigError(f"a result's met must be a chance, from 0 to 1; got {_shown(self.met)}")
        if self.mode not in MODES:
            raise ConfigError(f"a result's mode must be one of {', '.join(MODES)}; got {_shown(self.mode)}")
        if self.context not in CONTEXTS:
            raise ConfigError(f"a result's context must be one of {', '.join(CONTEXTS)}; got {_shown(self.context)}")
        if self.context == "none" and self.context_trajectories:
            raise ConfigError(
                f"a result without context has 0 context_trajectories; got {self.context_trajectories}. "
                "Write context 'own' or 'foreign'."
            )
        if not isinstance(self.return_, int | float) or not abs(self.return_) <= sys.float_info.max:
            raise ConfigError(f"a result's return must be a finite number; got {_shown(self.return_)}")
        for name in ("versions", "settings", "trained_with"):
            value = getattr(self, name)
            if not isinstance(value, Mapping):
                raise ConfigError(f"a result's {name} must map names to values; got {_shown(value)}")

    @property
    def player(self) -> tuple[str | int, ...]:
        """Names who played and how: the run, as whose agent it counts, and the settings."""
        return self.experiment, self.series, self.run, self.agent, self.task, self.seed, self.settings_id

    @property
    def key(self) -> tuple[str | int | float, ...]:
        """Names the episode: an evaluation that is started again skips the keys it finds, and of two lines with one key
        the later counts.
        """
        return (
            *self.player,
            self.mode,
            self.context,
            self.context_trajectories,
            self.places,
            self.met,
            self.group,
            self.episode_index,
            self.checkpoint_step,
        )

    @property
    def context_free(self) -> bool:
        """True when no earlier episode could have helped: no prompt, and no episode of the same group before it."""
        return self.episode_index == 0 and (self.mode == "self" or self.context_trajectories == 0)


_COUNTS = (
    *("seed", "context_trajectories", "context_tokens", "places", "group", "episode_index", "steps"),
    "checkpoint_step",
)
_JSON_KEYS = {one.name: one.name.rstrip("_") for one in fields(Result)}  # `return` is a word of Python's
_NEW = {"places", "met", "run", "series", "settings_id", "settings", "trained_with"}  # which lines of before lack


def _is_text(value: str) -> bool:
    """Whether a string can be written to a file: JSON may hold half a character, "\\ud800"."""
    return value.encode(errors="ignore").decode() == value


def _shown(value: object) -> str:
    """Returns the value as a message shows it: its beginning, where it is long."""
    text = "a long number" if isinstance(value, int) and value.bit_length() > 1000 else repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def say_note(text: str) -> None:
    """Tells the user something that is no error."""
    print(f"note: {text}", file=sys.stderr)


def to_json(result: Result) -> str:
    """Returns the line, without its end."""
    values = {key: getattr(result, name) for name, key in _JSON_KEYS.items()}
    for name in ("places", "met"):
        if not values[name]:
            del values[name]
    plain = {key: dict(value) if isinstance(value, Mapping) else value for key, value in values.items()}
    return json.dumps(plain, allow_nan=False)


def from_json(line: str) -> Result:
    """Returns the Result of a line; ConfigError when it is not one. Keys that we do not know are left out: a later
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
    missing = [key for key in _JSON_KEYS.values() if key not in values and key not in _NEW]
    if missing:
        raise ConfigError(f"lacks {', '.join(missing)}")
    return Result(**{name: values[key] for name, key in _JSON_KEYS.items() if key in values})


def append_results(path: Path, results: Iterable[Result]) -> None:
    """Appends a batch of lines, and returns when they are on the disk.

    A torn last line (the machine died in the middle of a write) is cut off first, so that it cannot swallow the next
    one.
    """
    lines = "".join(to_json(result) + "\n" for result in results).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        file.seek(0)
        content = file.read()
        tail = content[content.rfind(b"\n") + 1 :]
        if tail and _is_result(tail):  # whole but for the end of its line
            lines = b"\n" + lines
        elif tail:
            file.truncate(len(content) - len(tail))
        file.write(lines)  # mode "a" writes to the end, wherever we have read
        file.flush()
        os.fsync(file.fileno())


def write_results(path: Path, results: Iterable[Result]) -> None:
    """Writes a whole results.jsonl, in place of any that was there."""
    with atomic_file(path) as file:
        file.write("".join(to_json(result) + "\n" for result in results).encode())


def read_results(*paths: Path, say: Callable[[str], object] = say_note) -> list[Result]:
    """Returns the episodes of all files; a path is a results.jsonl or a run folder that holds one.

    Of one run, task and settings only the newest checkpoint's episodes are returned, and of an episode written twice
    only the later line; `say` is told what was left out, torn last lines too. ConfigError: no such file, a broken line
    that is not torn, or two runs of one name that nothing tells apart.
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
    """Returns every package's version; several, with commas between, where episodes were played with different ones."""
    return merged(result.versions for result in results)


def merged(versions: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """Returns every package's version; several, with commas between, where they differ."""
    found: dict[str, set[str]] = {}
    for one in versions:
        for name, version in one.items():
            found.setdefault(name, set()).update(str(version).split(", "))
    return {name: ", ".join(sorted(found[name])) for name in sorted(found)}


def _line(result: Result) -> tuple[object, ...]:
    """Returns what the checkpoints of one run share, also when it was lengthened in between."""
    settings = {name: value for name, value in result.settings.items() if name != "train.updates"}
    return *result.player[:-1], result.settings_id != "", json.dumps(settings, sort_keys=True)


def _refuse_namesake(result: Result, other: Result | None, path: Path, place: Path) -> None:
    """Of two folders with the same run, one may be a copy of the other; with other numbers it is another run."""
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
