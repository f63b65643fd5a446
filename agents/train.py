"""Trains one agent from a config: python -m agents.train CONFIG.toml [section.key=value ...] [--resume]"""

import argparse
import json
import math
import resource
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import grain.python as grain
import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from agents.agent import Agent, Sampler, Scales
from agents.checkpoint import Checkpoints, Meta, read_metrics, versions
from agents.cli import ConfigError, run
from agents.config import Config, dump, load
from agents.datasets import open_stores
from agents.kinds import make_agent
from agents.optimizer import make_optimizer, schedule
from data import ChainBatch, ChainSampler, TrajectoryStore
from data.atomic_file import write_text
from rlring import SEQUENCE_AXES, make_mesh, request_cpu_devices

RUNS = Path("runs")


class Batches:
    """Update -> its batch, padded and ordered for the mesh. Picklable, so that worker processes can make batches."""

    def __init__(self, sampler: Sampler, rows: int, order: np.ndarray | None):
        self.sampler, self.rows, self.order = sampler, rows, order

    def __call__(self, update: int) -> ChainBatch:
        batch = self.sampler.sample(int(update), range(self.rows))
        return batch if self.order is None else batch.take(self.order)


def train(config: Config, *, resume: bool = False, progress: bool = True) -> Path:
    """Trains until `config.train.updates` and returns the run's folder, `runs/<name>`.

    Batches, losses and weights are functions of the config alone, so a run that was killed and resumed logs the very
    losses of one that was not. Raises ConfigError when the folder holds another run, FloatingPointError at the first
    loss that is no number.
    """
    folder = RUNS / config.name
    _check_folder(folder, config, resume)
    request_cpu_devices(config.mesh.devices)
    mesh = make_mesh(**config.mesh.model_dump()) if config.mesh.devices > 1 else None
    stores = open_stores(config.data, say=lambda text: print(text, file=sys.stderr))
    meta = describe(config, stores)
    agent = make_agent(config, meta.scales, meta.action_size, meta.episode_steps, mesh)
    sampler = agent.sampler(stores)
    meta = meta._replace(targets=targets(sampler, stores))
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "config.json", dump(config))
    optimizer = make_optimizer(config)
    replicated = NamedSharding(mesh, P()) if mesh is not None else SingleDeviceSharding(jax.devices()[0])

    with Checkpoints(folder, keep=config.train.keep_checkpoints) as checkpoints, _stop_requests() as stop:
        params = jax.device_put(agent.init(jax.random.key(config.seed)), replicated)
        state = (params, jax.jit(optimizer.init, out_shardings=replicated)(params))
        first = checkpoints.latest() or 0
        if first:
            state = checkpoints.restore(state, replicated)
        update_state = make_update(agent, optimizer)
        tokens = config.train.batch * sampler.moments * agent.tokens_per_moment
        bar = tqdm(total=config.train.updates, initial=first, desc=config.name, unit="update", disable=not progress)
        with bar, _metrics(folder / "metrics.jsonl", config, first) as log:
            last_time, last_update, saved = time.monotonic(), first, first
            for update, batch in batches(config, agent, sampler, first, mesh):
                state, metrics = update_state(state, batch)
                done = update + 1
                ends = done == config.train.updates or stop()
                saves = ends or done % config.train.checkpoint_every == 0
                if saves or done % config.train.log_every == 0 or done == first + 1:
                    values = {name: float(value) for name, value in metrics.items()}
                    _refuse_nan(values, done, folder, saved)
                    if done % config.train.log_every == 0 or ends:
                        now = time.monotonic()
                        rate = (done - last_update) / max(now - last_time, 1e-9)
                        last_time, last_update = now, done
                        values |= {
                            "learning_rate": float(schedule(config)(update)),
                            "throughput/updates_per_second": rate,
                            "throughput/tokens_per_second": rate * tokens,
                            "memory/peak_bytes": peak_bytes(),
                        }
                        log({"step": done} | values)
                        bar.set_postfix_str(f"loss {values['loss/action']:.3f}, {rate * tokens:,.0f} tokens/s")
                bar.update()
                if saves:
                    checkpoints.save(done, state, meta)
                    saved = done
                if ends:
                    break
        if stop():
            raise KeyboardInterrupt
    return folder


def describe(config: Config, stores: Sequence[TrajectoryStore]) -> Meta:
    """Returns what the data tells about inputs; targets are filled in once there is an agent."""
    statistics = stores[0].statistics
    scales = Scales(
        observation_mean=np.asarray(statistics.observation_mean, np.float32),
        observation_std=np.maximum(np.asarray(statistics.observation_std, np.float32), 1e-3),
        return_to_go=max(1.0, *(return_scale(config, store) for store in stores)),
    )
    episode_steps = int(max(store.lengths.max() for store in stores))
    return Meta(scales, {}, stores[0].action_size, episode_steps, versions())


def return_scale(config: Config, store: TrajectoryStore) -> float:
    """Returns the size of the returns that chains of a store ask for."""
    return ChainSampler(
        store, trajectories=1, target="own", seed=config.seed, held_out=config.data.held_out
    ).typical_target()


def targets(sampler: Sampler, stores: Sequence[TrajectoryStore]) -> dict[str, float]:
    """Returns the typical return that training chains ask for, by task."""
    samplers = getattr(sampler, "samplers", [sampler])
    return {store.task: float(own.typical_target()) for store, own in zip(stores, samplers, strict=True)}


