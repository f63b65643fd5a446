"""Checkpoints of a run: weights, optimizer state and the metadata needed to act. Orbax writes them asynchronously and
atomically, and restores them on any mesh."""

import errno
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Sharding

from agents.agent import Scales
from agents.cli import ConfigError
from agents.damage import check, checksums, custom_metadata, reporting_damage
from rlring.language_model import TrainState

WEIGHTS = "0."  # prefix of the weights' names in checkpoints


class Meta(NamedTuple):
    """The metadata of a checkpoint."""

    scales: Scales
    targets: dict[str, float]
    """The typical return that the agent is asked for, by task."""
    action_size: int
    episode_steps: int
    versions: dict[str, str]
    """Versions of the packages that the weights were trained with."""
    config: dict[str, Any] = {}  # noqa: RUF012 - never written to
    """The settings of the run."""
    stores: dict[str, dict[str, Any]] = {}  # noqa: RUF012 - never written to
    """The stores that it was trained on, by task (`agents.identity.records`)."""
    updates: list[int] = []  # noqa: RUF012 - never written to
    """The values of `train.updates` that it was trained with (`agents.identity.update_totals`)."""


class Checkpoints:
    """The checkpoints of one run folder.

    Arrays are stored by name, so that a checkpoint of another model is detected by its names and shapes.

    keep: number of newest checkpoints kept. keep_best: number of checkpoints of lowest loss kept as well.
    """

    def __init__(self, run: Path, *, keep: int = 2, keep_best: int = 0):
        self.folder = (run / "checkpoints").absolute()
        policies = ocp.checkpoint_managers
        newest = policies.LatestN(keep)
        best = policies.BestN(
            get_metric_fn=_loss, reverse=True, n=keep_best, keep_checkpoints_without_metrics=False
        )  # reverse: BestN keeps the last of the sorted list
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy([newest, best]),
            best_fn=_loss,
            best_mode="min",
            create=True,
            enable_async_checkpointing=True,
        )
        handlers = {"state": ocp.PyTreeCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()}
        with reporting_damage(self.folder):
            self.manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *error: object) -> None:
        self.manager.wait_until_finished()
        self.manager.close()

    def latest(self) -> int | None:
        """Returns the update of the newest complete checkpoint, or None."""
        return self.manager.latest_step()

    def best(self) -> int | None:
        """Returns the update of the complete checkpoint of lowest loss, or None."""
        return self.manager.best_step()

    def is_asked_to_end(self, step: int) -> bool:
        """Returns whether any process received SIGTERM. All processes get the same answer at the same step."""
        return self.manager.reached_preemption(step)

    def save(self, step: int, state: Any, meta: Meta, loss: float) -> None:
        """Starts to write a checkpoint, and returns once `state` has been copied off the devices. loss: its rank for
        `keep_best`.

        Raises OSError when the disk has no room. This is checked first, because a write that fails half-way leaves the
        threads of the storage library in an undefined state.
        """
        check_room(self.folder, sum(_bytes_here(leaf) for leaf in jax.tree.leaves(state)))
        saved = meta._replace(
            scales={name: np.asarray(value).tolist() for name, value in meta.scales._asdict().items()}
        )
        arrays, known = by_name(_as_stored(state)), saved._asdict()
        arguments = ocp.args.Composite(state=ocp.args.PyTreeSave(arrays), meta=ocp.args.JsonSave(known))
        sums = {"checksums": checksums(arrays, known)}
        self.manager.save(step, args=arguments, metrics={"loss": loss}, custom_metadata=sums)

    def meta(self, step: int | None = None) -> Meta:
        """Returns the metadata of a checkpoint, by default the newest."""
        step = self._newest() if step is None else step
        place = self._place(step)
        with reporting_damage(place):
            saved = self.manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
            check(place, self._checksums(step), checksums({}, saved))
            scales = Scales(
                np.asarray(saved["scales"]["observation_mean"], np.float32),
                np.asarray(saved["scales"]["observation_std"], np.float32),
                float(saved["scales"]["return_to_go"]),
            )
            # A later version may have saved more fields.
            known = {name: value for name, value in saved.items() if name in Meta._fields}
            return Meta(**{**known, "scales": scales})

    def restore(self, like: Any, sharding: Any, *, part: str = "", step: int | None = None) -> Any:
        """Returns the state of a checkpoint, by default the newest.

        Args:
            like: a tree of arrays, or of their shapes, with the structure of the state.
            sharding: where the arrays go, on any mesh: one sharding, or a tree of them.
            part: name prefix of the part of the state to read, such as WEIGHTS; `like` is then that part.

        Raises ConfigError when the checkpoint is of another model, damaged or missing.
        """
        step = self._newest() if step is None else step
        place = self._place(step)
        with reporting_damage(place):
            stored = self.manager.item_metadata(step)["state"]
            stored = {name: tuple(leaf.shape) for name, leaf in dict(stored).items()}
        wanted = by_name(_as_stored(like), part)
        differing = [
            f"{name}: {stored.get(name, 'absent')} in the checkpoint, {leaf.shape} in the config"
            for name, leaf in wanted.items()
            if stored.get(name) != tuple(leaf.shape)
        ]
        surplus = [f"{name} is not in the config" for name in stored if name.startswith(part) and name not in wanted]
        if differing or surplus:
            raise ConfigError(
                f"{place} is a checkpoint of another model ({'; '.join((differing + surplus)[:2])}). "
                "Use the config it was trained with, or another run name."
            )
        if isinstance(sharding, Sharding):
            sharding = jax.tree.map(lambda _: sharding, like)
        placed = by_name(_as_stored(sharding), part)
        abstract = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed[name]) for name, leaf in wanted.items()
        }
        restore = ocp.args.PyTreeRestore(
            item=abstract,
            restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
            partial_restore=True,
        )
        with reporting_damage(place):
            arrays = self.manager.restore(step, args=ocp.args.Composite(state=restore))["state"]
            check(place, self._checksums(step), checksums(arrays))
        return jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in wanted])

    def _place(self, step: int) -> Path:
        place = self.folder / str(step)
        if (place / "default").is_dir():
            raise ConfigError(f"{place} is a checkpoint of agents.recall, not of agents.train. Give another run.")
        return place

    def _checksums(self, step: int) -> dict[str, int]:
        return custom_metadata(self.manager, step).get("checksums", {})

    def _newest(self) -> int:
        step = self.latest()
        if step is None:
            raise ConfigError(
                f"{self.folder.parent} holds no checkpoint. Train it first: python -m agents.train CONFIG.toml."
            )
        return step


