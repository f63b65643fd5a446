"""Opens the stores of a config. Missing ones are collected and built first, if the config says how."""

from pathlib import Path

from agents.cli import ConfigError
from agents.config import DataConfig
from agents.identity import Stores, check_stores
from data import DataError, TrajectoryStore
from data.tasks import goal_task


def open_stores(config: DataConfig, *, owner: Path | None = None, kept: Stores | None = None) -> list[TrajectoryStore]:
    """Returns one store per task. With a `[data.collect]` section, missing data are made; without, they are an error.

    Args:
        owner: folder of the run that is continued.
        kept: the stores that this run was trained on (`agents.identity.records`). Raises ConfigError when a store now
            has other content; no store is overwritten.
    """
    prepare(config, owner=owner, kept=kept)
    stores = [TrajectoryStore.open(path, task=task) for task, path in zip(config.tasks, config.stores, strict=True)]
    check_stores(owner or Path(), kept or {}, stores)
    sizes = {(store.observation_size, store.action_size) for store in stores}
    if len(sizes) > 1:
        raise ConfigError(
            f"data.tasks {config.tasks} differ in observation and action sizes {sorted(sizes)}; use one domain."
        )
    return stores


def check_existing(config: DataConfig, owner: Path, kept: Stores) -> None:
    """Raises ConfigError when an existing store differs from the one that the run `owner` was trained on."""
    places = [(task, path) for task, path in zip(config.tasks, config.stores, strict=True) if task in kept]
    check_stores(owner, kept, [TrajectoryStore.open(path, task) for task, path in places if Path(path).exists()])


def prepare(config: DataConfig, *, owner: Path | None = None, kept: Stores | None = None) -> None:
    """Collects missing episodes and builds missing stores, if the config has a `[data.collect]` section. Without one,
    raises DataError when a store is missing. owner, kept: as for `open_stores`."""
    from data.build import build
    from data.collect import collect

    kept = kept or {}
    check_existing(config, owner or Path(), kept)
    recipe, places = config.collect, list(zip(config.tasks, config.stores, strict=True))
    if recipe is None:
        for task, path in places:
            check_there(config, task, path, f"; {owner} learnt from {kept[task]['path']}" if task in kept else "")
        return
    if all(task in kept and Path(path).exists() for task, path in places):
        return
    task = goal_task(config.tasks[0])
    collected_on = config.tasks[0] if task is None else task.collected_on
    collect(collected_on, recipe.policy, recipe.episodes, recipe.seed, Path(config.episodes), workers=recipe.workers)
    check_episodes(Path(config.episodes), recipe.episodes)
    for task, path in places:
        build(Path(config.episodes), task, Path(path), workers=recipe.workers)


def check_episodes(folder: Path, asked: int) -> None:
    """Raises ConfigError when a folder holds more episodes than `asked`: all of them would be used in training."""
    held = len(list(folder.glob("episode_*_*.npz")))
    if held > asked:
        raise ConfigError(
            f"{folder} holds {held} episodes, and data.collect.episodes asks for {asked}. Write "
            f"data.collect.episodes={held}, or choose another data.episodes."
        )


def check_there(config: DataConfig, task: str, path: str, before: str = "") -> None:
    """Raises DataError when the store at `path` is missing. before: a remark added to the message."""
    if not Path(path).exists():
        raise DataError(
            f"no store at {path}. Make it with: python -m data.build --exorl {config.episodes} --task {task} "
            f"--out {path} (looked at {Path(path).absolute()}{before})"
        )
