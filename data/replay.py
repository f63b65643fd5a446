"""Replays stored actions from the first physics state, and reports how far the simulator drifts from the stored states.

    python -m data.replay datasets/walker/rnd [--task walker-walk] [--limit-steps 100000 --spread] [--json drift.json]

MuJoCo's versions differ, and a stored episode was made with one of them. Where the states drift apart early, rewards
computed from the stored states are still right, but an agent trained on the file is evaluated with different dynamics.
The command also finds files whose actions are off by one row.
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64
from tqdm import tqdm

from data import cli
from data.actions import clipped_actions
from data.atomic_file import write_text
from data.dmc import Environment, make
from data.errors import DataError
from data.exorl import collected, episode_length, list_episodes, read_episode
from data.open_loop import states_after
from data.relabel import check_body, drawn_for
from data.selection import Selection
from data.store_writer import simulator_versions
from data.tasks import goal_task
from data.tasks.catalogue import body, check_task
from data.trajectory import Trajectory
from data.worker_pool import check_workers, worker_pool

THRESHOLDS = (1e-9, 1e-6, 1e-3)
_WINDOW = 10  # steps after the first that differs; actions shifted by a row must fit there to be called off by one
_FITS = 1e-3  # they fit if the shift reduces the largest difference to this share
# Tasks that draw something for an episode which changes how the body moves and which no file stores.
_REFUSED = {"quadruped-escape": "every episode draws a terrain, which is too large to be kept"}


@dataclass(frozen=True, eq=False)
class Drift:
    """The difference between the physics states of a replayed episode and the stored ones."""

    episode: str
    by_step: Float64[np.ndarray, " M"]
    """The largest |difference| of the physics state after each step, in its own units (m, rad, m/s, rad/s)."""
    shift: int
    """0; +1 where the actions fit a row later than they stand, -1 where they fit a row earlier."""

    @property
    def largest(self) -> float:
        """The largest difference over all steps."""
        return float(self.by_step.max())

    def first_beyond(self, threshold: float) -> int | None:
        """Returns the first step, counted from 1, whose difference exceeds `threshold` or is NaN; None if none does."""
        beyond = np.flatnonzero(~(self.by_step <= threshold))
        return int(beyond[0]) + 1 if beyond.size else None


@dataclass(frozen=True, eq=False)
class Replayed:
    """The drift of every replayed episode of a folder."""

    folder: Path
    task: str
    chosen: str
    made_with: dict[str, str]
    drifts: list[Drift]

    def by_step(self) -> Float64[np.ndarray, " M"]:
        """Returns, for each step, the largest difference over all episodes; f64[M] with M of the longest episode."""
        longest = max(len(drift.by_step) for drift in self.drifts)
        return np.max([np.pad(drift.by_step, (0, longest - len(drift.by_step))) for drift in self.drifts], axis=0)

    def text(self) -> str:
        """Returns a summary of the drift as text, several lines."""
        worst = max(self.drifts, key=lambda drift: drift.largest)
        steps = sum(len(drift.by_step) for drift in self.drifts)
        lines = [
            f"{self.folder}: {self.chosen}, {steps:,} steps, played again as {self.task}",
            f"  made with     {_versions(self.made_with) or 'unknown: it has no collect.json'}",
            f"  played with   {_versions(simulator_versions())}",
            f"  difference    {worst.largest:.2g} at most, "
            + (f"in {worst.episode} after step {int(worst.by_step.argmax()) + 1}" if worst.largest else "bit for bit"),
            "  larger than   episodes       first step: earliest, median",
        ]
        for threshold in THRESHOLDS:
            first = [step for drift in self.drifts if (step := drift.first_beyond(threshold)) is not None]
            count = f"{len(first):,} of {len(self.drifts):,}"
            lines.append(
                f"  {threshold:<12.0e}  {count:15}" + (f"{min(first):,}, {np.median(first):g}" if first else "")
            )
        largest = self.by_step()
        lines.append("  after step    largest difference of all episodes")
        lines += [f"  {step:<12,}  {largest[step - 1]:.2g}" for step in _marks(len(largest))]
        return "\n".join(line.rstrip() for line in lines)

    def content(self) -> dict[str, Any]:
        """Returns the drift of the folder and of every episode as a JSON object; keys of `first_beyond` are the
        thresholds."""
        return {
            "folder": str(self.folder),
            "task": self.task,
            "episodes": self.chosen,
            "made_with": self.made_with,
            "played_with": simulator_versions(),
            "largest": max(drift.largest for drift in self.drifts),
            "largest_by_step": self.by_step().tolist(),
            "of_episodes": [
                {
                    "episode": drift.episode,
                    "steps": len(drift.by_step),
                    "largest": drift.largest,
                    "first_beyond": {f"{threshold:.0e}": drift.first_beyond(threshold) for threshold in THRESHOLDS},
                    "shift": drift.shift,
                }
                for drift in self.drifts
            ],
        }


def replay(trajectory: Trajectory, task: str) -> Drift:
    """Plays an episode's actions in `task`, which has the same body as the episode's own task, and returns the drift.

    DataError when the episode has no physics states or those of another body, and when it lacks a value that the task
    draws per episode and that changes how the body moves.
    """
    _check_playable(task)
    environment = _environment(task)
    check_body(environment, trajectory)
    if not environment.has_goal:  # a hidden goal does not change how the body moves
        environment.set_extras(drawn_for(task, environment, trajectory))
    states, actions = trajectory.physics, clipped_actions(trajectory.action, trajectory.source)
    by_step = _difference(environment, states, actions)
    return Drift(Path(trajectory.source).name, by_step, _shift(environment, states, actions, by_step))


def replay_folder(
    folder: str | Path,
    task: str | None = None,
    selection: Selection = Selection(),  # noqa: B008, it is frozen
    workers: int = 1,
    progress: bool = True,
) -> Replayed:
    """Replays the selected episodes of a folder in `workers` processes and returns their drift.

    If `task` is None, it is the task that collect.json names. DataError, which names the file, when an episode is
    damaged or cannot be replayed; also when no task is known, or the folder was collected on a task of another body.
    """
    check_workers(workers)
    there = list_episodes(folder)
    lengths = [episode_length(path) for path in there]
    chosen = selection.choose(lengths, Path(folder))
    paths = [there[index] for index in chosen]
    note = collected(paths[0].parent)
    task = task or note.get("task")
    if task is None:
        raise DataError(f"{folder} has no collect.json that names its task; give --task, such as --task walker-walk")
    _check_playable(task)
    _check_collected_for(paths[0].parent, note.get("task", task), task)
    steps = sum(lengths[index] for index in chosen)
    drifts = []
    bar = tqdm(total=steps, unit="step", unit_scale=True, desc=f"replay {task}", leave=False, disable=not progress)
    with bar, closing(_spread(partial(_replay_file, task), paths, workers)) as played:
        for drift in played:
            drifts.append(drift)
            bar.update(len(drift.by_step))
    return Replayed(Path(folder), task, selection.describe(len(paths), len(there)), note.get("versions", {}), drifts)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status, which is 2 also when actions are off by one row."""
    parser = cli.Parser(
        prog="python -m data.replay", description="Plays stored episodes again and reports how far they drift."
    )
    parser.add_argument("folder", help="folder of episodes, or one with a buffer/ in it")
    parser.add_argument("--task", help="domain-task (default: the one in collect.json)")
    Selection.add_arguments(parser)
    parser.add_argument("--workers", type=int, default=1, help="processes (default 1)")
    parser.add_argument("--json", metavar="FILE", help="also write the drift of every episode to this file")
    return cli.run(partial(_command, parser.parse_args(argv)))


