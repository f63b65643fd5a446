"""The settings that identify a run and a result (docs/identity.md has them as a table).

A run is identified by its settings and the content of its stores; a result by its run and the settings of its
evaluation. Every setting counts for both unless it is listed here as free, so a new setting counts by default. A run
is never continued under another identity, and results of different identities are never averaged or drawn as one.
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

Settings = dict[str, Any]  # flat, by dotted name
Stores = Mapping[str, Mapping[str, Any]]  # `records` by task: path and content of the store

# Settings that a run may change when it is continued. Except train.updates, they change results by rounding at most.
FREE = (
    "name",
    "series",
    "mesh.*",
    "wandb.*",
    # Stores are identified by their content hash, wherever they are and however they were made.
    "data.episodes",
    "data.stores",
    "data.collect.workers",
    # Scheme "sparse" computes something else, but then attention.sparse is set, which counts.
    "attention.scheme",
    "attention.kernel",
    "attention.block_q",
    "attention.block_k",
    "model.fsdp",
    "model.remat",
    "model.feed_forward_tile",
    "train.accumulate",
    "train.updates",  # the totals of a run are kept in its checkpoints: `update_totals`
    "train.log_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.keep_best",
    "train.prefetch",
    "train.workers",
)
# Settings that a result records in addition to its config, with the text shown where they are missing.
UNRECORDED = {"train.updates": "one total", "data.stores": "not recorded"}
# Further settings that do not identify a result: they choose which episodes are played, and results record them.
FREE_OF_A_RESULT = (
    *FREE,
    "data.collect.*",
    "seed",  # of training: a separate field of results, over which they are averaged
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
# Settings that an evaluation may override, because they concern how the agent acts. The others define the training.
OVERRIDABLE_WHEN_ACTING = (
    *FREE_OF_A_RUN,
    "data.tasks",
    "data.collect.*",
    "chain.sort",
    "agent.window",
    "attention.*",
    "model.*",
)
NAMES = ("name", "series")  # the same in all results of a run


def flatten(settings: Mapping[str, Any], prefix: str = "") -> Settings:
    """Returns nested settings as a flat dict, by dotted name."""
    found: Settings = {}
    for key, value in settings.items():
        found |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return found


def is_free(name: str, free: Iterable[str]) -> bool:
    """Whether a setting is in `free`, where "a.*" stands for a whole section."""
    return any(name == one.removesuffix(".*") or (one[-1] == "*" and name.startswith(one[:-1])) for one in free)


def run_settings(config: Section) -> Settings:
    """Returns the settings that identify a run."""
    return _without(flatten(config.model_dump(mode="json")), FREE_OF_A_RUN)


def differing_runs(before: Section, now: Section) -> list[str]:
    """Returns a description of each setting that identifies a run and differs. Settings of data.collect are compared
    only if both configs have them."""
    was, own = run_settings(before), run_settings(now)
    recipe = {name for name in was.keys() | own.keys() if name.startswith("data.collect")}
    compared = recipe if not recipe & was.keys() & own.keys() else set()
    return describe_changes(*(_without(settings, compared) for settings in (was, own)))


def result_settings(config: Config, stores: Stores, updates: Sequence[int]) -> Settings:
    """Returns the settings that identify a result. They include the tasks and the content hashes of the stores that its
    run was trained on, and the values of train.updates (`updates`) if there was more than one (`update_totals`)."""
    settings = _without(flatten(config.model_dump(mode="json")), FREE_OF_A_RESULT)
    if stores:  # runs of older versions did not record them
        settings["data.tasks"] = list(stores)
        settings["data.stores"] = [short(str(store["content_hash"])) for store in stores.values()]
    return settings | ({"train.updates": list(updates)} if len(updates) > 1 else {})


def check_trained(owner: Path, trained: Mapping[str, Any], learnt: Iterable[str], config: Config) -> None:
    """Raises ConfigError when an evaluation names a task that its run was not trained on (`learnt`), or changes a
    setting of training, such as the seed or the learning rate. trained: the settings kept in the checkpoint."""
    other = [task for task in config.data.tasks if task not in learnt]
    if other:
        raise ConfigError(f"{owner} learnt {', '.join(learnt)}, not {', '.join(other)}. Change data.tasks.")
    now = flatten(config.model_dump(mode="json"))
    was = defaults(Config) | flatten(trained) if trained else now
    changed = describe_changes(*(_without(one, OVERRIDABLE_WHEN_ACTING) for one in (was, now)))
    if changed:
        raise ConfigError(
            f"{owner} was trained with other settings: {', '.join(changed[:4])}. Leave them as they were: they say "
            "what the agent has learnt."
        )


def check_config(owner: Path, trained: Mapping[str, Any], now: AnyConfig) -> None:
    """Raises ConfigError when the config.json of a run (`now`) differs from the settings that its checkpoint was
    trained with (`trained`; empty in older versions): its results would be recorded under wrong settings."""
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
    """Raises ConfigError when an evaluation overrides the name or the series of its run."""
    named = [text for text in overrides if text.partition("=")[0] in NAMES]
    if named:
        raise ConfigError(
            f"{' and '.join(named)} cannot be changed to evaluate {owner}: its results would be split over several "
            "names. Leave it out."
        )


def describe_changes(before: Settings, now: Settings) -> list[str]:
    """Returns a description of each setting that differs, such as "seed=1 (was 0)"."""
    return [
        f"{name}={_written(now.get(name))} (was {_written(before.get(name))})"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]


def settings_id(settings: Settings) -> str:
    """Returns a hash of the settings, 8 hex digits.

    Settings that are None or False are left out, so that later versions may add settings that are off by default.
    """
    on = {name: value for name, value in settings.items() if value is not None and value is not False}
    return hashlib.sha256(json.dumps(on, sort_keys=True).encode()).hexdigest()[:8]


def non_default(settings: Settings) -> Settings:
    """Returns the settings that differ from their default."""
    known = defaults(Config)
    return {name: value for name, value in settings.items() if name not in known or known[name] != value}


def defaults(kind: type[Section]) -> Settings:
    """Returns the default of every setting that has one, by dotted name."""
    found: Settings = {}
    for name, field in kind.model_fields.items():
        if not field.is_required():
            value = field.get_default(call_default_factory=True)
            found |= flatten({name: value.model_dump(mode="json") if isinstance(value, Section) else value})
        elif isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            found |= {f"{name}.{key}": value for key, value in defaults(field.annotation).items()}
    return found


def differences(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Returns, by settings_id, a description of what distinguishes these `non_default` settings; empty for one."""
    if len(settings) == 1:
        return dict.fromkeys(settings, "")
    known, names = defaults(Config) | UNRECORDED, {name for one in settings.values() for name in one}

    def value(one: Mapping[str, Any], name: str) -> str:
        return _written(one.get(name, known.get(name)))

    telling = sorted(name for name in names if len({value(one, name) for one in settings.values()}) > 1)
    told = {key: ", ".join(f"{name}={value(one, name)}" for name in telling) for key, one in settings.items()}
    told |= {key: "settings not recorded" for key in settings if not key}
    twice = {key for key in settings if list(told.values()).count(told[key]) > 1}  # other defaults
    return {key: f"{told[key]}, settings {key}".removeprefix(", ") if key in twice else told[key] for key in settings}


