"""What belongs to the identity of a run and of a result: the one place that knows. docs/identity.md has it as a table.

A run is what it learnt: its settings and the content of its stores. A result is the run it played, and the settings of
its evaluation. Every setting belongs to both unless it is listed here as one that changes neither, so a setting that
nobody thought of counts. Two things that differ in their identity are never continued, averaged or drawn as one.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from agents.cli import ConfigError
from agents.config import Config, Section, validate
from agents.config_file import AnyConfig
from data import TrajectoryStore

Settings = dict[str, Any]  # by dotted name, sections unfolded
Stores = Mapping[str, Mapping[str, Any]]  # by task: where its store stood, what was in it

# What any run may change on the way. The same sums are taken, at most in another order.
FREE = (
    "name",
    "series",
    "mesh.*",
    "wandb.*",
    # The content hash of the stores says what was in them, wherever they stand and however they were made.
    "data.episodes",
    "data.stores",
    "data.collect.workers",
    # "sparse" computes something else, and then there is an attention.sparse, which counts.
    "attention.scheme",
    "attention.kernel",
    "attention.block_q",
    "attention.block_k",
    "model.fsdp",
    "model.remat",
    "model.feed_forward_tile",
    "train.accumulate",
    "train.updates",  # what that means for a run is kept in its checkpoints: `lengthened`
    "train.log_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.keep_best",
    "train.prefetch",
    "train.workers",
)
# What a result records that its config does not say: what it means where it is missing.
UNRECORDED = {"train.updates": "one total", "data.stores": "not recorded"}
# What an evaluation may change besides: which episodes it plays, each with the numbers that it has alone.
FREE_OF_A_RESULT = (
    *FREE,
    "data.collect.*",
    "seed",  # of training: a field of its own, over which is averaged
    "evaluate.mesh.*",
    "evaluate.contexts",
    "evaluate.groups",
    "evaluate.episodes",
    "evaluate.modes",
    "evaluate.self_episodes",
    "evaluate.foreign",
    "evaluate.places",
    "evaluate.met",
    "evaluate.seen",
    "evaluate.memory_gib",
)
FREE_OF_A_RUN = (*FREE, "evaluate.*")
# What an evaluation may say otherwise than its run: how the agent acts. The rest says what it has learnt.
FREE_OF_ACTING = (
    *FREE_OF_A_RUN,
    "data.tasks",
    "data.collect.*",
    "chain.sort",
    "agent.window",
    "attention.*",
    "model.*",
)
NAMES = ("name", "series")  # of all results of a run


def flat(settings: Mapping[str, Any], prefix: str = "") -> Settings:
    """Returns nested settings by dotted name."""
    found: Settings = {}
    for key, value in settings.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return found


def is_free(name: str, free: Iterable[str]) -> bool:
    """Whether a setting is among `free`, where "a.*" means a whole section."""
    return any(name == one.removesuffix(".*") or (one[-1] == "*" and name.startswith(one[:-1])) for one in free)


def run_settings(config: Section) -> Settings:
    """Returns the settings that belong to a run."""
    return _without(flat(config.model_dump(mode="json")), FREE_OF_A_RUN)


def differing_runs(before: Section, now: Section) -> list[str]:
    """Returns, in words, the settings that belong to a run and are not the same. How the data is collected is compared
    where both say it."""
    was, own = run_settings(before), run_settings(now)
    recipe = {name for name in was.keys() | own.keys() if name.startswith("data.collect")}
    compared = recipe if not recipe & was.keys() & own.keys() else set()
    return differing(*(_without(settings, compared) for settings in (was, own)))


def result_settings(config: Config, stores: Stores, updates: Sequence[int]) -> Settings:
    """Returns what a result was made with: settings, the tasks and the content of the stores that its run learnt from,
    and the totals of `updates` that the run was trained towards, where there was more than one (`lengthened`)."""
    settings = _without(flat(config.model_dump(mode="json")), FREE_OF_A_RESULT)
    if stores:  # a run of an older version does not know them
        settings["data.tasks"] = list(stores)
        settings["data.stores"] = [short(str(store["content_hash"])) for store in stores.values()]
    return settings | ({"train.updates": list(updates)} if len(updates) > 1 else {})


def check_trained(owner: Path, trained: Mapping[str, Any], learnt: Iterable[str], config: Config) -> None:
    """ConfigError when an evaluation asks for another task than those that its run has `learnt`, or says otherwise
    what was learnt, such as from which episodes, with which seed or learning rate."""
    other = [task for task in config.data.tasks if task not in learnt]
    if other:
        raise ConfigError(f"{owner} learnt {', '.join(learnt)}, not {', '.join(other)}. Change data.tasks.")
    now = flat(config.model_dump(mode="json"))
    was = defaults(Config) | flat(trained) if trained else now
    changed = differing(*(_without(one, FREE_OF_ACTING) for one in (was, now)))
    if changed:
        raise ConfigError(
            f"{owner} was trained with other settings: {', '.join(changed[:4])}. Leave them as they were: they say "
            "what the agent has learnt."
        )


def check_config(owner: Path, trained: Mapping[str, Any], now: AnyConfig) -> None:
    """ConfigError when the config.json of a run, `own`, does not say what its checkpoint was `trained` with, which
    checkpoints of an older version do not know: its results would be of other settings than they say."""
    if not trained:
        return
    was = validate(type(now), dict(trained), source=f"the settings kept in {owner / 'checkpoints'}")
    changed = differing_runs(was, now)
    if changed:
        raise ConfigError(
            f"{owner / 'config.json'} does not say what the run was trained with: {', '.join(changed[:4])}. Put that "
            "back; what an evaluation changes stands on its command line."
        )


def check_overrides(owner: Path, overrides: Sequence[str]) -> None:
    """ConfigError when an evaluation would give the results of a run another name or series than those before."""
    named = [text for text in overrides if text.partition("=")[0] in NAMES]
    if named:
        raise ConfigError(
            f"{' and '.join(named)} cannot be changed to evaluate {owner}: its results would be split over several "
            "names. Leave it out."
        )


def differing(before: Settings, now: Settings) -> list[str]:
    """Returns, in words, the settings that are not the same."""
    return [
        f"{name}={_written(now.get(name))} (was {_written(before.get(name))})"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]


def settings_id(settings: Settings) -> str:
    """Returns eight hex digits that are the same for equal settings.

    What is off (None, False) does not count, so a later version may add what is off by default.
    """
    on = {name: value for name, value in settings.items() if value is not None and value is not False}
    return hashlib.sha256(json.dumps(on, sort_keys=True).encode()).hexdigest()[:8]


def notable(settings: Settings) -> Settings:
    """Returns the settings that are not the default."""
    known = defaults(Config)
    return {name: value for name, value in settings.items() if name not in known or known[name] != value}


def defaults(kind: type[Section]) -> Settings:
    """Returns the default of every setting that has one, by dotted name."""
    found: Settings = {}
    for name, field in kind.model_fields.items():
        if not field.is_required():
            value = field.get_default(call_default_factory=True)
            found |= flat({name: value.model_dump(mode="json") if isinstance(value, Section) else value})
        elif isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            found |= {f"{name}.{key}": value for key, value in defaults(field.annotation).items()}
    return found


def differences(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Returns, by id, in words what tells these (notable) settings apart; nothing where there is one."""
    if len(settings) == 1:
        return dict.fromkeys(settings, "")
    known, names = defaults(Config) | UNRECORDED, {name for one in settings.values() for name in one}

    def value(one: Mapping[str, Any], name: str) -> str:
        return _written(one.get(name, known.get(name)))

    telling = sorted(name for name in names if len({value(one, name) for one in settings.values()}) > 1)
    told = {key: ", ".join(f"{name}={value(one, name)}" for name in telling) for key, one in settings.items()}
    told |= {key: "settings not recorded" for key in settings if not key}
    twice = {key for key in settings if list(told.values()).count(told[key]) > 1}  # defaults of another version
    return {key: f"{told[key]}, settings {key}".removeprefix(", ") if key in twice else told[key] for key in settings}


