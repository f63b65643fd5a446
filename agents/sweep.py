"""Runs an experiment from nothing to its plot: python -m agents.sweep configs/X.toml [--dry-run]

The stages are collect, build, train, evaluate and plot. Each stage skips what is already done, so the same command
continues an interrupted sweep.
"""

import csv
import json
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from agents.checkpoint import Checkpoints
from agents.cli import LESS_MEMORY, ConfigError, run
from agents.config import Config, SweepConfig, dump, load
from agents.processes import training_lock
from agents.results import Result, write_results
from data import DataError, cli
from data.atomic_file import write_text
from data.tasks import goal_task
from rlring.cli import Parser, memory_errors
from rlring.errors import UsageError

SUMMARY, PLOT, REPORT, RESULTS = "summary.csv", "return_vs_context.png", "report.html", "results.jsonl"
DONE = "sweep.json"


class Swept(NamedTuple):
    """folder: of the sweep; None when there was nothing to do. failed: the reason of each failed run, by run name."""

    folder: Path | None
    failed: dict[str, str]


def sweep(config: SweepConfig, source: Path) -> Swept:
    """Runs the missing parts of a sweep. When a run fails, the others continue, and the plot leaves it out. Raises
    DataError when another process is running this sweep."""
    folder = Path("runs") / config.name
    with training_lock(folder):
        return _sweep(folder, config, source)


def _sweep(folder: Path, config: SweepConfig, source: Path) -> Swept:
    # Imported late, so that dry runs and config errors take no time.
    from agents.continuation import check_folder, check_free_of_runs, check_trained_so_far, newest
    from agents.datasets import check_existing, prepare
    from agents.episodes import check_contexts, requested_results
    from agents.evaluate import evaluation
    from agents.metrics import check_wandb
    from agents.oracle import evaluate_oracle
    from agents.registry import AGENTS
    from agents.train import RUNS, train
    from data import TrajectoryStore
    from rlring import request_cpu_devices

    arms = config.arms()
    runs = [one for _, one in arms]
    began = time.monotonic()
    failed: dict[str, str] = {}

    def say_time(text: str) -> None:
        cli.say(f"[{time.monotonic() - began:4.0f} s] {text}")

    check_free_of_runs(folder)
    if is_done(folder, config):
        return Swept(None, failed)
    # JAX is initialised once, with enough devices for the largest mesh of all runs.
    request_cpu_devices(max(max(one.mesh.devices, one.evaluate.mesh.devices) for one in runs))
    kept: dict[str, dict[str, dict]] = {}
    for one in runs:  # before anything is built
        check_wandb(one.wandb)
        starts_over = check_folder(RUNS / one.name, one, resume=True)
        _, meta = (0, None) if starts_over else newest(RUNS / one.name)
        check_trained_so_far(RUNS / one.name, meta, one)
        if meta is not None:
            check_existing(one.data, RUNS / one.name, meta.stores)
            kept.setdefault(one.data.model_dump_json(), {}).update(meta.stores)
    for key, data in {one.data.model_dump_json(): one.data for one in runs}.items():
        say_time(f"episodes {data.episodes}, stores {', '.join(data.stores)}")
        with going_on(failed, *(one.name for one in runs if one.data == data)):
            prepare(data, owner=folder, kept=kept.get(key))
    for one in runs:  # so that errors are raised before training
        with going_on(failed, one.name):
            if one.name not in failed:
                for task, path in zip(one.data.tasks, one.data.stores, strict=True):
                    store = TrajectoryStore.open(path, task=task)
                    check_contexts(one, store, has_context=AGENTS[one.agent.kind].context)
    for one in runs:
        with going_on(failed, one.name):
            if one.name not in failed and not is_trained(one):
                say_time(f"train {one.name}: {one.agent.kind}, {one.mesh.devices} devices")
                train(one, resume=True)
    gathered = []
    for agent, one in arms:
        with going_on(failed, one.name):
            if one.name not in failed:
                say_time(f"evaluate {one.name}")
                # The evaluation settings may have changed since training.
                write_text(RUNS / one.name / "config.json", dump(one))
                found = requested_results(evaluation(RUNS / one.name).results, one)
                gathered += [
                    replace(result, agent=agent, experiment=config.name, series=config.name) for result in found
                ]
    if not gathered:
        return Swept(folder, failed)
    if config.baseline:
        oracle = evaluate_oracle(runs[0])
        gathered += [replace(result, experiment=config.name, series=config.name) for result in oracle]
    folder.mkdir(parents=True, exist_ok=True)
    write_results(folder / RESULTS, gathered)
    draw(config, source, folder, gathered, without=list(failed))
    if not failed:
        write_text(folder / DONE, json.dumps({"config": dump(config), "stores": _stores(config)}, indent=2) + "\n")
    say_time(f"wrote {folder / PLOT}, {folder / SUMMARY} and {folder / REPORT}")
    return Swept(folder, failed)


