"""Lists tasks and policies, or checks that a task's rewards can be computed again from stored episodes.

python -m data.tasks
python -m data.tasks walker-walk walker-flip --check
"""

import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from dm_control import suite
from tqdm import tqdm

from data.cli import Parser, run
from data.collect import roll_out
from data.dmc import make
from data.errors import DataError
from data.policies import POLICIES
from data.relabel import relabel, why_refused
from data.tasks import goal_task
from data.tasks.catalogue import check_task, task_names

_WIDTH = 120


class Row(NamedTuple):
    """A row of the table: the values that all tasks listed in it share. Tasks with equal values share a row."""

    domain: str
    observation: int
    action: int
    physics: int
    steps: int
    difference: str
    """The largest difference between the rewards of the environment and those computed from the stored episode."""


def table(tasks: Iterable[str], episodes: int) -> str:
    """Plays `episodes` episodes of each task, computes their rewards again from the stored states, and returns a
    Markdown table of the differences."""
    rows: dict[Row, list[str]] = defaultdict(list)
    for task in tasks:
        rows[_checked(task, episodes)].append(task.split("-", 1)[1])
    lines = [
        "| body | tasks | O | A | P | steps | difference of rewards |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row, names in rows.items():
        sizes = f"{row.observation} | {row.action} | {row.physics} | {row.steps}"
        lines.append(f"| `{row.domain}` | {', '.join(names)} | {sizes} | {row.difference} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    parser = Parser(prog="python -m data.tasks", description="Lists tasks and policies, or checks tasks.")
    parser.add_argument("tasks", nargs="*", metavar="TASK", help="domain-task, or a domain; all if none is named")
    parser.add_argument(
        "--check", action="store_true", help="play each task, compute its rewards again, print a Markdown table"
    )
    parser.add_argument("--episodes", type=int, default=2, help="episodes of a check (default 2)")
    options = parser.parse_args(argv)
    return run(lambda: _command(options.tasks, options.check, options.episodes))


def _command(words: Sequence[str], check: bool, episodes: int) -> None:
    if episodes < 1:
        raise DataError(f"--episodes must be 1 or more; got {episodes}")
    tasks = _named(words)
    if check:
        print(table(tqdm(tasks, unit="task"), episodes))
        return
    in_suite = {f"{domain}-{task}" for domain, task in suite.ALL_TASKS}
    print(f"{len(tasks)} tasks, named domain-task; * are not in dm_control's suite")
    for domain, names in _by_domain(tasks).items():
        print(_wrapped(domain, [name + "*" * (f"{domain}-{name}" not in in_suite) for name in names]))
    print("policies of data.collect")
    for name, policy in POLICIES.items():
        print(f"  {name:18}{(policy.__doc__ or '').splitlines()[0].removeprefix('Returns ')}")


def _named(words: Sequence[str]) -> list[str]:
    """Returns the tasks that `words` name; a word is a task, or a domain for all its tasks."""
    if not words:
        return list(task_names())
    domains = _by_domain(task_names())
    chosen = []
    for word in words:
        if word not in domains:
            check_task(word)
        chosen += [f"{word}-{name}" for name in domains[word]] if word in domains else [word]
    return chosen


def _by_domain(tasks: Iterable[str]) -> dict[str, list[str]]:
    domains = defaultdict(list)
    for task in tasks:
        domain, name = task.split("-", 1)
        domains[domain].append(name)
    return dict(domains)


def _wrapped(domain: str, names: list[str]) -> str:
    lines = [f"  {domain:18}"]
    for name in names:
        if len(lines[-1]) + len(name) + 1 > _WIDTH:
            lines.append(" " * 20)
        lines[-1] += f"{name} "
    return "\n".join(line.rstrip() for line in lines)


def _checked(task: str, episodes: int) -> Row:
    environment = make(task)
    policy = "repeat" if goal_task(task) is None else "waypoints"
    refusal, largest = why_refused(task), 0.0
    for index in range(episodes if refusal is None else 0):
        episode = roll_out(environment, policy, 0, index)
        largest = max(largest, float(np.abs(relabel(task, episode) - episode.reward).max()))
    sizes = environment.observation_space.shape[0], environment.action_space.shape[0], environment.physics_state().size
    difference = f"no: {refusal}" if refusal else f"{largest:.0e}" if largest else "0"
    return Row(task.split("-")[0], *sizes, environment.episode_steps, difference)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
