"""Identity: what each setting belongs to, and that the table of docs/identity.md says the same."""

import re
from pathlib import Path

import pytest

from agents.agent_config import VALUE_KINDS
from agents.config import Config, validate
from agents.identity import (
    FREE,
    FREE_OF_A_RESULT,
    OVERRIDABLE_WHEN_ACTING,
    defaults,
    differences,
    differing_runs,
    flatten,
    is_free,
    non_default,
    result_settings,
    run_settings,
    settings_id,
    update_totals,
)
from agents.section import Section

TABLE = (Path(__file__).parents[2] / "docs" / "identity.md").read_text()
PLAIN = {
    "name": "a",
    "data": {"tasks": ["point_mass-dark"], "episodes": "e", "stores": ["s.h5"]},
    "agent": {"kind": "agentic_transformer"},
}
STORES = {"point_mass-dark": {"path": "/s.h5", "content_hash": "0123456789abcdef", "episodes": 9}}

KNOWN = {"agentic_transformer": "8038eeb3", "recurrent": "b245d0b7", "bc": "92eaf599", "td3": "6a9d7a38"}


def made(**sections) -> Config:
    settings = {key: dict(value) if isinstance(value, dict) else value for key, value in PLAIN.items()}
    for name, value in sections.items():
        settings[name] = settings.get(name, {}) | value if isinstance(value, dict) else value
    return validate(Config, settings, source="test")


def names(kind: type[Section] = Config, prefix: str = "") -> list[str]:
    """Every setting there is, by dotted name."""
    found = []
    for name, field in kind.model_fields.items():
        options = [field.annotation, *getattr(field.annotation, "__args__", ())]
        sections = [one for one in options if isinstance(one, type) and issubclass(one, Section)]
        found += names(sections[0], f"{prefix}{name}.") if sections else [prefix + name]
    return found


def test_every_setting_counts_unless_it_is_listed_as_free():
    """A setting that somebody adds is in neither list, and so belongs to the run and to the result."""
    every = names()
    assert len(every) > 60
    run, result = run_settings(made()), result_settings(made(), {}, [])
    for name in every:
        if name.startswith(("attention.sparse.", "data.collect.", *(f"agent.{kind}." for kind in VALUE_KINDS))):
            continue  # sections that are off here
        assert (name in run) == (not is_free(name, FREE) and not name.startswith("evaluate.")), name
        assert (name in result) == (not is_free(name, FREE_OF_A_RESULT)), name


@pytest.mark.parametrize("pattern", FREE_OF_A_RESULT)
def test_every_free_setting_exists_and_stands_in_the_table(pattern):
    assert any(is_free(name, [pattern]) for name in names()), f"{pattern} names no setting"
    assert f"`{pattern}`" in TABLE


@pytest.mark.parametrize("pattern", OVERRIDABLE_WHEN_ACTING)
def test_what_acting_may_change_exists_and_stands_in_the_table(pattern):
    assert any(is_free(name, [pattern]) for name in names()), f"{pattern} names no setting"
    assert f"`{pattern}`" in TABLE


def test_the_table_lists_no_other_free_setting():
    free = TABLE.split("<!-- free -->")[1]
    named = set(re.findall(r"`([a-z_.*0-9]+)`", free))
    assert named == set(FREE_OF_A_RESULT) | {"evaluate.*"}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model": {"width": 64}}, ["model.width=64 (was 128)"]),
        ({"agent": {"window": 5}}, ["agent.window=5 (was none)"]),
        (
            {"attention": {"scheme": "sparse", "sparse": {}}},
            [
                f"attention.sparse.{name}={n} (was none)"
                for name, n in (("block", 64), ("local_blocks", 16), ("offset", 0), ("stride", 8))
            ],
        ),
        ({"optimizer": {"schedule": "constant"}}, ["optimizer.schedule=constant (was cosine)"]),
        ({"data": {"held_out": 0.5}}, ["data.held_out=0.5 (was 0.1)"]),
        ({"seed": 1}, ["seed=1 (was 0)"]),
        ({"mesh": {"ring": 2, "data": 2}, "train": {"updates": 9, "log_every": 2, "prefetch": 1, "workers": 3}}, []),
        ({"attention": {"scheme": "blockwise", "kernel": "auto"}, "model": {"remat": "all", "fsdp": True}}, []),
        ({"wandb": {"mode": "offline"}, "evaluate": {"seed": 4, "sample": False}, "name": "b", "series": "s"}, []),
        ({"data": {"stores": ["t.h5"], "collect": {"policy": "waypoints", "episodes": 3}}}, []),
    ],
    ids=str,
)
def test_what_differs_between_two_runs(changes, told):
    """Either way round: what is set and what is taken away."""
    assert differing_runs(made(), made(**changes)) == told
    assert len(differing_runs(made(**changes), made())) == len(told)