@contextmanager
def going_on(failed: dict[str, str], *names: str) -> Iterator[None]:
    """Catches the errors that a command reports in one line, and records them in `failed` under the given run names.
    A full disk concerns all runs, so that error is raised."""
    try:
        with memory_errors(LESS_MEMORY):
            yield
    except (ConfigError, DataError, UsageError) as error:
        why = str(error)
    except OSError as error:
        if error.errno in cli.DISK_FULL:
            raise
        why = cli.describe(error)
    else:
        return
    failed.update(dict.fromkeys(names, why))
    cli.say(f"failed: {', '.join(names)}: {why}")


def draw(
    config: SweepConfig, source: Path, folder: Path, results: Sequence[Result], *, without: Sequence[str] = ()
) -> None:
    """Writes the summary, the plots and the report of a sweep. Their title names the failed runs (`without`)."""
    from agents.plot import plot
    from agents.report import write_report
    from agents.statistics import summarize, write_summary
    from agents.training_figure import draw_training
    from agents.world_figure import plot_worlds

    rows = summarize(results)
    write_summary(folder / SUMMARY, rows)
    title = config.title or config.name
    if without:
        title += f" (without {', '.join(without)}: failed)"
    if any(result.places for result in results):
        trained = max(one.chain.trajectories for one in config.configs())
        drawn, more = plot_worlds(results, folder / PLOT, title, trained=trained), []
    else:
        is_rare = any(result.met for result in results)  # then the predicted line is a line of means
        drawn = plot(results, folder / PLOT, title, aggregate="mean" if is_rare else "iqm")
        more = [] if is_rare else [plot(results, folder / "return_vs_context_mean.png", title, aggregate="mean")]
    if any(result.mode == "self" for result in results):
        more.append(plot(results, folder / "return_vs_episode.png", title, mode="self"))
    folders: dict[str, list[Path]] = {}
    for arm, one in config.arms():
        folders.setdefault(arm, []).append(Path("runs") / one.name)
    training = draw_training(folders, folder / "training.png")
    more += [training] if training else []
    write_report(
        folder / REPORT,
        title=title,
        plot=drawn,
        more_plots=more,
        rows=rows,
        results=results,
        commands=[f"python -m agents.sweep {shlex.quote(str(source))}"],
        config=dump(config),
    )


def is_trained(config: Config) -> bool:
    """Whether the run has these settings and its last checkpoint is written."""
    from agents.continuation import differing_settings
    from agents.train import RUNS

    folder = RUNS / config.name
    if not (folder / "config.json").exists() or differing_settings(folder, config):
        return False  # training then continues the run, or raises naming the settings that differ
    with Checkpoints(folder) as checkpoints:
        return checkpoints.latest() == config.train.updates


