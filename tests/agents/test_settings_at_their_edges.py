"""Every setting at its edges: a config holds a value that can mean something, or is refused in one line."""

import json
import typing
from types import UnionType

import pytest

from agents.cli import ConfigError
from agents.config import Config, SweepConfig, validate
from agents.recall import RecallConfig
from agents.section import Section

DATA = {"tasks": ["walker-walk"], "episodes": "e", "stores": ["s.h5"], "collect": {"policy": "p", "episodes": 1}}
SETTINGS = {
    Config: {"name": "a", "data": DATA, "agent": {"kind": "bc"}},
    SweepConfig: {"name": "a", "shared": {}, "runs": {"b": {}}},
    RecallConfig: {"name": "a"},
}
ZERO = (  # where nothing, or none, or the first is a choice
    "seed",
    "data.collect.seed",
    "data.held_out",
    "chain.target",
    "chain.grow_until",
    "grow_until",
    "agent.loss_elsewhere",
    "model.rope_fraction",
    "attention.sparse.offset",
    "optimizer.warmup",
    "optimizer.weight_decay",
    "optimizer.beta2",
    "train.keep_best",
    "train.workers",
    "evaluate.target",
    "evaluate.seed",
    "evaluate.contexts",
    "evaluate.seen",
    "seeds",
)
NEGATIVE = ("chain.target", "evaluate.target")  # returns
NO_SETTINGS = (float("nan"), float("inf"), -float("inf"), 1e300, 10**400)
NO_NAMES = ("", " ", "a\nb", "\0", "a\x1b[31m")
NO_FOLDERS = ("/tmp/a", "..", "a/../b", "./a", "a/", "a//b", "../../etc")


def kinds_in(annotation: object) -> set[type]:
    """Returns the types that a setting may have, with those in lists."""
    if typing.get_origin(annotation) is typing.Annotated:
        return kinds_in(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, UnionType, list):
        return set().union(*map(kinds_in, typing.get_args(annotation)))
    return {annotation} if isinstance(annotation, type) else set()


def settings_of(kind: type[Section], prefix: str = "") -> list[tuple[str, set[type], bool]]:
    """Returns every setting of a config by its dotted name, with its types, and whether it is a list of them."""
    found = []
    for name, field in kind.model_fields.items():
        kinds = kinds_in(field.annotation)
        sections = [one for one in kinds if issubclass(one, Section)]
        if sections:
            found += settings_of(sections[0], f"{prefix}{name}.")
        else:
            found.append((prefix + name, kinds, typing.get_origin(field.annotation) is list))
    return found


def given(kind: type[Section], name: str, value: object) -> Section:
    settings = json.loads(json.dumps(SETTINGS[kind]))
    if name.startswith("attention.sparse"):
        settings["attention"] = {"scheme": "sparse"}
    place, *path = settings, *name.split(".")
    if path[0] == "agent" and len(path) == 3:  # of one kind alone
        settings["agent"]["kind"] = path[1]
    for part in path[:-1]:
        place = place.setdefault(part, {})
    place[path[-1]] = value
    return validate(kind, settings, source="x.toml")


def refused(kind: type[Section], name: str, value: object) -> str:
    with pytest.raises(ConfigError) as caught:
        given(kind, name, value)
    message = str(caught.value)
    assert "\n" not in message
    assert name in message
    assert len(message) < 400
    return message


NUMBERS = [
    pytest.param(kind, name, kinds, is_list, id=f"{kind.__name__}.{name}")
    for kind in SETTINGS
    for name, kinds, is_list in settings_of(kind)
    if kinds & {int, float}
]
TEXTS = [
    pytest.param(kind, name, is_list, id=f"{kind.__name__}.{name}")
    for kind in SETTINGS
    for name, kinds, is_list in settings_of(kind)
    if str in kinds and name not in ("series", "title")
]


@pytest.mark.parametrize(("kind", "name", "kinds", "is_list"), NUMBERS)
def test_numbers(kind, name, kinds, is_list):
    for value in NO_SETTINGS:
        refused(kind, name, [value] if is_list else value)
    for value in ("1", True, {}, [[]] if is_list else [1], None if is_list else ""):
        refused(kind, name, [value] if is_list and value is not None else value)
    if float not in kinds:
        refused(kind, name, [0.5] if is_list else 0.5)
        refused(kind, name, [2**63] if is_list else 2**63)
    for value, allowed in ((0, ZERO), (-1, NEGATIVE)):
        if name in allowed:
            given(kind, name, [value] if is_list else value)
        else:
            refused(kind, name, [value] if is_list else value)
    if is_list and name not in ("chain.grow", "grow", "evaluate.met", "evaluate.lines"):
        refused(kind, name, [])


@pytest.mark.parametrize(("kind", "name", "is_list"), TEXTS)
def test_texts(kind, name, is_list):
    for value in (*NO_NAMES, *(NO_FOLDERS if name == "name" else ())):
        refused(kind, name, [value] if is_list else value)
    refused(kind, name, [1] if is_list else 1)
    if is_list:
        refused(kind, name, [])


def test_every_setting_is_walked():
    names = {name for name, _, _ in settings_of(Config)}
    assert {"mesh.ring", "evaluate.mesh.ring", "data.collect.workers", "attention.sparse.block", "chain.grow"} <= names
    assert len(names) > 70