def short(content_hash: str) -> str:
    """Returns the first 12 digits of a hash, for messages."""
    return content_hash[:12]


def update_totals(totals: Sequence[int], config: Config) -> list[int]:
    """Returns the values of train.updates that a run was trained with: `totals`, and now `config.train.updates`.

    A decaying learning rate and growing chains depend on the total. A run of 1,000 updates that is lengthened to 2,000
    therefore differs from a run of 2,000, and keeps both totals. With a constant rate and chains of one length, only
    the last total is kept.
    """
    depends = config.optimizer.schedule != "constant" or bool(config.chain.grow)
    updates = config.train.updates
    return [*totals, updates] if depends and updates not in totals[-1:] else [*totals[:-1], updates]


def check_total(owner: Path, done: int, updates: int) -> None:
    """Raises ConfigError when a run has more updates already (`done`) than `train.updates`."""
    if done > updates:
        raise ConfigError(
            f"{owner} has {done} updates already, more than train.updates={updates}. Ask for more, or choose another "
            "name."
        )


def records(stores: Sequence[TrajectoryStore]) -> dict[str, dict[str, Any]]:
    """Returns the record of each store that checkpoints keep, by task: path, content hash and number of episodes."""
    return {
        store.task: {
            "path": str(store.path.absolute()),
            "content_hash": store.content_hash,
            "episodes": store.episodes,
        }
        for store in stores
    }


def check_stores(owner: Path, kept: Stores, stores: Sequence[TrajectoryStore]) -> None:
    """Raises ConfigError when a store differs in content from the one that the run was trained on (`kept`)."""
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
