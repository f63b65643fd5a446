"""How fast agents learn, read and act: python -m agents.bench learning | acting | reading RUN [--json F]

learning: environment steps per second in training, for several window lengths. If torch and transformers are installed,
Hugging Face's DecisionTransformerModel is measured alternately, with the same width, layers, heads, batch, window and
precision, and about as many weights. acting: the time of a step against the length of the context. reading: the time a
trained agent takes to read a long history on one device and on a ring, and the difference in its actions.
"""

import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from agents.cli import ConfigError, run
from agents.learners import LAYERS, WIDTH, hugging_face, ours
from agents.reading import measure_reading, reading_table
from rlring import Mask, Transformer, TransformerConfig, make_mesh, request_cpu_devices
from rlring.cli import Parser, check_json, count, version, write_json

SHAPES = ((20, 64), (256, 8), (1024, 2))  # (window in timesteps, batch size)
HISTORIES = (1024, 16 * 1024, 128 * 1024, 512 * 1024)  # tokens
READ = 128 * 1024  # tokens
TRIED_SECONDS = 2.0  # per learner and round


class Learning(NamedTuple):
    """The throughput of one learner at one shape."""

    name: str
    window: int
    batch: int
    weights: int
    steps_per_second: float  # environment steps; median over the rounds
    slowest: float
    fastest: float
    ratio: float | None  # to Hugging Face's throughput in the same round; median


class Acting(NamedTuple):
    """The time of a step of an agent with `tokens` tokens in its cache."""

    tokens: int
    devices: int
    step_ms: float
    slowest_ms: float
    cache_mib: float  # of all devices together


def measure_learning(rounds: int) -> list[Learning]:
    """Returns the throughputs, shape by shape. In each of `rounds` rounds, every learner runs for TRIED_SECONDS."""
    found = []
    for window, batch in SHAPES:
        learners = [ours("fused", window, batch), ours("rsar", window, batch), *hugging_face(window, batch)]
        for learner in learners:
            learner.update()
        rates: list[list[float]] = [[] for _ in learners]
        for number in range(rounds):
            _say(f"window {window}, batch {batch}: round {number + 1} of {rounds}")
            for measured, learner in zip(rates, learners, strict=True):
                updates, began = 0, time.perf_counter()
                while not updates or time.perf_counter() - began < TRIED_SECONDS:
                    learner.update()
                    updates += 1
                measured.append(updates * window * batch / (time.perf_counter() - began))
        other = rates[2] if len(learners) > 2 else None
        for measured, learner in zip(rates, learners, strict=True):
            ratio = None if other is None else statistics.median(a / b for a, b in zip(measured, other, strict=True))
            found.append(
                Learning(
                    learner.name,
                    window,
                    batch,
                    learner.weights,
                    statistics.median(measured),
                    min(measured),
                    max(measured),
                    ratio,
                )
            )
    return found


def measure_acting(devices: int, rounds: int) -> list[Acting]:
    """Returns the time of a step after histories of several lengths, on one device and on `devices` devices.

    The histories are random keys and values: the cost of a step depends on their number, not on their content.
    """
    found = []
    for ring in sorted({1, devices}):
        mesh = make_mesh(ring=ring) if ring > 1 else None
        for tokens in HISTORIES:
            _say(f"acting after {tokens:,} tokens on {ring} device{'s' * (ring > 1)}")
            found.append(_acting(tokens, mesh, rounds))
    return found


