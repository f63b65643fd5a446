"""Evaluates a trained agent in dm_control: python -m agents.evaluate runs/NAME [section.key=value ...]"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from agents import evaluation_state
from agents.agent import Agent, Params
from agents.checkpoint import WEIGHTS, Checkpoints, Meta, versions
from agents.cli import ConfigError, run
from agents.config import Config, load
from agents.continuation import check_command
from agents.datasets import check_existing
from agents.episodes import Condition, check_contexts, conditions, episode_of, episodes_of, is_complete
from agents.goals import foreign_goals, held_out_goals
from agents.identity import (
    Settings,
    check_config,
    check_overrides,
    check_stores,
    check_trained,
    non_default,
    result_settings,
    settings_id,
)
from agents.metrics import check_wandb, log_evaluation
from agents.processes import evaluation_lock
from agents.prompts import context_tokens, held_out, pad_and_order
from agents.registry import make_agent
from agents.results import Result, append_results, read_results
from agents.rollout import initial_rollout_state, make_environments, play
from agents.statistics import summarize, write_summary
from agents.worlds import evaluate_worlds
from data import ChainBatch, DataError, TrajectoryStore
from data.environment_batch import EnvironmentBatch
from data.timesteps import StoredTimesteps
from rlring import request_cpu_devices
from rlring.cli import Parser


class TrainedAgent(NamedTuple):
    """A trained agent, ready to act."""

    config: Config
    agent: Agent
    params: Params
    meta: Meta
    step: int
    folder: Path

    def store(self, task: str) -> TrajectoryStore:
        """Returns the store of a task. Raises ConfigError when its content is not what the agent was trained on; the
        file may have been replaced since."""
        data = self.config.data
        store = TrajectoryStore.open(data.stores[data.tasks.index(task)], task=task)
        check_stores(self.folder, self.meta.stores, [store])
        return store

    @property
    def settings(self) -> Settings:
        """The settings that identify its results."""
        return result_settings(self.config, self.meta.stores, self.meta.updates)


class Evaluation(NamedTuple):
    """new: number of episodes played now. results: all results of these settings and this checkpoint, old and new."""

    new: int
    results: list[Result]


def evaluate(folder: Path, overrides: Sequence[str] = (), *, progress: bool = True) -> int:
    """Evaluates the run in `folder`, appends one line per episode to `<folder>/results.jsonl`, and returns the number
    of new episodes. Conditions already complete for this checkpoint and these settings are skipped; partly written ones
    are completed.
    """
    return evaluation(folder, overrides, progress=progress).new


def evaluation(folder: Path, overrides: Sequence[str] = (), *, progress: bool = True) -> Evaluation:
    """Does what `evaluate` does, and returns the results. Raises DataError when another process evaluates the run."""
    check_run(folder)
    with evaluation_lock(folder):
        return _evaluation(folder, overrides, progress=progress)


def check_run(folder: Path) -> None:
    """Raises ConfigError when a folder does not hold a run of agents.train."""
    if not (folder / "config.json").exists():
        raise ConfigError(f"{folder} is no run: it has no config.json. Give the folder of a training run, runs/NAME.")
    check_command(folder, "agents.train")


def _evaluation(folder: Path, overrides: Sequence[str], *, progress: bool) -> Evaluation:
    loaded = load_agent(folder, overrides)
    config, made_with = loaded.config, settings_id(loaded.settings)
    check_existing(config.data, folder, loaded.meta.stores)
    path = folder / "results.jsonl"

    def measured() -> list[Result]:
        found = read_results(path) if path.exists() else []
        return [r for r in found if (r.settings_id, r.checkpoint_step) == (made_with, loaded.step)]

    before = measured()
    todo = [condition for condition in conditions(config) if not is_complete(before, condition, config)]
    bar = tqdm(total=len(todo), desc=f"{config.name}: evaluate", unit="context", disable=not (progress and todo))
    new = 0
    act, start = jax.jit(loaded.agent.act, donate_argnums=1), jax.jit(loaded.agent.start, static_argnums=2)
    tasks = dict.fromkeys(condition.task for condition in todo)
    for task in tasks:  # so that errors are raised before the first episode is played
        check_contexts(config, loaded.store(task), has_context=loaded.agent.context)
    environments = {task: make_environments(loaded, task, config.evaluate.groups) for task in tasks}
    with bar:
        for condition in todo:
            for results in play_missing(loaded, condition, environments[condition.task], start, act, folder, before):
                append_results(path, results)
                new += len(results)
            evaluation_state.delete(folder)
            bar.update()
    made = partial(Result, **shared_result_fields(loaded))
    new += evaluate_worlds(loaded, path, before, made, progress=progress)
    return Evaluation(new, measured() if new else before)


def load_agent(folder: Path, overrides: Sequence[str] = ()) -> TrainedAgent:
    """Returns the agent of a run's newest checkpoint (or the best one, `evaluate.checkpoint`). The weights are
    replicated over the devices of `evaluate.mesh`."""
    check_run(folder)
    check_overrides(folder, overrides)
    config = load(Config, folder / "config.json", overrides)
    config = config.model_copy(update={"model": config.model.model_copy(update={"fsdp": False})})
    shape = config.evaluate.mesh
    request_cpu_devices(shape.devices)
    mesh = shape.make_mesh()
    with Checkpoints(folder) as checkpoints:
        step = checkpoints.best() if config.evaluate.checkpoint == "best" else checkpoints.latest()
        meta = checkpoints.meta(step)
        check_config(folder, meta.config, load(Config, folder / "config.json"))
        check_trained(folder, meta.config, meta.targets, config)
        agent = make_agent(config, meta.scales, meta.action_size, meta.episode_steps, mesh)
        like = jax.eval_shape(agent.init, jax.random.key(0))
        sharding = SingleDeviceSharding(jax.devices()[0]) if mesh is None else NamedSharding(mesh, P())
        params = checkpoints.restore(like, sharding, part=WEIGHTS, step=step)
        return TrainedAgent(config, agent, params, meta, step, folder)


def play_missing(
    loaded: TrainedAgent,
    condition: Condition,
    environments: EnvironmentBatch,
    start: Callable,
    act: Callable,
    folder: Path,
    before: Sequence[Result],
) -> Iterator[list[Result]]:
    """Yields the results of a condition that are not in `before`, one list per episode of all groups.

    After each episode the state of the evaluation is saved in `folder`. An evaluation that was killed continues with
    the episode that it was in, and gives the same results as an uninterrupted one.
    """
    config, settings = loaded.config, loaded.config.evaluate
    goals = held_out_goals(condition.task, settings.seed, settings.groups)
    target = loaded.meta.targets[condition.task] if settings.target == "typical" else float(settings.target)
    prompt = make_prompt(loaded, condition, goals, target)
    memory = start(loaded.params, prompt, condition.episodes * environments.episode_steps)
    state, first = initial_rollout_state(loaded, condition, prompt, memory), 0
    there = set(map(episode_of, before))
    label = json.dumps([settings_id(loaded.settings), loaded.step, condition, config.model_dump_json(), versions()])
    kept = evaluation_state.restore(folder, label, state)
    if kept is not None and {e for e in episodes_of(condition, config) if e.index < kept[0]} <= there:
        first, state = kept
    for episode in range(first, condition.episodes):
        returns, steps, state = play(loaded, condition, environments, act, state, episode=episode, target=target)
        results = [
            Result(
                **shared_result_fields(loaded),
                task=condition.task,
                context_trajectories=condition.trajectories,
                context_tokens=context_tokens(loaded.agent, prompt),
                mode=condition.mode,
                episode_index=episode,
                return_=float(returns[group]),
                steps=int(steps[group]),
                group=group,
                context=condition.context,
                met=condition.met,
            )
            for group in range(settings.groups)
        ]
        yield [result for result in results if episode_of(result) not in there]
        if episode + 1 < condition.episodes:
            evaluation_state.save(folder, label, episode + 1, state)


def shared_result_fields(loaded: TrainedAgent) -> dict[str, Any]:
    """Returns the fields of `Result` that all results of an agent share."""
    return {
        "experiment": loaded.config.name,
        "agent": loaded.config.agent.kind,
        "seed": loaded.config.seed,
        "evaluation_seed": loaded.config.evaluate.seed,
        "checkpoint_step": loaded.step,
        "versions": versions(),
        "trained_with": loaded.meta.versions,
        "run": loaded.config.name,
        "series": loaded.config.series or loaded.config.name,
        "settings_id": settings_id(loaded.settings),
        "settings": non_default(loaded.settings),
    }


def make_prompt(loaded: TrainedAgent, condition: Condition, goals: np.ndarray | None, target: float) -> ChainBatch:
    """Returns the contexts of all groups, a row each, drawn from held-out episodes, padded and ordered for the mesh."""
    config, agent = loaded.config, loaded.agent
    store = loaded.store(condition.task)
    if loaded.meta.action_size != store.action_size:
        raise DataError(f"{store.path} has {store.action_size} actions; the agent has {loaded.meta.action_size}.")
    if not agent.context:  # then there may be no held-out episodes either
        return StoredTimesteps(store).empty(config.evaluate.groups, np.arange(0))
    sampler = held_out(config, store, condition.met)
    told = goals
    if condition.context == "foreign" and goals is not None:
        told = foreign_goals(condition.task, config.evaluate.seed, goals)
    prompt = sampler.prompt(config.evaluate.seed, config.evaluate.groups, condition.trajectories, told, target)
    return pad_and_order(agent, prompt)


def _interval(row) -> str:
    return "(no interval)" if np.isnan(row.ci_low) else f"[{row.ci_low:.2f}, {row.ci_high:.2f}]"


def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="python -m agents.evaluate", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a training run")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="such as evaluate.groups=64")
    parser.add_argument(
        "--video", action="store_true", help="also write videos, paths and the training loss to the run's report.html"
    )
    arguments = parser.parse_intermixed_args(argv)

    def body() -> None:
        check_run(arguments.run)
        config = load(Config, arguments.run / "config.json", arguments.overrides)
        check_wandb(config.wandb)
        if arguments.video:
            from agents.run_report import check_video, write_run_report

            check_video(config)
        new, results = evaluation(arguments.run, arguments.overrides)
        path = arguments.run / "results.jsonl"
        rows = summarize(results)
        write_summary(arguments.run / "summary.csv", rows)
        for row in rows:
            if row.statistic == "mean":
                print(
                    f"{row.task} {row.mode} {row.context_trajectories} trajectories ({row.context_tokens} tokens): "
                    f"interquartile mean {row.iqm:.2f} {_interval(row)}, mean {row.mean:.2f}, "
                    f"{row.episodes} episodes"
                )
        done = f"{new} episodes appended to {path}"
        looks: list[Path] = []
        if arguments.video:
            report, looks = write_run_report(load_agent(arguments.run, arguments.overrides), rows, results)
            print(f"wrote {report}")
        log_evaluation(arguments.run, config, rows, looks)
        print(done if new else f"nothing to do: {path} holds every episode of checkpoint {results[0].checkpoint_step}")

    return run(body)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
