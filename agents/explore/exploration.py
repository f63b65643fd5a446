"""Runs a collector: the files that it writes, and continuing after an interruption.

OUT/episode_000000_1000.npz ..      episodes in ExoRL's format, as written by data.collect
OUT/collect.json                    a description of the collection
OUT/explore/config.json             the settings
OUT/explore/metrics.jsonl           one line per episode
OUT/explore/checkpoints/            the learner: every `checkpoint_every` episodes, at the end and at an interruption
"""

import json
import time
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import TextIO

import jax
import numpy as np
import orbax.checkpoint as ocp
from tqdm import tqdm

from agents import damage
from agents.checkpoint import by_name, check_room, read_metrics
from agents.cli import ConfigError
from agents.config_file import dump, load
from agents.explore.config import ExploreConfig
from agents.explore.coverage import make_coverage
from agents.explore.explorers import Explorer, make_explorer
from agents.identity import flatten
from agents.processes import asked_to_stop
from data import DataError, Trajectory
from data.atomic_file import write_text
from data.collection import alone, claim, describe, note_versions
from data.dmc import Environment, make
from data.exorl import episode_index, read_episode, write_episode


def explore(config: ExploreConfig, steps: int, out: Path, *, resume: bool = False, progress: bool = True) -> int:
    """Writes episodes into `out` until they have at least `steps` steps, and returns their number of steps.

    Episodes depend only on the config and on the versions of the simulator and of JAX: a collection that was killed and
    resumed has the same episodes as an uninterrupted one. Raises ConfigError when the folder holds another collection,
    or this one without `resume`; DataError when another process is collecting into it; Diverged when a metric or an
    action is not finite.
    """
    environment = make(config.task, episode_steps=config.episode_steps)
    _check_length(config, environment)
    claim(out, describe(config.task, config.algorithm, config.seed, environment.episode_steps))
    with ExitStack() as locks:
        locks.enter_context(alone(out))
        folder = out / "explore"
        _check_folder(folder, config, resume=resume)
        note_versions(out, locks)
        folder.mkdir(exist_ok=True)
        write_text(folder / "config.json", dump(config))
        return _Collection(out, config, environment).run(steps, progress=progress)