def _as_stored(state: Any) -> Any:
    """Returns the state as a pair (weights, optimizer), which checkpoints name "0" and "1"."""
    return tuple(state) if isinstance(state, TrainState) else state


def _loss(metrics: dict[str, float]) -> float:
    return metrics["loss"]


def _bytes_here(x: jax.Array) -> int:
    """Returns an upper bound of the bytes of an array that this process writes."""
    return sum(shard.data.nbytes for shard in x.addressable_shards if shard.replica_id == 0)


def check_room(folder: Path, size: int) -> None:
    """Raises OSError when the disk has no room for a checkpoint of `size` bytes."""
    needed = size * 11 // 10 + 2**20
    if shutil.disk_usage(folder).free < needed:
        raise OSError(errno.ENOSPC, f"a checkpoint needs {needed / 2**20:.1f} MiB", str(folder))


def by_name(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Returns the leaves of a tree by their paths, joined with dots."""
    leaves, _ = jax.tree.flatten_with_path(tree)
    return {prefix + jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def versions() -> dict[str, str]:
    """Returns the versions of the packages that results depend on, by name."""
    import importlib.metadata
    import platform

    names = ("rlring", "jax", "flax", "optax", "dm-control", "mujoco", "numpy")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in names}


def read_metrics(path: Path, up_to: int | None = None) -> list[dict]:
    """Returns the entries of a `metrics.jsonl`, without those of updates after `up_to` and without a torn last line."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            break  # the write was interrupted
        if up_to is None or entry["step"] <= up_to:
            lines.append(entry)
    return lines