def make_update(agent: Agent, optimizer: optax.GradientTransformation):
    """Returns the jitted step `((params, optimizer state), batch) -> (state, metrics)`; the old state's memory is
    reused."""

    def update(state: tuple, batch: ChainBatch) -> tuple[tuple, dict[str, jax.Array]]:
        params, optimizer_state = state
        (_, metrics), gradients = jax.value_and_grad(agent.loss, has_aux=True)(params, batch)
        changes, optimizer_state = optimizer.update(gradients, optimizer_state, params)
        metrics = metrics | {"gradient/global_norm": optax.global_norm(gradients)}
        return (optax.apply_updates(params, changes), optimizer_state), metrics

    return jax.jit(update, donate_argnums=0)


def batches(
    config: Config, agent: Agent, sampler: Sampler, first: int, mesh: Mesh | None
) -> Iterator[tuple[int, ChainBatch]]:
    """Yields every update from `first` on with its batch on the devices, made ahead by grain."""
    make = Batches(sampler, config.train.batch, agent.order(sampler.moments))
    dataset = grain.MapDataset.range(first, config.train.updates).map(make)
    if config.train.workers:
        stream = dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
        stream = stream.mp_prefetch(grain.MultiprocessingOptions(num_workers=config.train.workers))
    else:
        stream = dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=config.train.prefetch))
    for update, batch in zip(range(first, config.train.updates), stream, strict=True):
        yield update, place(batch, mesh)


def place(batch: ChainBatch, mesh: Mesh | None) -> ChainBatch:
    """Returns a host batch on the devices: rows over "data", moments over the sequence axes."""
    if mesh is None:
        return jax.device_put(batch)
    return jax.device_put(batch, NamedSharding(mesh, P("data", SEQUENCE_AXES)))


def peak_bytes() -> int:
    """Returns the peak memory so far: of the fullest device where devices tell, else of this process."""
    statistics = [device.memory_stats() for device in jax.local_devices()]
    if all(statistics):
        return max(entry["peak_bytes_in_use"] for entry in statistics)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _check_folder(folder: Path, config: Config, resume: bool) -> None:
    """A run's folder is never written by another run."""
    if not (folder / "config.json").exists():
        return
    if not resume:
        raise ConfigError(
            f"{folder} already holds a run. Add --resume to continue it, choose another with name=..., "
            "or delete the folder."
        )
    differing = differing_settings(folder, config)
    if differing:
        raise ConfigError(
            f"{folder} was trained with other settings: {', '.join(differing[:4])}. "
            "Resume with the same config, or choose another name."
        )


def differing_settings(folder: Path, config: Config) -> list[str]:
    """Returns the settings that a run was begun with and this config changes, those that do not touch training
    aside."""
    before, now = (_flat(json.loads(text)) for text in ((folder / "config.json").read_text(), dump(config)))
    return sorted(
        name
        for name in now
        if before.get(name) != now[name] and not name.startswith(("evaluate.", "wandb.", "train.keep_checkpoints"))
    )


def _flat(settings: dict, prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _refuse_nan(values: dict[str, float], done: int, folder: Path, saved: int) -> None:
    if not all(math.isfinite(value) for value in values.values()):
        bad = ", ".join(name for name, value in values.items() if not math.isfinite(value))
        raise FloatingPointError(
            f"{bad} is not a number after update {done} of {folder}. Lower optimizer.learning_rate or raise "
            f"optimizer.warmup; the last good checkpoint is of update {saved}."
        )


@contextmanager
def _stop_requests():
    """Gives a function that tells whether the process was asked to stop (Ctrl-C, SIGTERM): the loop then checkpoints
    and ends."""
    asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt  # asked twice: at once
        asked = True

    try:
        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: signals are somebody else's
        before = {}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _metrics(path: Path, config: Config, first: int):
    """Gives a function that appends one line to `metrics.jsonl` (and to wandb on request). Lines later than the
    checkpoint that the run continues from are dropped: they are about to be written again.
    """
    kept = read_metrics(path, up_to=first)
    write_text(path, "".join(json.dumps(entry) + "\n" for entry in kept))
    wandb_run = None
    if config.wandb.mode != "disabled":
        import wandb

        wandb_run = wandb.init(
            project=config.wandb.project,
            name=config.name,
            mode=config.wandb.mode,
            config=json.loads(dump(config)),
            dir=path.parent,
        )
    with path.open("a") as file:

        def log(entry: dict[str, float]) -> None:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            if wandb_run is not None:
                wandb_run.log(entry, step=int(entry["step"]))

        try:
            yield log
        finally:
            if wandb_run is not None:
                wandb_run.finish()


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m agents.train", description=__doc__.splitlines()[0])
    parser.add_argument("config", help="TOML file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--resume", action="store_true", help="continue the run from its newest checkpoint")
    arguments = parser.parse_args(argv)

    def body() -> int:
        config = load(Config, arguments.config, arguments.overrides)
        try:
            folder = train(config, resume=arguments.resume)
        except FloatingPointError as error:
            raise ConfigError(str(error)) from None
        lines = read_metrics(folder / "metrics.jsonl")
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
