"""Runs an experiment from nothing to its plot: python -m agents.sweep configs/X.toml [--dry-run]

collect -> build -> train -> evaluate -> plot. Every stage skips what is done, so an interrupted sweep continues with
the same command.
"""

import argparse
import csv
import json
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from agents.checkpoint import Checkpoints
from agents.cli import run
from agents.config import Config, SweepConfig, dump, load
from agents.results import Result, write_results
from data.atomic_file import write_text
from data.tasks import goal_task

SUMMARY, PLOT, REPORT, RESULTS = "summary.csv", "return_vs_context.png", "report.html", "results.jsonl"
DONE = "sweep.json"


def sweep(config: SweepConfig, source: Path) -> Path | None:
    """Runs what is missing of a sweep and returns its folder; None when nothing was."""
    # Imported late: a dry run, and a bad config, answer at once.
    from agents.continuation import check_folder, newest
    from agents.datasets import check_existing, prepare
    from agents.episodes import asked_for
    from agents.evaluate import evaluation
    from agents.oracle import evaluate_oracle
    from agents.train import RUNS, train
    from rlring import request_cpu_devices

    folder = RUNS / config.name
    arms = config.arms()
    runs = [one for _, one in arms]
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - began:4.0f} s] {text}", file=sys.stderr, flush=True)

    if is_done(folder, config):
        return None
    # JAX starts once, with what the largest mesh of any run needs.
    request_cpu_devices(max(max(one.mesh.devices, one.evaluate.mesh.devices) for one in runs))
    kept: dict[str, dict[str, dict]] = {}
    for one in runs:  # before anything is built anew
        starts_over = check_folder(RUNS / one.name, one, resume=True)
        _, meta = (0, None) if starts_over else newest(RUNS / one.name)
        if meta is not None:
            check_existing(one.data, RUNS / one.name, meta.stores)
            kept.setdefault(one.data.model_dump_json(), {}).update(meta.stores)
    for key, data in {one.data.model_dump_json(): one.data for one in runs}.items():
        say(f"episodes {data.episodes}, stores {', '.join(data.stores)}")
        prepare(data, owner=folder, kept=kept.get(key))
    for one in runs:
        if not is_trained(one):
            say(f"train {one.name}: {one.agent.kind}, {one.mesh.devices} devices")
            train(one, resume=True)
    gathered = []
    for agent, one in arms:
        say(f"evaluate {one.name}")
        write_text(RUNS / one.name / "config.json", dump(one))  # what is evaluated may have changed since training
        found = asked_for(evaluation(RUNS / one.name).results, one)
        gathered += [replace(result, agent=agent, experiment=config.name, series=config.name) for result in found]
    if config.baseline:
        oracle = evaluate_oracle(runs[0])
        gathered += [replace(result, experiment=config.name, series=config.name) for result in oracle]
    folder.mkdir(parents=True, exist_ok=True)
    write_results(folder / RESULTS, gathered)
    draw(config, source, folder, gathered)
    write_text(folder / DONE, json.dumps({"config": dump(config), "stores": _stores(config)}, indent=2) + "\n")
    say(f"wrote {folder / PLOT}, {folder / SUMMARY} and {folder / REPORT}")
    return folder


def draw(config: SweepConfig, source: Path, folder: Path, results: Sequence[Result]) -> None:
    """Writes summary, plot and report of a sweep."""
    from agents.plot import plot
    from agents.report import write_report
    from agents.statistics import summarize, write_summary
    from agents.world_figure import plot_worlds

    rows = summarize(results)
    write_summary(folder / SUMMARY, rows)
    title = config.title or config.name
    if any(result.places for result in results):
        trained = max(one.chain.trajectories for one in config.configs())
        drawn, more = plot_worlds(results, folder / PLOT, title, trained=trained), []
    else:
        drawn = plot(results, folder / PLOT, title)
        more = [plot(results, folder / "return_vs_context_mean.png", title, aggregate="mean")]
    if any(result.mode == "self" for result in results):
        more.append(plot(results, folder / "return_vs_episode.png", title, mode="self"))
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
    """Whether a run's last checkpoint is written, with these settings."""
    from agents.continuation import differing_settings
    from agents.train import RUNS

    folder = RUNS / config.name
    if not (folder / "config.json").exists() or differing_settings(folder, config):
        return False  # training then continues it, or says which settings differ
    with Checkpoints(folder) as checkpoints:
        return checkpoints.latest() == config.train.updates


def _stores(config: SweepConfig) -> dict[str, str]:
    """Returns the content of every store that is there, by its path."""
    from data import TrajectoryStore

    paths = {path for one in config.configs() for path in one.data.stores}
    return {path: TrajectoryStore.open(path).content_hash for path in sorted(paths) if Path(path).exists()}


def is_done(folder: Path, config: SweepConfig) -> bool:
    """Whether the sweep ran to its end with these settings, of the stores that are there no other has taken the place,
    and nothing it made has been deleted."""
    if not all((folder / name).exists() for name in (DONE, SUMMARY, PLOT, REPORT, RESULTS)):
        return False
    done = json.loads((folder / DONE).read_text())
    return done.get("config") == dump(config) and _stores(config).items() <= done["stores"].items()


def asked(config: Config) -> str:
    """Returns, in words, the contexts of an evaluation."""
    own = config.evaluate
    if any((task := goal_task(name)) is not None and task.sign_size for name in config.data.tasks):
        return f"worlds of {own.places} places, of which {own.seen} are seen"
    return f"contexts {own.contexts}"


def dry_run(config: SweepConfig) -> None:
    """Prints what a sweep would do."""
    folder = Path("runs") / config.name
    if is_done(folder, config):
        print(f"{folder} is done; nothing would run")
        return
    runs = config.configs()
    for data in {one.data.model_dump_json(): one.data for one in runs}.values():
        for task, store in zip(data.tasks, data.stores, strict=True):
            print(f"data      {task}: {data.episodes} -> {store}{' (there)' if Path(store).exists() else ''}")
    for one in runs:
        started = (Path("runs") / one.name / "config.json").exists()
        print(
            f"train     {one.name}: {one.agent.kind}, {one.train.updates} updates of {one.train.batch} chains of "
            f"{one.chain.trajectories}, {one.mesh.devices} devices{' (started)' if started else ''}"
        )
        print(f"evaluate  {one.name}: {asked(one)}, {one.evaluate.groups} groups each")
    print(f"plot      {folder / PLOT}, {folder / SUMMARY}, {folder / REPORT}")


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m agents.sweep", description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path, help="TOML file of a sweep")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="such as shared.evaluate.groups=64")
    parser.add_argument("--dry-run", action="store_true", help="print what would run, and run nothing")
    arguments = parser.parse_args(argv)

    def body() -> None:
        config = load(SweepConfig, arguments.config, arguments.overrides)
        if arguments.dry_run:
            dry_run(config)
            return
        folder = sweep(config, arguments.config)
        if folder is None:
            print(f"nothing to do: runs/{config.name} is complete; see runs/{config.name}/{PLOT}")
            return
        for row in csv.DictReader((folder / SUMMARY).read_text().splitlines()):
            if row["statistic"] == "mean":
                print(
                    f"{row['agent']:24} {row['context_trajectories']:>4} trajectories: "
                    f"interquartile mean {float(row['iqm']):.2f} "
                    f"[{float(row['ci_low']):.2f}, {float(row['ci_high']):.2f}], mean {float(row['mean']):.2f}"
                )

    return run(body)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