def test_how_data_is_collected_counts_where_both_say_it():
    recipe = {"policy": "waypoints", "episodes": 3, "workers": 1}
    few = made(data={"collect": recipe})
    assert differing_runs(few, made(data={"collect": {**recipe, "workers": 2}})) == []
    assert differing_runs(few, made(data={"collect": {**recipe, "episodes": 4}})) == ["data.collect.episodes=4 (was 3)"]


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"evaluate": {"contexts": [0], "groups": 99, "mesh": {"ring": 2}, "foreign": True}}, True),
        ({"mesh": {"ring": 2}, "seed": 3, "name": "b"}, True),
        ({"evaluate": {"target": 3.0}}, False),
        ({"evaluate": {"sample": False}}, False),
        ({"evaluate": {"seed": 1}}, False),
        ({"evaluate": {"checkpoint": "best"}}, False),
        ({"chain": {"sort": "random"}}, False),
        ({"model": {"width": 64}}, False),
    ],
    ids=str,
)
def test_what_a_result_was_made_with(changes, same):
    plain = result_settings(made(), STORES, [10])
    other = result_settings(made(**changes), STORES, [10])
    assert (settings_id(plain) == settings_id(other)) == same
    if not same:
        told = differences({"a": non_default(plain), "b": non_default(other)})
        (section, ((key, _),)), *_ = ((name, tuple(value.items())) for name, value in changes.items())
        assert told["b"].startswith(f"{section}.{key}=")
        assert told["a"] != told["b"]


def test_another_store_and_a_lengthened_run_are_other_results():
    plain = settings_id(result_settings(made(), STORES, [10]))
    other = {"point_mass-dark": STORES["point_mass-dark"] | {"content_hash": "f" * 64}}
    moved = {"point_mass-dark": STORES["point_mass-dark"] | {"path": "/elsewhere.h5"}}
    assert settings_id(result_settings(made(), other, [10])) != plain
    assert settings_id(result_settings(made(), moved, [10])) == plain
    assert settings_id(result_settings(made(), STORES, [10, 20])) != plain


def test_what_is_off_by_default_may_be_added_later():
    settings = result_settings(made(), STORES, [10])
    assert settings_id(settings | {"agent.new": None, "train.new": False}) == settings_id(settings)
    assert settings_id(settings | {"agent.new": 0}) != settings_id(settings)


@pytest.mark.parametrize(("kind", "known"), KNOWN.items())
def test_results_of_before_are_known_again(kind, known):
    """A setting with another default than None or False gives every result a new id, and each is made again: let its
    default be None. Where results really differ from those of before, write the new id down here."""
    task = "walker-walk" if kind in VALUE_KINDS else "point_mass-dark"
    config = made(agent={"kind": kind}, data={"tasks": [task]})
    assert settings_id(result_settings(config, STORES, [10])) == known


def test_notable_settings_are_those_that_are_no_default():
    settings = non_default(result_settings(made(evaluate={"target": 3.0}), STORES, [10]))
    assert settings == {
        "agent.kind": "agentic_transformer",
        "data.tasks": ["point_mass-dark"],
        "data.stores": ["0123456789ab"],
        "evaluate.target": 3.0,
    }
    known = defaults(Config)
    assert {name: value for name, value in flatten(made().model_dump(mode="json")).items() if name in known} == known


def test_what_more_updates_mean():
    cosine, constant = made(train={"updates": 20}), made(train={"updates": 20}, optimizer={"schedule": "constant"})
    growing = made(train={"updates": 20}, optimizer={"schedule": "constant"}, chain={"trajectories": 4, "grow": [2]})
    for config in (cosine, constant, growing):
        assert update_totals([], config) == update_totals([20], config) == [20]
    assert update_totals([10], cosine) == update_totals([10], growing) == [10, 20]
    assert update_totals([10], constant) == [20]
    assert update_totals([5, 10], cosine) == [5, 10, 20]


def test_differences_do_not_take_what_was_not_recorded_for_the_default():
    once, twice, unknown = (result_settings(made(), *of) for of in ((STORES, [4]), (STORES, [4, 6]), ({}, [4])))
    told = differences({key: non_default(one) for key, one in zip("abc", (once, twice, unknown), strict=True)})
    store = 'data.stores=["0123456789ab"], train.updates='
    assert told == {
        "a": f"{store}one total",
        "b": f"{store}[4, 6]",
        "c": "data.stores=not recorded, train.updates=one total",
    }


def test_differences_of_settings_that_say_nothing_are_their_ids():
    assert differences({"a": {}}) == {"a": ""}
    assert differences({"": {}, "a": {}}) == {"": "settings not recorded", "a": ""}
    assert differences({"a": {}, "b": {}}) == {"a": "settings a", "b": "settings b"}
