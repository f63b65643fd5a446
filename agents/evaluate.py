"""Evaluates a trained agent in dm_control: python -m agents.evaluate runs/NAME [section.key=value ...]"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from agents.agent import Agent, Memory, Now, Params
from agents.checkpoint import Checkpoints, Meta, versions
from agents.cli import ConfigError, run
from agents.config import Config, load
from agents.kinds import make_agent
from agents.prompts import context_tokens, laid_out
from agents.results import Result, append_results, read_results
from agents.statistics import summarize, write_summary
from agents.worlds import evaluate_worlds, is_map
from data import ChainBatch, ChainSampler, DataError, TrajectoryStore
from data.dmc import EnvironmentBatch
from data.tasks import goal_task
from rlring import make_mesh, request_cpu_devices

GROUPS_OF_A_SEED = 1_000_000


class Condition(NamedTuple):
    """One context under which an agent is evaluated."""

    task: str
    mode: str
    trajectories: int
    context: str
    """own, foreign (of another goal), or none."""
    episodes: int


class Loaded(NamedTuple):
    """A trained agent, ready to act."""

    config: Config
    agent: Agent
    params: Params
    meta: Meta
    step: int


def evaluate(folder: Path, overrides: Sequence[str] = (), *, progress: bool = True) -> int:
    """Appends a line an episode to `<folder>/results.jsonl` and returns how many were new. Conditions that are there
    already, of the same checkpoint and seed, are not run again; a half-written one is.
    """
    loaded = load_agent(folder, overrides)
    config = loaded.config
    path = folder / "results.jsonl"
    before = read_results(path) if path.exists() else []
    todo = [condition for condition in conditions(config) if not is_complete(before, condition, loaded)]
    bar = tqdm(total=len(todo), desc=f"{config.name}: evaluate", unit="context", disable=not (progress and todo))
    new = 0
    act, start = jax.jit(loaded.agent.act, donate_argnums=1), jax.jit(loaded.agent.start, static_argnums=2)
    environments: dict[str, EnvironmentBatch] = {}
    for condition in todo:
        if condition.task not in environments:
            environments[condition.task] = EnvironmentBatch(condition.task, config.evaluate.groups)
        results = run_condition(loaded, condition, environments[condition.task], start, act)
        append_results(path, results)
        new += len(results)
        bar.update()
    bar.close()
    made = partial(Result, **common(loaded))
    return new + evaluate_worlds(
        loaded, path, before, made, first_group=group_id(config.evaluate.seed, 0), progress=progress
    )


def load_agent(folder: Path, overrides: Sequence[str] = ()) -> Loaded:
    """Returns the agent of a run's newest (or best) checkpoint, on the mesh of `evaluate.mesh`, weights whole on every
    device."""
    if not (folder / "config.json").exists():
        raise ConfigError(f"{folder} is no run: it has no config.json. Give the folder of a training run, runs/NAME.")
    config = load(Config, folder / "config.json", overrides)
    config = config.model_copy(update={"model": config.model.model_copy(update={"fsdp": False})})
    shape = config.evaluate.mesh
    request_cpu_devices(shape.devices)
    mesh = make_mesh(**shape.model_dump()) if shape.devices > 1 else None
    with Checkpoints(folder) as checkpoints:
        step = checkpoints.best() if config.evaluate.checkpoint == "best" else checkpoints.latest()
        meta = checkpoints.meta(step)
        agent = make_agent(config, meta.scales, meta.action_size, meta.episode_steps, mesh)
        like = jax.eval_shape(agent.init, jax.random.key(0))
        sharding = SingleDeviceSharding(jax.devices()[0]) if mesh is None else NamedSharding(mesh, P())
        # The state of training is (weights, optimizer state).
        params = checkpoints.restore(like, sharding, part="0.", step=step)
        return Loaded(config, agent, params, meta, step)


def conditions(config: Config) -> Iterator[Condition]:
    """Yields every context that a config asks for."""
    own = config.evaluate
    for task in config.data.tasks:
        if is_map(task):
            continue  # `agents.worlds`
        if "prompted" in own.modes:
            for trajectories in own.contexts:
                context = "own" if trajectories else "none"
                yield Condition(task, "prompted", trajectories, context, own.episodes)
                if own.foreign and trajectories and goal_task(task) is not None:
                    yield Condition(task, "prompted", trajectories, "foreign", own.episodes)
        if "self" in own.modes:
            yield Condition(task, "self", 0, "none", own.self_episodes)


def run_condition(loaded: Loaded, condition: Condition, environments: EnvironmentBatch, start, act) -> list[Result]:
    """Returns the results of every episode of every group, all groups in lock step.

    Groups (goals, starts, contexts) are functions of `evaluate.seed` alone, the same for every agent and every
    context length.
    """
    config, own = loaded.config, loaded.config.evaluate
    groups = own.groups
    goals = held_out_goals(condition.task, own.seed, groups)
    target = loaded.meta.targets[condition.task] if own.target == "typical" else float(own.target)
    prompt = make_prompt(loaded, condition, goals, target)
    memory: Memory = start(loaded.params, prompt, condition.episodes * environments.episode_steps)
    label = [ord(letter) for letter in f"{condition.mode}/{condition.trajectories}/{condition.context}"]
    key = jax.random.key(int(np.random.SeedSequence([own.seed, config.seed, *label]).generate_state(1)[0]))
    previous_action = jnp.asarray(last_of(prompt.action, prompt))
    previous_reward = last_of(prompt.reward, prompt)

    results = []
    for episode in range(condition.episodes):
        seeds = [(own.seed, group, episode) for group in range(groups)]
        observation = environments.reset(seeds, goals)
        return_to_go = np.full(groups, target, np.float32)
        total, steps = np.zeros(groups), np.zeros(groups, int)
        for step in range(environments.episode_steps):
            running = ~environments.over
            if not running.any():
                break
            now = Now(observation, previous_action, previous_reward, return_to_go, np.full(groups, step, np.int32))
            key, sampling = jax.random.split(key)
            action, memory = act(loaded.params, memory, now, sampling if own.sample else None)
            taken = environments.step(np.asarray(action))
            observation, reward = taken.observation, taken.reward.astype(np.float32)
            return_to_go = return_to_go - reward
            total += taken.reward
            steps += running
            previous_action, previous_reward = action, reward
        results += [
            Result(
                **common(loaded),
                task=condition.task,
                context_trajectories=condition.trajectories,
                context_tokens=context_tokens(loaded.agent, prompt),
                mode=condition.mode,
                episode_index=episode,
                return_=float(total[group]),
                steps=int(steps[group]),
                group=group_id(own.seed, group),
                context=condition.context,
            )
            for group in range(groups)
        ]
    return results


def common(loaded: Loaded) -> dict[str, Any]:
    """Returns what all results of an agent have in common."""
    return {
        "experiment": loaded.config.name,
        "agent": loaded.config.agent.kind,
        "seed": loaded.config.seed,
        "checkpoint_step": loaded.step,
        "versions": loaded.meta.versions,
    }


def held_out_goals(task: str, seed: int, groups: int) -> np.ndarray | None:
    """Returns the goals of evaluation, drawn as the environment draws them; None for tasks that hide none.

    Training never sees them: its goals are where trajectories happened to end.
    """
    hidden = goal_task(task)
    if hidden is None:
        return None
    return np.stack([hidden.sample_goal(np.random.default_rng((seed, group))) for group in range(groups)])


def make_prompt(loaded: Loaded, condition: Condition, goals: np.ndarray | None, target: float) -> ChainBatch:
    """Returns the contexts of all groups, drawn from held-out episodes, padded and ordered for the mesh."""
    config, agent = loaded.config, loaded.agent
    store = TrajectoryStore.open(config.data.stores[config.data.tasks.index(condition.task)], task=condition.task)
    if loaded.meta.action_size != store.action_size:
        raise DataError(f"{store.path} has {store.action_size} actions; the agent has {loaded.meta.action_size}.")
    sampler = ChainSampler(
        store,
        trajectories=max(1, condition.trajectories),
        sort=config.chain.sort,
        seed=config.seed,
        split="held_out",
        held_out=config.data.held_out,
    )
    told = np.roll(goals, 1, axis=0) if condition.context == "foreign" else goals
    trajectories = condition.trajectories if agent.context else 0
    prompt = sampler.prompt(config.evaluate.seed, config.evaluate.groups, trajectories, told, target)
    if not agent.context:
        return prompt
    return laid_out(agent, prompt)


def last_of(values: np.ndarray, prompt: ChainBatch) -> np.ndarray:
    """Returns the entry of each row's last real moment, zeros where there is none: values [B, M, ...] -> [B, ...]."""
    if not values.shape[1]:
        return np.zeros((len(values), *values.shape[2:]), np.float32)
    position = np.where(prompt.segment >= 0, prompt.position, -1)
    last = position.argmax(axis=1)
    own = values[np.arange(len(values)), last]
    return np.where((position.max(axis=1) >= 0).reshape(-1, *[1] * (own.ndim - 1)), own, 0).astype(np.float32)


