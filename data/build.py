"""Builds a store from a folder of ExoRL episodes, with rewards computed for one task.

    python -m data.build --exorl datasets/walker/rnd --task walker-walk --out stores/walker_walk_rnd.h5

The command can be killed at any time. The store appears under its name only when it is complete, and the same command,
run again, continues with the rewards computed so far. If the store is up to date, it does nothing. `--shard I/N` builds
one of N parts, so that several machines can share the work; `python -m data.merge` joins the parts.
"""

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import get_args

import numpy as np

from data import cli
from data.errors import DataError
from data.exorl import collected, episode_length, list_episodes
from data.origin import Origin, digest, whole_of
from data.relabel import Control, add_control_argument
from data.relabelled import relabelled_episodes, unlabelled_episodes
from data.reward_log import RewardLog
from data.selection import Selection, Shard
from data.store import TrajectoryStore
from data.store_file import FORMAT_VERSION, check_own
from data.store_writer import Counted, simulator_versions, write_store
from data.tasks import goal_task
from data.tasks.catalogue import body, check_task
from data.worker_pool import check_workers


def build(
    exorl: str | Path,
    task: str,
    out: str | Path,
    workers: int = 2,
    limit_steps: int | None = None,
    control: Control = "actual",
    progress: bool = True,
    *,
    skip_steps: int = 0,
    spread: bool = False,
    shard: str | None = None,
    skip_bad: bool = False,
) -> bool:
    """Writes the episodes of folder `exorl`, with rewards of `task`, to a store at `out`; False if it is up to date.

    A store is up to date if it was made from the same bytes with the same settings and simulator versions. `workers` is
    the number of processes. `skip_steps`, `limit_steps` and `spread` choose episodes (see `Selection`). `control` says
    which control a reward's control cost is computed from: "actual" (the stored actions) or "exorl" (zero, as in
    ExoRL's own code). With `shard`, "I/N", only part I of N is built, and stored beside `out` (see `Shard.path`).

    For a task with a hidden goal no rewards are computed: the store keeps the physics states, and goals are chosen when
    chains are drawn. DataError names the episode that cannot be used. With `skip_bad`, such episodes are left out, and
    the store lists them.
    """
    check_workers(workers)
    selection = Selection(skip_steps, limit_steps, spread)
    part = None if shard is None else Shard.parse(shard)
    if control not in get_args(Control):
        raise DataError(f"--control must be one of {', '.join(get_args(Control))}; got {control!r}")
    check_task(task)
    exorl, out = cli.named_path("--exorl", exorl), cli.named_path("--out", out)
    out = out if part is None else part.path(out)
    check_own(out)
    there = list_episodes(exorl)
    paths = [there[index] for index in selection.choose([episode_length(path) for path in there], exorl)]
    source = f"{exorl}: {selection.describe(len(paths), len(there))}"
    whole = "" if part is None else whole_of(paths)
    if part is not None:
        paths, source = part.choose(paths), f"{source}; shard {part}"
    hides_goal = goal_task(task) is not None
    _check_collected_for(paths[0].parent, task, hides_goal)

    computed = {"task": task, "control": control, "format": FORMAT_VERSION, **simulator_versions()}
    settings = json.dumps({**computed, **asdict(selection), "skip_bad": skip_bad}, sort_keys=True)
    digests = [digest(path) for path in paths]
    origin = Origin(
        settings, np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32), "" if part is None else str(part), whole
    )
    if _is_up_to_date(out, origin):
        store = TrajectoryStore.open(out, task)
        print(f"{out} is up to date: {store.episodes} episodes, {store.steps} steps of {task}")
        return False

    skipped: list[str] | None = [] if skip_bad else None
    log = RewardLog(out, hashlib.sha256(json.dumps(computed, sort_keys=True).encode()).digest())
    if hides_goal:
        episodes = unlabelled_episodes(paths, skipped)
    else:
        episodes = relabelled_episodes(paths, digests, task, control, workers, log, skipped)
    is_whole = False
    try:
        with closing(episodes):
            store = write_store(
                out,
                Counted(episodes, len(paths)),
                task=task,
                source=source,
                keep_physics=hides_goal,
                origin=origin,
                control=None if hides_goal else control,
                goal="hindsight" if hides_goal else None,
                skipped=[] if skipped is None else skipped,
                progress=progress,
            )
        is_whole = True
    finally:
        log.close(delete=is_whole)
    print(f"wrote {out}: {store.episodes} episodes, {store.steps} steps of {task}")
    return True


def main(arguments: Sequence[str]) -> int:
    """Runs the command line and returns its exit status."""
    parser = cli.Parser(
        prog="python -m data.build", description="Builds a store from a folder of episodes, with the rewards of a task."
    )
    parser.add_argument("--exorl", required=True, help="folder of episodes, or one with a buffer/ in it")
    parser.add_argument("--task", required=True, help="domain-task, e.g. walker-walk")
    parser.add_argument("--out", required=True, help="the store to write, e.g. stores/walker_walk_rnd.h5")
    parser.add_argument("--workers", type=int, default=2, help="processes that compute rewards (default 2)")
    Selection.add_arguments(parser)
    parser.add_argument("--shard", metavar="I/N", help="build only shard I (from 0) of N; data.merge joins the shards")
    parser.add_argument("--skip-bad", action="store_true", help="leave out damaged episodes, and record which")
    add_control_argument(parser)
    options = parser.parse_args(arguments)
    return cli.run(partial(build, **vars(options)))


def _check_collected_for(folder: Path, task: str, hides_goal: bool) -> None:
    """Raises DataError if collect.json says that the episodes cannot serve `task`. ExoRL's own zips have none."""
    on = collected(folder).get("task")
    if on is None:
        return
    # Rewards can be computed for any task of the same body. A hidden-goal task also fixes the start and how long an
    # action is held.
    same = body(on) == body(task)
    if hides_goal:
        of = goal_task(on)
        same = of is not None and of.collected_on == goal_task(task).collected_on
    if not same:
        raise DataError(
            f"{folder} was collected on {on!r}, which cannot serve task {task!r}; "
            f"collect with `python -m data.collect --task {task} ...`, or build another task"
        )


def _is_up_to_date(out: Path, origin: Origin) -> bool:
    if not os.path.lexists(out):
        return False
    try:
        existing = TrajectoryStore.open(out)
    except DataError as error:
        print(f"building again: {error}")
        return False
    if existing.made_from != origin.made_from:
        print(f"building again: {out} was made from other episodes, for another task or by other versions or settings")
    return existing.made_from == origin.made_from


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