def _command(options: Any) -> None:
    selection = Selection(options.skip_steps, options.limit_steps, options.spread)
    out = None if options.json is None else cli.named_path("--json", options.json)
    folder = cli.named_path("FOLDER", options.folder)
    replayed = replay_folder(folder, options.task, selection, options.workers)
    print(replayed.text(), flush=True)
    if out is not None:
        write_text(out, json.dumps(replayed.content()) + "\n")
    for shift, where in ((1, "later"), (-1, "earlier")):
        shifted = [drift.episode for drift in replayed.drifts if drift.shift == shift]
        if shifted:
            raise DataError(
                f"the actions of {len(shifted)} of {len(replayed.drifts)} episodes, such as {shifted[0]}, are off by "
                f"one: they fit a row {where} than they stand. Row t of action holds the action that led to row t of "
                "observation and physics, and row 0 is a dummy; write the files so"
            )


def _check_playable(task: str) -> None:
    check_task(task)
    if task in _REFUSED:
        raise DataError(f"{task} cannot be played again: {_REFUSED[task]}")


def _check_collected_for(folder: Path, on: str, task: str) -> None:
    """Raises DataError unless actions have the same effect in `task` as in the task `on` of the folder."""
    hidden, asked = goal_task(on), goal_task(task)
    same = body(on) == body(task) and (hidden is None) == (asked is None)
    if hidden is not None and asked is not None:  # each hidden-goal task holds its actions for a time of its own
        same = hidden.collected_on == asked.collected_on
    if not same:
        raise DataError(f"{folder} was collected on {on!r}, whose actions are none of {task!r}; leave --task out")


def _difference(environment: Environment, states: np.ndarray, actions: np.ndarray) -> Float64[np.ndarray, " M"]:
    """Plays actions from the first state, and returns the largest difference from `states` after each step."""
    environment.set_physics_state(states[0])
    return np.abs(states_after(environment, actions) - states[1:]).max(axis=1)


def _shift(environment: Environment, states: np.ndarray, actions: np.ndarray, by_step: np.ndarray) -> int:
    differs = np.flatnonzero(by_step > 1e-6)
    if not differs.size or len(actions) < 2:
        return 0
    stop = min(int(differs[0]) + _WINDOW, len(actions) - 1)
    bound = _FITS * by_step[: stop + 1].max()
    candidates = {1: (states[1:], actions[:-1]), -1: (states[:-1], actions[1:])}
    for shift, (from_states, with_actions) in candidates.items():
        if _difference(environment, from_states[: stop + 1], with_actions[:stop]).max() <= bound:
            return shift
    return 0


def _spread(one: Callable[[Path], Drift], paths: Sequence[Path], workers: int) -> Iterator[Drift]:
    if workers == 1:
        yield from map(one, paths)
        return
    with worker_pool(min(workers, len(paths))) as submit:
        for future in [submit(one, path) for path in paths]:
            yield future.result()


def _replay_file(task: str, path: Path) -> Drift:
    return replay(read_episode(path), task)


@lru_cache(maxsize=1)
def _environment(task: str) -> Environment:
    return make(task)


def _marks(longest: int) -> list[int]:
    """Returns the powers of ten up to the length of the longest episode, and that length."""
    powers = [10**exponent for exponent in range(len(str(longest)))]
    return sorted({*powers, longest})


def _versions(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
