"""Config files: `load` reads TOML, `dump` writes JSON, and `validate` reports errors in one format."""

import copy
import difflib
import json
import reprlib
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from agents.cli import ConfigError
from agents.section import Section

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80
AnyConfig = TypeVar("AnyConfig", bound=Section)


def load(kind: type[AnyConfig], path: str | Path, overrides: Sequence[str] = ()) -> AnyConfig:
    """Returns the config in a TOML file (or a run's config.json), with overrides `a.b=value` whose values are written
    as in TOML. Raises ConfigError when the file or a setting is invalid."""
    settings = read_settings(Path(path))
    for override in overrides:
        merge(settings, parse_override(override))
    return validate(kind, settings, source=str(path))


def read_settings(path: Path) -> dict[str, Any]:
    """Returns the settings in a TOML or JSON file, unchecked. Raises ConfigError when it cannot be read."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.toml")], n=1)
        hint = f" Did you mean {path.with_name(near[0])}?" if near else " Give the path of a TOML file."
        raise ConfigError(f"no config at {path}.{hint}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is no text. Give the path of a TOML file.") from None
    try:
        settings = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # a syntax error, or a number with thousands of digits
        raise ConfigError(f"{path} cannot be read: {error}. Mend that place.") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"{path} holds no settings, but {_SHORT.repr(settings)}. Give a TOML file, or a run's own.")
    return settings


def dump(config: Section) -> str:
    """Returns the config as JSON. `load` reads it back as an equal config."""
    return config.model_dump_json(indent=2) + "\n"


def parse_override(text: str) -> dict[str, Any]:
    """Returns `a.b=value` as nested settings. A value that is not valid TOML is taken as a string."""
    key, equals, value = text.partition("=")
    if not equals or not key or any(not part for part in key.split(".")):
        raise ConfigError(f"'{text}' is no override; write it as section.key=value, for example train.updates=100.")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except (ValueError, RecursionError):  # not TOML, or a number with thousands of digits
        parsed = value
    for part in reversed(key.split(".")):
        parsed = {part: parsed}
    return parsed


def merge(settings: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Updates `settings` in place with those of `other`, section by section, and returns it."""
    for key, value in other.items():
        if isinstance(value, dict) and isinstance(settings.get(key), dict):
            merge(settings[key], value)
        else:
            settings[key] = copy.deepcopy(value)
    return settings


def validate(kind: type[AnyConfig], settings: dict[str, Any], *, source: str) -> AnyConfig:
    """Returns the validated config. Raises ConfigError with the first three errors in one message, each with its place
    and, for unknown keys, the nearest known name."""
    try:
        return kind.model_validate(settings)
    except ValidationError as error:
        found = []
        # Unknown keys first: a missing key is often present under a misspelt name.
        problems = sorted(error.errors(include_url=False), key=lambda problem: problem["type"] != "extra_forbidden")
        for problem in problems[:3]:
            place = ".".join(
                str(part) for part in problem["loc"] if not str(part).startswith(("function-", "literal["))
            )
            if problem["type"] == "extra_forbidden":
                known = _keys(kind, problem["loc"][:-1])
                near = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1)
                hint = f"did you mean '{near[0]}'?" if near else f"known here: {', '.join(known)}"
                found.append(f"unknown key '{place}'; {hint}")
            elif problem["type"] == "missing":
                found.append(f"'{place}' is missing; add it")
            elif problem["type"] == "value_error":
                found.append(f"{place}: {problem['ctx']['error']}" if place else str(problem["ctx"]["error"]))
            else:
                found.append(f"'{place}': {problem['msg']}; got {_SHORT.repr(problem['input'])}")
        text = "; ".join(dict.fromkeys(found))
        raise ConfigError(f"{source}: {text}{'' if text.endswith('?') else '.'}") from None


def _keys(kind: type[Section], path: tuple) -> list[str]:
    """Returns the known keys of the section at `path`."""
    for part in path:
        annotation = kind.model_fields[part].annotation if part in kind.model_fields else None
        options = getattr(annotation, "__args__", (annotation,))
        kind = next((option for option in options if isinstance(option, type) and issubclass(option, Section)), kind)
    return sorted(kind.model_fields)