def short(content_hash: str) -> str:
    """Returns the beginning of a hash, enough for people."""
    return content_hash[:12]


def lengthened(totals: Sequence[int], config: Config) -> list[int]:
    """Returns the totals that a run was trained towards, now that it is `config.train.updates`.

    A learning rate that decays and chains that grow depend on the total, so a run of 1,000 updates lengthened to 2,000
    is no run of 2,000 from the start, and remembers both. A constant rate on chains of one length just goes on.
    """
    depends = config.optimizer.schedule != "constant" or bool(config.chain.grow)
    updates = config.train.updates
    return [*totals, updates] if depends and updates not in totals[-1:] else [*totals[:-1], updates]


def check_total(owner: Path, done: int, updates: int) -> None:
    """ConfigError when a run has gone further than it is asked to."""
    if done > updates:
        raise ConfigError(
            f"{owner} has {done} updates already, more than train.updates={updates}. Ask for more, or choose another "
            "name."
        )


def records(stores: Sequence[TrajectoryStore]) -> dict[str, dict[str, Any]]:
    """Returns what a run keeps of its stores, by task."""
    return {
        store.task: {
            "path": str(store.path.absolute()),
            "content_hash": store.content_hash,
            "episodes": store.episodes,
        }
        for store in stores
    }


def check_stores(owner: Path, kept: Stores, stores: Sequence[TrajectoryStore]) -> None:
    """ConfigError, naming both, when a run goes on with another store than it learnt from."""
    for store in stores:
        was, now = kept.get(store.task), records([store])[store.task]
        if was is None or was["content_hash"] == now["content_hash"]:
            continue
        raise ConfigError(
            f"{owner} learnt {store.task} from another store: {_named(was)}; data.stores now means {_named(now)}. "
            f"Name the one it learnt from, data.stores=['...'], or train a new run on this one, name=..."
        )


def _named(record: Mapping[str, Any]) -> str:
    return f"{record['path']} (content {short(record['content_hash'])}, {record['episodes']} episodes)"


def _without(settings: Settings, free: Iterable[str]) -> Settings:
    return {name: value for name, value in settings.items() if not is_free(name, free)}


def _written(value: object) -> str:
    return "none" if value is None else value if isinstance(value, str) else json.dumps(value)