def group_id(seed: int, index: int) -> int:
    """Returns the number by which results know a goal (or start): of two evaluation seeds no two groups are the
    same."""
    return seed * GROUPS_OF_A_SEED + index


def is_complete(results: Sequence[Result], condition: Condition, loaded: Loaded) -> bool:
    """Whether every episode of every group of a condition is among the results, of this checkpoint."""
    own = loaded.config.evaluate
    wanted = {
        (group_id(own.seed, index), episode) for index in range(own.groups) for episode in range(condition.episodes)
    }
    return wanted <= {
        (result.group, result.episode_index)
        for result in results
        if (result.task, result.mode, result.context_trajectories, result.context, result.checkpoint_step)
        == (condition.task, condition.mode, condition.trajectories, condition.context, loaded.step)
    }


def evaluate_oracle(config: Config) -> list[Result]:
    """Returns what the scripted controller that knows the goal earns on the groups of a config: the ceiling of a
    plot."""
    results = []
    own = config.evaluate
    for task in config.data.tasks:
        hidden = goal_task(task)
        if hidden is None:
            continue
        environments = EnvironmentBatch(task, own.groups)
        goals = held_out_goals(task, own.seed, own.groups)
        environments.reset([(own.seed, group, 0) for group in range(own.groups)], goals)
        total = np.zeros(own.groups)
        for _ in range(environments.episode_steps):
            total += environments.step(hidden.oracle(environments.physics_states(), goals)).reward
        results += [
            Result(
                experiment=config.name,
                agent="oracle",
                task=task,
                seed=0,
                context_trajectories=0,
                context_tokens=0,
                mode="prompted",
                episode_index=0,
                return_=float(total[index]),
                steps=environments.episode_steps,
                checkpoint_step=0,
                versions=versions(),
                group=group_id(own.seed, index),
                context="none",
            )
            for index in range(own.groups)
        ]
    return results


def _interval(row) -> str:
    return "(no interval)" if np.isnan(row.ci_low) else f"[{row.ci_low:.2f}, {row.ci_high:.2f}]"


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m agents.evaluate", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a training run")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="such as evaluate.groups=64")
    arguments = parser.parse_args(argv)

    def body() -> None:
        new = evaluate(arguments.run, arguments.overrides)
        path = arguments.run / "results.jsonl"
        if not new:
            print(f"nothing to do: {path} holds every episode already")
            return
        rows = summarize(read_results(path))
        write_summary(arguments.run / "summary.csv", rows)
        for row in rows:
            if row.statistic == "mean":
                print(
                    f"{row.task} {row.mode} {row.context_trajectories} trajectories ({row.context_tokens} tokens): "
                    f"interquartile mean {row.iqm:.2f} {_interval(row)}, mean {row.mean:.2f}, "
                    f"{row.episodes} episodes"
                )
        print(f"{new} episodes appended to {path}")

    return run(body)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