class _Collection:
    """One run of `explore`."""

    def __init__(self, out: Path, config: ExploreConfig, environment: Environment):
        self.out, self.folder, self.config, self.environment = out, out / "explore", config, environment
        self.coverage = make_coverage(config.task, environment.observation_space.shape[0])
        self.bar = tqdm(disable=True)
        self.explorer: Explorer = make_explorer(config, environment, lambda steps: self.bar.update(steps))

    def run(self, steps: int, *, progress: bool) -> int:
        options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
        with ocp.CheckpointManager((self.folder / "checkpoints").absolute(), options=options) as checkpoints:
            index, done = self._restore(checkpoints)
            log = self.folder / "metrics.jsonl"
            write_text(log, "".join(json.dumps(line) + "\n" for line in read_metrics(log, up_to=done)))
            label = f"{self.config.task}, {self.config.algorithm}"
            self.bar = tqdm(total=steps, initial=done, disable=not progress, unit="step", unit_scale=True, desc=label)
            with self.bar, log.open("a") as file, asked_to_stop() as asked:
                while done < steps:
                    done, index = done + self._episode(index, done, file), index + 1
                    ends = done >= steps or asked()
                    if ends or index % self.config.checkpoint_every == 0:
                        self._save(checkpoints, index, done)
                    if ends:
                        break
        if done < steps:
            raise KeyboardInterrupt
        return done

    def _episode(self, index: int, done: int, file: TextIO) -> int:
        """Plays and writes episode `index`, logs it, and returns its number of steps."""
        began = time.monotonic()
        trajectory, metrics = self.explorer.episode(index, done)
        write_episode(self.out, index, trajectory)
        self.coverage.add(trajectory)
        rate = trajectory.length / max(time.monotonic() - began, 1e-9)
        line = {
            "step": done + trajectory.length,
            "episode": index,
            "coverage": self.coverage.share,
            "return/task": trajectory.total_reward,
            "throughput/steps_per_second": rate,
        }
        file.write(json.dumps(line | metrics) + "\n")
        file.flush()
        paid = f", paid {metrics['reward/paid']:.3g}" if metrics else ""
        self.bar.set_postfix_str(f"coverage {self.coverage.share:.1%}{paid}")
        return trajectory.length

    def _save(self, checkpoints: ocp.CheckpointManager, index: int, done: int) -> None:
        arrays = by_name({"explorer": self.explorer.state, "visited": self.coverage.visited})
        check_room(self.folder, sum(array.nbytes for array in arrays.values()))
        kept = {"steps": done, "checksums": damage.checksums(arrays)}
        checkpoints.save(index, args=ocp.args.StandardSave(arrays), custom_metadata=kept)

    def _restore(self, checkpoints: ocp.CheckpointManager) -> tuple[int, int]:
        """Restores the newest checkpoint and refills the replay. Returns its numbers of episodes and steps."""
        index = checkpoints.latest_step()
        if index is None:
            return 0, 0
        place = Path(checkpoints.directory) / str(index)
        like = {"explorer": self.explorer.state, "visited": self.coverage.visited}
        named = by_name(like)
        with damage.reporting_damage(place):
            kept = damage.custom_metadata(checkpoints, index)
            arrays = checkpoints.restore(index, args=ocp.args.StandardRestore(named))
            damage.check(place, kept.get("checksums", {}), damage.checksums(arrays))
        state = jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in named])
        self.explorer.state, self.coverage.visited = state["explorer"], np.array(state["visited"])
        for number, trajectory in self._last_episodes(index):
            self.explorer.remember(number, trajectory)
        return index, int(kept["steps"])

    def _last_episodes(self, count: int) -> Iterable[tuple[int, Trajectory]]:
        """Yields the last of the first `count` episodes, as many as the replay holds."""
        paths = {episode_index(path): path for path in self.out.glob("episode_*_*.npz")}
        places = getattr(getattr(self.explorer, "replay", None), "places", 0)
        for index in range(max(0, count - places), count):
            if index not in paths:
                raise DataError(
                    f"episode {index} is not in {self.out} any more, and the learner goes on from it. Put it back, or "
                    "choose another --out"
                )
            yield index, read_episode(paths[index])


def _check_length(config: ExploreConfig, environment: Environment) -> None:
    if environment.episode_steps < config.learner.nstep and config.algorithm != "random":
        raise ConfigError(
            f"an episode of {config.task} has {environment.episode_steps} steps, and a transition "
            f"learner.nstep={config.learner.nstep}. Lower that, or raise --episode-steps."
        )


def _check_folder(folder: Path, config: ExploreConfig, *, resume: bool) -> None:
    """Raises ConfigError when the folder holds another collection, or this one without `resume`."""
    if not (folder / "config.json").exists():
        if any(folder.parent.glob("*.npz")):
            raise ConfigError(
                f"{folder.parent} holds episodes, and no {folder.name}/config.json that says how they were made. "
                "Choose another --out."
            )
        return
    before, now = (flatten(one.model_dump()) for one in (load(ExploreConfig, folder / "config.json"), config))
    # The interval of checkpoints does not change episodes.
    told = (name for name in before if before[name] != now[name] and name != "checkpoint_every")
    changed = [f"{name}={before[name]} (now {now[name]})" for name in told]
    if changed:
        raise ConfigError(
            f"{folder.parent} was collected with other settings: {', '.join(changed[:4])}. Resume with the same ones, "
            "or choose another --out."
        )
    if not resume:
        raise ConfigError(
            f"{folder.parent} already holds this collection. Add --resume to continue it, choose another --out, or "
            "delete the folder."
        )