def _stores(config: SweepConfig) -> dict[str, str]:
    """Returns the content hash of every existing store, by path."""
    from data import TrajectoryStore

    paths = {path for one in config.configs() for path in one.data.stores}
    return {path: TrajectoryStore.open(path).content_hash for path in sorted(paths) if Path(path).exists()}


def is_done(folder: Path, config: SweepConfig) -> bool:
    """Whether the sweep is complete: it finished with these settings, its output files exist, and none of the existing
    stores has changed since."""
    if not all((folder / name).exists() for name in (DONE, SUMMARY, PLOT, REPORT, RESULTS)):
        return False
    try:
        done = json.loads((folder / DONE).read_text())
    except ValueError:
        return False
    if not isinstance(done, dict) or not isinstance(done.get("stores"), dict):
        return False
    return done.get("config") == dump(config) and _stores(config).items() <= done["stores"].items()


def describe_contexts(config: Config) -> str:
    """Returns a description of the contexts of an evaluation."""
    settings = config.evaluate
    if any((task := goal_task(name)) is not None and task.sign_size for name in config.data.tasks):
        return f"worlds of {settings.places} places, of which {settings.seen} are seen"
    return f"contexts {settings.contexts}"


def dry_run(config: SweepConfig) -> None:
    """Prints what a sweep would do."""
    from agents.continuation import check_folder, check_free_of_runs

    folder = Path("runs") / config.name
    check_free_of_runs(folder)
    if is_done(folder, config):
        print(f"{folder} is done; nothing would run")
        return
    runs = config.configs()
    for one in runs:
        check_folder(Path("runs") / one.name, one, resume=True)
    for data in {one.data.model_dump_json(): one.data for one in runs}.values():
        for task, store in zip(data.tasks, data.stores, strict=True):
            print(f"data      {task}: {data.episodes} -> {store}{' (there)' if Path(store).exists() else ''}")
    for one in runs:
        started = (Path("runs") / one.name / "config.json").exists()
        print(
            f"train     {one.name}: {one.agent.kind}, {one.train.updates} updates of {one.train.batch} chains of "
            f"{one.chain.trajectories}, {one.mesh.devices} devices{' (started)' if started else ''}"
        )
        print(f"evaluate  {one.name}: {describe_contexts(one)}, {one.evaluate.groups} groups each")
    print(f"plot      {folder / PLOT}, {folder / SUMMARY}, {folder / REPORT}")


def show(folder: Path) -> None:
    """Prints the mean returns of a finished sweep, from its summary.csv."""
    for row in csv.DictReader((folder / SUMMARY).read_text().splitlines()):
        if row["statistic"] == "mean":
            print(
                f"{row['agent']:24} {row['context_trajectories']:>5} trajectories: mean {float(row['mean']):.2f} "
                f"[{float(row['mean_ci_low']):.2f}, {float(row['mean_ci_high']):.2f}]"
                + (f", predicted {float(row['predicted']):.2f}" if row["predicted"] else "")
                + f", interquartile mean {float(row['iqm']):.2f}"
            )


def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="python -m agents.sweep", description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path, help="TOML file of a sweep")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="such as shared.evaluate.groups=64")
    parser.add_argument("--dry-run", action="store_true", help="print what would run, and run nothing")
    arguments = parser.parse_intermixed_args(argv)

    def body() -> None:
        config = load(SweepConfig, arguments.config, arguments.overrides)
        if arguments.dry_run:
            dry_run(config)
            return
        folder, failed = sweep(config, arguments.config)
        if folder is None:
            print(f"nothing to do: runs/{config.name} is complete; see runs/{config.name}/{PLOT}")
        elif (folder / SUMMARY).exists():
            show(folder)
        if failed:
            for name, why in failed.items():
                cli.say(f"failed: {name}: {why}")
            raise ConfigError(
                f"{len(failed)} of {len(config.configs())} runs failed, for the reasons above. Mend them, and run the "
                "same command again: what is done is not done again."
            )

    return run(body)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
