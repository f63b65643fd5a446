"""Collects data as ExoRL does: episodes of an agent that explores without a task's reward.

python -m agents.explore --task walker --algorithm rnd --steps 1000000 --out datasets/walker/rnd
"""

import sys
from collections.abc import Sequence

from agents.checkpoint import read_metrics
from agents.cli import ConfigError, run
from agents.explore.config import ALGORITHMS, PRESETS, make_config
from agents.explore.exploration import explore
from data.cli import Parser, named_path
from data.tasks.catalogue import check_task, task_names
from rlring.cli import count

# The task whose rewards are recorded in the episodes, for each body of ExoRL and URLB; URLB's choice where it has one.
PRIMAL = {
    "walker": "walker-stand",
    "quadruped": "quadruped-walk",
    "jaco": "jaco-reach_top_left",
    "cheetah": "cheetah-run",
    "hopper": "hopper-hop",
    "cartpole": "cartpole-swingup",
    "point_mass": "point_mass-easy",
    "point_mass_maze": "point_mass_maze-reach_top_left",
    "reacher": "reacher-easy",
}


def full_task(name: str) -> str:
    """Returns the task of this name, or the default task of a body. Raises ConfigError for a body that has none."""
    tasks = [task for task in task_names() if task.split("-")[0] == name]
    if name not in PRIMAL and tasks:
        raise ConfigError(f"--task {name} names a body only. Choose one of its tasks: {', '.join(tasks)}.")
    task = PRIMAL.get(name, name)
    check_task(task)
    return task


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m agents.explore", description=__doc__.splitlines()[0])
    parser.add_argument("--task", required=True, help="a body, such as walker, or a task, such as walker-walk")
    parser.add_argument("--algorithm", required=True, help=", ".join(ALGORITHMS))
    parser.add_argument(
        "--steps", required=True, type=count, help="total number of steps; the last episode is completed"
    )
    parser.add_argument("--out", required=True, help="folder for the episodes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--episode-steps", type=count, default=None, help="steps per episode (default: the task's)")
    parser.add_argument("--preset", default="urlb", help=f"{', '.join(PRESETS)} (default urlb)")
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="such as learner.width=256")
    options = parser.parse_intermixed_args(argv)

    def body() -> None:
        settings = {
            "task": full_task(options.task),
            "algorithm": options.algorithm,
            "seed": options.seed,
            "episode_steps": options.episode_steps,
        }
        config = make_config(settings, options.preset, options.overrides)
        out = named_path("--out", options.out)
        explore(config, options.steps, out, resume=options.resume)
        last = read_metrics(out / "explore/metrics.jsonl")[-1]
        print(f"{out}: {last['episode'] + 1:,} episodes, {last['step']:,} steps, coverage {last['coverage']:.1%}")

    return run(body)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
