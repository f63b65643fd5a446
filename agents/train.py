"""Trains one agent from a config.

    python -m agents.train CONFIG.toml [section.key=value ...] [--resume]

On several hosts, every host runs the same command with --cluster and shares the run folder. The first process writes
the results.
"""

import resource
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from agents.agent import Scales
from agents.batches import batches
from agents.checkpoint import Checkpoints, Meta, read_metrics, versions
from agents.cli import run
from agents.config import Config, load
from agents.continuation import (
    DIVERGED,
    check_folder,
    check_trained_so_far,
    continued,
    newest,
    note_changes,
    set_aside,
)
from agents.datasets import open_stores
from agents.identity import check_total, records
from agents.metrics import check_wandb, claim, metrics_log
from agents.optimizer import schedule
from agents.processes import check_processes, run_on_first_process, stop_requests, training_lock
from agents.registry import make_agent
from agents.training_loop import Logged, Loop, run_updates
from agents.update import first_state, make_update
from data import ChainSampler, TrajectoryStore
from data.tasks import goal_task
from rlring import UsageError, join_cluster, processes, request_cpu_devices
from rlring.cli import Parser, count

RUNS = Path("runs")
DETECTED = "detected"


def train(config: Config, *, resume: bool = False, progress: bool = True) -> Path:
    """Trains until `config.train.updates` and returns the run's folder, `runs/<name>`.

    Batches, losses and weights depend on the config alone. A run that was killed and resumed logs the same losses as
    an uninterrupted one, and a run of several processes the same losses as a run of one. On another mesh, losses differ
    by rounding. Raises ConfigError when the folder holds another run, DataError when another process is training in it,
    and Diverged (a FloatingPointError) when the loss, the gradient or the weights of a logged update are not finite.
    """
    folder = RUNS / config.name
    request_cpu_devices(-(-config.mesh.devices // processes()))
    with training_lock(folder):
        return _train(folder, config, resume=resume, progress=progress)


def _train(folder: Path, config: Config, *, resume: bool, progress: bool) -> Path:
    starts_over = check_folder(folder, config, resume=resume)
    check_wandb(config.wandb)
    mesh = config.mesh.make_mesh()
    check_processes(mesh)
    is_first = jax.process_index() == 0
    # Called in every process: the first may already have moved the folder when another one checks it.
    run_on_first_process(lambda: starts_over and set_aside(folder))
    first, before = newest(folder)
    check_trained_so_far(folder, before, config)
    check_total(folder, first, config.train.updates)
    kept = before.stores if before is not None else {}
    stores = run_on_first_process(partial(open_stores, config.data, owner=folder, kept=kept))
    if stores is None:  # the first process has built the missing stores
        stores = open_stores(config.data.model_copy(update={"collect": None}), owner=folder, kept=kept)
    if before is not None and is_first:
        note_changes(folder, before, versions())
    meta = continued(describe(config, stores), before, config)
    agent = make_agent(config, meta.scales, meta.action_size, meta.episode_steps, mesh)
    sampler = agent.sampler(stores)
    if before is None:
        meta = meta._replace(targets=sampler.typical_targets())
    wandb_run = run_on_first_process(partial(claim, folder, config))
    optimizer = agent.optimizer()
    keeps = {"keep": config.train.keep_checkpoints, "keep_best": config.train.keep_best}

    with Checkpoints(folder, **keeps) as checkpoints, stop_requests(checkpoints) as stop:
        state, sharding = first_state(config, agent, optimizer, mesh)
        if first:
            state = checkpoints.restore(state, sharding)
        tokens = config.train.batch * sampler.timesteps * agent.tokens_per_timestep
        made = batches(config, agent, sampler, first, mesh)
        show = progress and is_first
        bar = tqdm(total=config.train.updates, initial=first, desc=config.name, unit="update", disable=not show)
        with bar, closing(made), metrics_log(folder / "metrics.jsonl", first, wandb_run) as write:
            run = Loop(
                folder,
                config.train,
                made,
                make_update(agent, optimizer, mesh, sharding, accumulate=config.train.accumulate),
                loss="loss/action",
                log=partial(_log, config, tokens, write),
                save=lambda done, state, loss: checkpoints.save(done, state, meta, loss=loss),
                stops=stop,
            )
            _, done = run_updates(run, state, first, bar)
        if done < config.train.updates:
            raise KeyboardInterrupt
    (folder / DIVERGED).unlink(missing_ok=True)
    return folder


def _log(config: Config, tokens: int, write: Callable[[dict[str, float]], None], logged: Logged, bar: tqdm) -> None:
    """Writes the metrics of an update. `tokens`: tokens per update."""
    rate, values = logged.updates_per_second, logged.metrics
    more = {
        "learning_rate": float(schedule(config.optimizer, config.train.updates)(logged.update)),
        "throughput/updates_per_second": rate,
        "throughput/tokens_per_second": rate * tokens,
        "memory/peak_bytes": peak_bytes(),
    }
    write({"step": logged.update + 1} | values | more)
    bar.set_postfix_str(f"loss {values['loss/action']:.3f}, {rate * tokens:,.0f} tokens/s")


def describe(config: Config, stores: Sequence[TrajectoryStore]) -> Meta:
    """Returns the metadata that follow from the data. The targets stay empty until there is an agent."""
    statistics, task = stores[0].statistics, goal_task(stores[0].task)
    signs = 0 if task is None else task.sign_size  # signs are not in the store, and need no normalisation
    scales = Scales(
        observation_mean=np.pad(np.float32(statistics.observation_mean), (0, signs)),
        observation_std=np.pad(statistics.observation_scale, (0, signs), constant_values=1),
        return_to_go=max(1.0, *(return_scale(config, store) for store in stores)),
    )
    episode_steps = int(max(store.lengths.max() for store in stores))
    return Meta(
        scales,
        {},
        stores[0].action_size,
        episode_steps,
        versions(),
        config.model_dump(mode="json"),
        records(stores),
    )


def return_scale(config: Config, store: TrajectoryStore) -> float:
    """Returns the typical return that chains of a store ask for."""
    return ChainSampler(
        store, trajectories=1, target="own", seed=config.seed, held_out=config.data.held_out
    ).typical_target()


def peak_bytes() -> int:
    """Returns the peak memory so far in bytes: of the fullest local device, or of the process where none reports it."""
    statistics = [device.memory_stats() for device in jax.local_devices()]
    if all(statistics):
        return max(entry["peak_bytes_in_use"] for entry in statistics)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="python -m agents.train", description=__doc__.splitlines()[0])
    parser.add_argument("config", help="TOML file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="such as model.width=128")
    parser.add_argument("--resume", action="store_true", help="continue the run from its newest checkpoint")
    parser.add_argument(
        "--cluster",
        nargs="?",
        const=DETECTED,
        metavar="HOST:PORT",
        help="run as one of several processes. Leave out HOST:PORT under Slurm, Kubernetes and Cloud TPU",
    )
    parser.add_argument("--processes", type=int, metavar="N", help="with --cluster HOST:PORT: number of processes")
    parser.add_argument(
        "--process", type=int, metavar="I", help="with --cluster HOST:PORT: index of this process, from 0"
    )
    parser.add_argument(
        "--patience",
        type=count,
        default=100,
        metavar="S",
        help="with --cluster: seconds without a sign of a process until it counts as dead (default 100)",
    )
    arguments = parser.parse_intermixed_args(argv)

    def body() -> int:
        config = load(Config, arguments.config, arguments.overrides)
        if arguments.cluster is not None:
            address = None if arguments.cluster == DETECTED else arguments.cluster
            join_cluster(
                address, processes=arguments.processes, process=arguments.process, patience_s=arguments.patience
            )
        elif arguments.processes is not None or arguments.process is not None:
            raise UsageError("--processes and --process go with --cluster HOST:PORT. Add it, or leave them out.")
        folder = train(config, resume=arguments.resume)
        lines = read_metrics(folder / "metrics.jsonl") if jax.process_index() == 0 else []
        if lines:
            last = lines[-1]
            print(
                f"{folder}: {last['step']} updates, loss {last['loss/action']:.4f}, "
                f"{last['throughput/tokens_per_second']:,.0f} tokens/s, "
                f"peak memory {last['memory/peak_bytes'] / 2**30:.2f} GiB"
            )
        return 0

    return run(body)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