def _acting(tokens: int, mesh: Mesh | None, rounds: int) -> Acting:
    shape = TransformerConfig(width=WIDTH, layers=LAYERS, heads=4)
    transformer = Transformer(shape, rngs=nnx.Rngs(0))
    devices = 1 if mesh is None else mesh.size
    key = jax.random.key(0)
    position = jnp.arange(tokens, dtype=jnp.int32)[None]

    def remembered(key):
        keys = jax.random.split(key, 2 * LAYERS)
        pairs = [jax.random.normal(k, (1, tokens, 4, WIDTH // 4)) for k in keys]
        kept = list(zip(pairs[::2], pairs[1::2], strict=True))
        empty = transformer.empty_cache(1, capacity=tokens + 64 * devices, mesh=mesh)
        return empty.with_prompt(kept, Mask.causal(position), mesh=mesh)

    def step(x, now, cache):
        y, cache = transformer.decode(x, now, jnp.zeros_like(now), cache, mesh=mesh)
        return y, now + 1, cache

    cache = jax.jit(remembered)(key)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    step = jax.jit(step, donate_argnums=2)
    x, now = jax.random.normal(key, (1, 1, WIDTH)), jnp.full((1, 1), tokens, jnp.int32)
    if mesh is not None:
        x, now = jax.device_put((x, now), NamedSharding(mesh, P()))
    took = []
    for _ in range(rounds + 3):
        began = time.perf_counter()
        y, now, cache = step(x, now, cache)
        jax.block_until_ready(y)
        took.append(1e3 * (time.perf_counter() - began))
    took = took[3:]  # the first ones compile and touch memory
    return Acting(tokens, devices, statistics.median(took), max(took), size / 2**20)


def learning_table(rows: Sequence[Learning]) -> str:
    """Returns the throughputs as a Markdown table."""
    lines = [
        "| learner | window | batch | weights | environment steps/s (rounds) | x Hugging Face |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        ratio = "-" if row.ratio is None else f"{row.ratio:.2f}"
        lines.append(
            f"| {row.name} | {row.window} | {row.batch} | {row.weights / 1e3:,.0f}K | {row.steps_per_second:,.0f} "
            f"({row.slowest:,.0f} to {row.fastest:,.0f}) | {ratio} |"
        )
    return "\n".join(lines)


def acting_table(rows: Sequence[Acting]) -> str:
    """Returns the times of a step as a Markdown table."""
    lines = [
        "| tokens remembered | devices | step ms (slowest) | cache MiB | ns a KiB of cache |",
        "| ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        lines.append(
            f"| {row.tokens:,} | {row.devices} | {row.step_ms:.2f} ({row.slowest_ms:.2f}) | {row.cache_mib:,.0f} "
            f"| {1e6 * row.step_ms / (1024 * row.cache_mib):,.0f} |"
        )
    return "\n".join(lines)


def versions() -> dict[str, str]:
    """Returns the versions and the number of cores that the measurements hold for."""
    found = {"python": platform.python_version(), "cores": str(len(os.sched_getaffinity(0)))}
    for name in ("rlring", "jax", "jaxlib", "torch", "transformers"):
        if (installed := version(name)) is not None:
            found[name] = installed
    return found


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="python -m agents.bench", description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("learning", "acting", "reading"))
    parser.add_argument("run", type=Path, nargs="?", metavar="RUN", help="reading: the run of a trained agent")
    parser.add_argument("--tokens", type=count, default=READ, help="reading: length of the history")
    parser.add_argument(
        "--devices", type=count, default=8, help="acting, reading: devices over which the sequence is split"
    )
    parser.add_argument("--rounds", type=count, default=5)
    parser.add_argument("--json", type=Path, metavar="F", help="also write everything to this file")
    arguments = parser.parse_args(argv)

    def body() -> None:
        check_json(arguments.json)
        if (arguments.what == "reading") != (arguments.run is not None):
            raise ConfigError(f"`reading` wants a run, such as runs/NAME, and nothing else does; got {arguments.run}")
        if arguments.what == "learning":
            rows = measure_learning(arguments.rounds)
            print(learning_table(rows))
        elif arguments.what == "reading":
            request_cpu_devices(arguments.devices)
            rows = measure_reading(arguments.run, arguments.tokens, arguments.devices)
            print(reading_table(rows))
        else:
            request_cpu_devices(arguments.devices)
            rows = measure_acting(arguments.devices, 4 * arguments.rounds)
            print(acting_table(rows))
        command, known = shlex.join(["python", "-m", "agents.bench", *argv]), versions()
        listed = ", ".join(f"{name} {number}" for name, number in known.items())
        network = "" if arguments.what == "reading" else f"width {WIDTH}, {LAYERS} layers, float32; "
        print(f"\n`{command}`: {network}{listed}.")
        if arguments.json is not None:
            rows = [row._asdict() for row in rows]
            write_json(arguments.json, {"command": command, "versions": known, "rows": rows})

    return run(body)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
