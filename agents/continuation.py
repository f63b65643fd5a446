"""Continuing a run: the checks, and the metadata that a run keeps from its start (docs/identity.md)."""

import json
from pathlib import Path

import jax

from agents.checkpoint import Checkpoints, Meta
from agents.cli import ConfigError, Diverged
from agents.config import Config, load, validate
from agents.config_file import read_settings
from agents.identity import differing_runs, update_totals
from agents.results import merged, say_note
from data.atomic_file import write_text

DIVERGED = "diverged.json"  # in the folder of a run that diverged
SWEPT = ("sweep.json", "report.html")  # in the folder of a sweep


def check_folder(folder: Path, config: Config, *, resume: bool) -> bool:
    """Returns whether the folder holds a diverged run with other settings, which must be moved away (`set_aside`).

    Raises ConfigError when the folder holds another run or a sweep, or, without `resume`, this run already.
    """
    if any((folder / name).exists() for name in SWEPT):
        raise ConfigError(f"{folder} holds the results of a sweep. Choose another name for the run, name=...")
    if not (folder / "config.json").exists():
        if has_checkpoints(folder) and not resume:
            raise ConfigError(
                f"{folder} already holds checkpoints of a run, without its config.json. Add --resume to continue it, "
                "choose another with name=..., or delete the folder."
            )
        return False
    check_command(folder, "agents.train")
    changed = differing_settings(folder, config)
    if changed and (folder / DIVERGED).exists():
        return True
    if not resume and (folder / DIVERGED).exists():
        raise ConfigError(
            f"{folder} holds a run with these settings, which diverged. Lower optimizer.learning_rate or raise "
            "optimizer.warmup to start over, or add --resume to try again from its last checkpoint."
        )
    if not resume:
        raise ConfigError(
            f"{folder} already holds a run. Add --resume to continue it, choose another with name=..., "
            "or delete the folder."
        )
    _refuse(folder, changed)
    return False


def check_command(folder: Path, command: str) -> None:
    """Raises ConfigError when the run in a folder was trained by another command."""
    settings = read_settings(folder / "config.json")
    other = next((by for setting, by in _TRAINED_BY.items() if setting in settings and by != command), None)
    if other is not None:
        raise ConfigError(f"{folder} is a run of {other}, not of {command}. Choose another run, or another name.")


_TRAINED_BY = {"lines": "agents.recall", "agent": "agents.train"}  # by a setting that only this command has


def check_trained_so_far(folder: Path, before: Meta | None, config: Config) -> None:
    """Raises ConfigError when the newest checkpoint of a run (`before`) was trained with settings other than `config`,
    whatever the run's config.json says."""
    if before is None:
        return
    if before.config:
        trained = validate(Config, before.config, source=f"the settings kept in {folder / 'checkpoints'}")
        _refuse(folder, differing_runs(trained, config))
    elif not (folder / "config.json").exists():  # checkpoints of older versions hold no settings
        raise ConfigError(
            f"{folder} has checkpoints, but no config.json: with which settings they were trained is not known. "
            "Put it back, or choose another name."
        )


def has_checkpoints(folder: Path) -> bool:
    """Whether the run has a complete checkpoint."""
    return any(path.name.isdigit() for path in (folder / "checkpoints").glob("*"))


def check_free_of_runs(folder: Path) -> None:
    """Raises ConfigError when the folder of a sweep holds a run, whose results the sweep would overwrite."""
    if (folder / "config.json").exists() or has_checkpoints(folder):
        raise ConfigError(
            f"{folder} holds a run, whose results the sweep would write over. Choose another name for the sweep, "
            "name=..., or move the folder."
        )


def diverged(folder: Path, what: str, *, update: int, saved: int) -> Diverged:
    """Marks the run as diverged, and returns the error to raise. saved: update of the last checkpoint, or 0."""
    if jax.process_index() == 0:
        write_text(folder / DIVERGED, json.dumps({"update": update, "what": what}) + "\n")
    last = f"its last good checkpoint is of update {saved}" if saved else "it has no checkpoint yet"
    return Diverged(
        f"{what} is not a number after update {update} of {folder}. Lower optimizer.learning_rate or raise "
        f"optimizer.warmup, and run the same command again: the run starts over ({last})."
    )


def set_aside(folder: Path) -> None:
    """Renames the folder of a diverged run, so that the run can start over."""
    number = 1
    while (aside := folder.with_name(f"{folder.name}.diverged-{number}")).exists():
        number += 1
    folder.rename(aside)
    say_note(f"{folder} had diverged; it is kept as {aside}, and the run starts over.")


def differing_settings(folder: Path, config: Config) -> list[str]:
    """Returns a description of each setting of the run in `folder` that `config` changes (`differing_runs`)."""
    return differing_runs(load(Config, folder / "config.json"), config)


def newest(folder: Path) -> tuple[int, Meta | None]:
    """Returns the update and the metadata of a run's newest checkpoint, or (0, None)."""
    if not (folder / "checkpoints").is_dir():
        return 0, None
    with Checkpoints(folder) as checkpoints:
        step = checkpoints.latest()
        return (0, None) if step is None else (step, checkpoints.meta(step))


def continued(meta: Meta, before: Meta | None, config: Config) -> Meta:
    """Returns `meta` with the fields that a run keeps when it is continued: the scales and targets of its start, all
    package versions, and all values of `train.updates`. before: the metadata of its newest checkpoint."""
    if before is None:
        return meta._replace(updates=update_totals([], config))
    return meta._replace(
        scales=before.scales,
        targets=before.targets,
        versions=merged([before.versions, meta.versions]),
        updates=update_totals(before.updates, config),
    )


def note_changes(folder: Path, before: Meta, now: dict[str, str]) -> None:
    """Prints a note when a run was started with other package versions, or is too old to have recorded its stores. The
    run continues all the same."""
    if not before.stores:
        say_note(
            f"{folder} does not know which stores it learnt from (an older version began it): they are not checked."
        )
    other = [f"{name} {before.versions.get(name)}" for name in now if now[name] not in _parts(before, name)]
    if other:
        say_note(f"{folder} was begun with {', '.join(other)}; both versions are kept in its checkpoints.")


def _refuse(folder: Path, changed: list[str]) -> None:
    if changed:
        raise ConfigError(
            f"{folder} was trained with other settings: {', '.join(changed[:4])}. "
            "Resume with the same config, or choose another name."
        )


def _parts(meta: Meta, name: str) -> list[str]:
    return str(meta.versions.get(name)).split(", ")
