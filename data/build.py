"""Builds a store from a folder of ExoRL episodes, rewards computed anew for one task.

    python -m data.build --exorl datasets/walker/rnd --task walker-walk --out stores/walker_walk_rnd.h5

Safe to kill: the store appears when it is whole, and the same command starts over. Once it is there, the same command
finds that it is up to date and does nothing.
"""

import hashlib
import json
import os
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from data import cli
from data.errors import DataError
from data.exorl import episode_length, list_episodes, read_episode
from data.relabel import relabel
from data.store import TrajectoryStore
from data.store_file import FORMAT_VERSION, check_own
from data.store_writer import simulator_versions, write_store
from data.tasks import goal_task
from data.tasks.catalogue import body, check_task
from data.trajectory import Trajectory
from data.worker_pool import check_workers, worker_pool

Control = Literal["actual", "exorl"]

# Episodes in flight per worker: enough that none waits, few enough that memory stays flat.
_AHEAD = 4


def build(
    exorl: str | Path,
    task: str,
    out: str | Path,
    workers: int = 2,
    limit_steps: int | None = None,
    control: Control = "actual",
    progress: bool = True,
) -> bool:
    """Writes the episodes of folder `exorl`, relabelled for `task`, to a store at `out`; False if it is there already.

    "There already" means made from the same bytes, task, `control`, limit and simulator versions. `limit_steps` keeps
    the first whole episodes in file-name order that fit, as ExoRL's own loader reads 1,000,000 steps. `control` decides
    what the reward's control cost sees: the "actual" actions, or none, as "exorl" has it. A task with a hidden goal is
    not relabelled here: it keeps its physics, and goals are chosen when chains are drawn. DataError names the episode
    that cannot be used.
    """
    check_workers(workers)
    if limit_steps is not None and limit_steps < 1:
        raise DataError(f"--limit-steps must be 1 or more; got {limit_steps}")
    if control not in get_args(Control):
        raise DataError(f"--control must be one of {', '.join(get_args(Control))}; got {control!r}")
    check_task(task)
    exorl, out = cli.named_path("--exorl", exorl), cli.named_path("--out", out)
    check_own(out)
    paths, source = _choose(exorl, limit_steps)
    hides_goal = goal_task(task) is not None
    _check_collected_for(paths[0].parent, task, hides_goal)
    made_from = _made_from(paths, task, control)
    if _is_up_to_date(out, made_from):
        store = TrajectoryStore.open(out, task)
        print(f"{out} is up to date: {store.episodes} episodes, {store.steps} steps of {task}")
        return False
    with closing(_episodes(paths, task, control, min(workers, len(paths)))) as trajectories:
        store = write_store(
            out,
            _Counted(trajectories, len(paths)),
            task=task,
            source=source,
            keep_physics=hides_goal,
            made_from=made_from,
            control=None if hides_goal else control,
            goal="hindsight" if hides_goal else None,
            progress=progress,
        )
    print(f"wrote {out}: {store.episodes} episodes, {store.steps} steps of {task}")
    return True


def main(arguments: Sequence[str]) -> int:
    """Runs the command line and returns its exit status."""
    parser = cli.Parser(prog="python -m data.build", description="ExoRL episodes -> relabelled store")
    parser.add_argument("--exorl", required=True, help="folder of episodes, or one with a buffer/ in it")
    parser.add_argument("--task", required=True, help="domain-task, e.g. walker-walk")
    parser.add_argument("--out", required=True, help="the store to write, e.g. stores/walker_walk_rnd.h5")
    parser.add_argument("--workers", type=int, default=2, help="processes that relabel (default 2)")
    parser.add_argument("--limit-steps", type=int, help="only the first episodes, up to this many steps")
    parser.add_argument("--control", choices=get_args(Control), default="actual", help="what control costs see")
    options = parser.parse_args(arguments)
    return cli.run(partial(build, **vars(options)))


class _Counted:
    """An iterable with a length, so that the progress bar knows the end."""

    def __init__(self, trajectories: Iterable[Trajectory], count: int) -> None:
        self.trajectories, self.count = trajectories, count

    def __iter__(self) -> Iterator[Trajectory]:
        return iter(self.trajectories)

    def __len__(self) -> int:
        return self.count


