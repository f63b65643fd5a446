"""Converts episodes between formats: InFOM's flat HDF5, Minari, metamotivo's buffers, ExoRL's npz, and stores.

    python -m data.convert datasets/walker/rnd --to flat --out rnd_walker_run.hdf5 --task walker-run --relabel
    python -m data.convert walker-walk-v0 --to store --out stores/walker_walk.h5

The format of SOURCE is found from its files. One episode is in memory at a time.
"""

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Literal, get_args

from tqdm import tqdm

from data import cli
from data.actions import clipped_actions
from data.atomic_file import atomic_folder, refuse_existing
from data.dmc import make
from data.errors import DataError
from data.exorl import write_episode
from data.formats import flat, metamotivo, minari
from data.formats.source import EpisodeFolder, Source, open_source
from data.relabel import Control, add_control_argument, relabel
from data.selection import Selection
from data.store_writer import simulator_versions, write_store
from data.tasks import goal_task
from data.tasks.catalogue import check_task
from data.trajectory import Trajectory

Format = Literal["flat", "minari", "metamotivo", "episodes", "store"]


def convert(
    source: str | Path,
    to: Format,
    out: str | Path,
    task: str | None = None,
    *,
    relabel: bool = False,
    control: Control = "actual",
    skip_steps: int = 0,
    limit_steps: int | None = None,
    spread: bool = False,
    progress: bool = True,
) -> None:
    """Writes the episodes of `source` to `out` in the format `to`.

    `task` names the task whose rewards the source holds, if the source does not name it. With `relabel`, the rewards of
    `task` are computed from the physics states (`control` as for `data.build`). `skip_steps`, `limit_steps` and
    `spread` choose episodes (see `Selection`). DataError when the source is damaged or has no known format, when it
    lacks data that the new format needs, and when `out` exists.
    """
    selection = Selection(skip_steps, limit_steps, spread)
    for name, value, known in (("--to", to, Format), ("--control", control, Control)):
        if value not in get_args(known):
            raise DataError(f"{name} must be one of {', '.join(get_args(known))}; got {value!r}")
    out = cli.named_path("--out", out)
    refuse_existing(out)
    episodes = open_source(cli.named_path("SOURCE", source))
    task = _task_of(episodes, task, to, relabel=relabel)
    chosen = selection.choose(episodes.lengths, episodes.path)
    read = _relabelled(episodes, chosen, task, control) if relabel else map(episodes.read, chosen)
    bar = tqdm(map(_clipped, read), total=len(chosen), desc=out.name, unit="episode", disable=not progress)
    text = f"{episodes.path}: {selection.describe(len(chosen), len(episodes.lengths))}"
    notes = {"task": task or "", "source": text, "selection": json.dumps(asdict(selection))}
    notes |= {"control": control, **simulator_versions()} if relabel else {"control": episodes.control or ""}
    with bar:
        _write(to, out, bar, notes)
    print(f"wrote {out}: {len(chosen)} episodes, {int(episodes.lengths[chosen].sum())} steps, as {to}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    parser = cli.Parser(prog="python -m data.convert", description="Converts episodes from one format to another.")
    parser.add_argument("source", help="a folder of ExoRL episodes, a store, a flat HDF5 file or a Minari dataset")
    parser.add_argument("--to", required=True, choices=get_args(Format), help="the format of --out")
    parser.add_argument("--out", required=True, help="what to write; it must not exist")
    parser.add_argument("--task", help="domain-task: for --relabel, or if the source does not name its task")
    parser.add_argument("--relabel", action="store_true", help="compute the rewards of --task from the physics")
    add_control_argument(parser)
    Selection.add_arguments(parser)
    options = parser.parse_args(arguments)
    return cli.run(partial(convert, **vars(options)))


def _task_of(episodes: Source, task: str | None, to: Format, *, relabel: bool) -> str | None:
    """Returns the task whose rewards will be written, if one is known."""
    if task is not None:
        check_task(task)
    if relabel and task is None:
        raise DataError("--relabel computes the rewards of a task: name it with --task")
    if task is not None and episodes.task not in (None, task) and not relabel:
        raise DataError(
            f"{episodes.path} holds rewards of {episodes.task!r}, not of {task!r}; add --relabel to compute those"
        )
    task = task or episodes.task
    if to != "store":
        return task
    if isinstance(episodes, EpisodeFolder):
        raise DataError(f"{episodes.path} is a folder of episodes; make a store of it with `python -m data.build`")
    if task is None:
        raise DataError(f"{episodes.path} does not say whose rewards it holds, and a store must; name it with --task")
    check_task(task)
    if goal_task(task) is not None:
        raise DataError(
            f"{task} hides a goal: convert to episodes, and make a store of them with `python -m data.build`"
        )
    _check_sizes(episodes, task)
    return task


def _check_sizes(episodes: Source, task: str) -> None:
    environment, first = make(task), episodes.read(0)
    own = environment.observation_space.shape[0], environment.action_space.shape[0]
    got = first.observation.shape[1], first.action.shape[1]
    if own != got:
        raise DataError(
            f"{episodes.path}: not of {task}, which has {own[0]} numbers of observation and {own[1]} of action; "
            f"got {got[0]} and {got[1]}"
        )


def _relabelled(episodes: Source, chosen: Iterable[int], task: str, control: Control) -> Iterator[Trajectory]:
    for episode in map(episodes.read, chosen):
        yield replace(episode, reward=relabel(task, episode, control=control))


def _clipped(episode: Trajectory) -> Trajectory:
    return replace(episode, action=clipped_actions(episode.action, episode.source))


def _write(to: Format, out: Path, episodes: Iterable[Trajectory], notes: Mapping[str, str]) -> None:
    if to == "store":
        write_store(out, episodes, task=notes["task"], source=notes["source"], control=notes["control"] or None)
    elif to == "episodes":
        with atomic_folder(out) as folder:  # atomic, because an incomplete folder looks like a complete one
            for index, episode in enumerate(episodes):
                write_episode(folder, index, episode)
    else:
        {"flat": flat, "minari": minari, "metamotivo": metamotivo}[to].write(out, episodes, notes)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
