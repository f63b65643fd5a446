"""The stores of a config: opened, or first collected and built where the config says how."""

from pathlib import Path

from agents.cli import ConfigError
from agents.config import DataConfig
from data import DataError, TrajectoryStore


def open_stores(config: DataConfig) -> list[TrajectoryStore]:
    """Returns a store a task. With a `[data.collect]` section, what is missing is made; without, missing data is an
    error."""
    if config.collect is not None:
        prepare(config)
    stores = []
    for task, path in zip(config.tasks, config.stores, strict=True):
        if not Path(path).exists():
            raise DataError(
                f"no store at {path}. Make it with: "
                f"python -m data.build --exorl {config.episodes} --task {task} --out {path}"
            )
        stores.append(TrajectoryStore.open(path, task=task))
    sizes = {(store.observation_size, store.action_size) for store in stores}
    if len(sizes) > 1:
        raise ConfigError(
            f"data.tasks {config.tasks} differ in observation and action sizes {sorted(sizes)}; use one domain."
        )
    return stores


def prepare(config: DataConfig) -> None:
    """Collects the episodes and builds the stores that are not there yet."""
    from data.build import build
    from data.collect import collect

    recipe = config.collect
    if recipe is None:
        raise ConfigError("the config has no [data.collect] section, so its episodes cannot be made; add one.")
    collect(config.tasks[0], recipe.policy, recipe.episodes, recipe.seed, Path(config.episodes), workers=recipe.workers)
    for task, path in zip(config.tasks, config.stores, strict=True):
        build(Path(config.episodes), task, Path(path), workers=recipe.workers)