def _choose(folder: Path, limit_steps: int | None) -> tuple[list[Path], str]:
    """Returns the episodes to use, and in words which they are."""
    paths = list_episodes(folder)
    if limit_steps is None:
        return paths, f"{folder}: all {len(paths)} episodes"
    ends = np.cumsum([episode_length(path) for path in paths])
    count = int(np.searchsorted(ends, limit_steps, side="right"))
    if count == 0:
        raise DataError(
            f"--limit-steps {limit_steps} is less than the first episode of {folder}, {ends[0]} steps; raise it"
        )
    return paths[:count], f"{folder}: the first {count} of {len(paths)} episodes in file-name order"


def _check_collected_for(folder: Path, task: str, hides_goal: bool) -> None:
    """Compares with what `data.collect` wrote about the folder; ExoRL's own zips say nothing."""
    note = folder / "collect.json"
    if not note.is_file():
        return
    try:
        collected = str(json.loads(note.read_text())["task"])
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise DataError(
            f"{note}: not what data.collect writes ({error!r}); delete it if the episodes are whole"
        ) from None
    # Rewards can be computed anew for any task of a body; a hidden-goal task also fixes start and action length.
    same = body(collected) == body(task)
    if hides_goal:
        of = goal_task(collected)
        same = of is not None and of.collected_on == goal_task(task).collected_on
    if not same:
        raise DataError(
            f"{folder} was collected on {collected!r}, which cannot serve task {task!r}; "
            f"collect with `python -m data.collect --task {task} ...`, or build another task"
        )


def _made_from(paths: list[Path], task: str, control: str) -> str:
    sources = hashlib.sha256()
    settings = {"task": task, "control": control, "format": FORMAT_VERSION, **simulator_versions()}
    sources.update(json.dumps(settings, sort_keys=True).encode())
    for path in paths:
        sources.update(path.name.encode())
        with open(path, "rb") as file:
            sources.update(hashlib.file_digest(file, "sha256").digest())
    return sources.hexdigest()


def _is_up_to_date(out: Path, made_from: str) -> bool:
    if not os.path.lexists(out):
        return False
    try:
        existing = TrajectoryStore.open(out)
    except DataError as error:
        print(f"building again: {error}")
        return False
    if existing.made_from != made_from:
        print(f"building again: {out} was made from other episodes, for another task or by other versions")
    return existing.made_from == made_from


def _read_without_reward(path: Path) -> Trajectory:
    trajectory = _read_with_physics(path)
    # Without a sign, where there is one: chains give every visit another.
    observation = trajectory.observation[:, : trajectory.physics.shape[1]]
    return replace(trajectory, observation=observation, reward=np.zeros_like(trajectory.reward))


def _read_with_physics(path: Path) -> Trajectory:
    trajectory = read_episode(path)
    if trajectory.physics is None:
        raise DataError(
            f"{path}: has no physics, and rewards are computed from it; use ExoRL's zips (URLB's have none), or "
            "collect with `python -m data.collect`"
        )
    return trajectory


def _relabel_episode(path: Path, task: str, control: Control) -> Trajectory:
    """Runs in a worker; physics stays behind, it would only be carried back to be dropped."""
    trajectory = _read_with_physics(path)
    reward = relabel(task, trajectory, control=control)
    return replace(trajectory, reward=reward, physics=None, extras={})


def _episodes(paths: list[Path], task: str, control: Control, workers: int) -> Iterator[Trajectory]:
    """Yields the episodes in order, relabelled by `workers` processes that stay a few episodes ahead."""
    if goal_task(task) is not None:
        yield from map(_read_without_reward, paths)
        return
    one = partial(_relabel_episode, task=task, control=control)
    if workers == 1:
        yield from map(one, paths)
        return
    with worker_pool(workers) as submit:
        queue = iter(paths)
        pending = deque(submit(one, path) for path in islice(queue, _AHEAD * workers))
        while pending:
            yield pending.popleft().result()
            pending.extend(submit(one, path) for path in islice(queue, 1))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
