"""Measures the time a trained agent takes to read a long history and then to act, on one device and on a ring."""

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from agents.agent import Timesteps
from agents.cli import ConfigError
from agents.evaluate import TrainedAgent, load_agent
from agents.prompts import context_tokens, pad_and_order
from agents.return_conditioned import ReturnConditionedAgent
from agents.samplers import chains
from data import ChainBatch
from rlring.bench.candidates import LARGE_MATMUL, MATMUL, product


class Reading(NamedTuple):
    """The measurements of reading a history, and of acting in one episode after it."""

    tokens: int
    devices: int
    compile_seconds: float
    read_seconds: float
    of_peak: float  # operations per second of reading, as a share of those of matrix products on the same devices
    step_ms: float  # median over the episode
    slowest_ms: float
    difference: float  # largest absolute difference of the mean actions from those on one device


def measure_reading(run: Path, tokens: int, devices: int) -> list[Reading]:
    """Returns the measurements for the agent of `run` on one device and on a ring of `devices` devices. The agent reads
    a history of at most `tokens` tokens from its stores, and acts in one of their episodes."""
    found, reference = [], None
    for ring in sorted({1, devices}):
        loaded = load_agent(run, [f"evaluate.mesh.ring={ring}", "evaluate.mesh.ulysses=1", "evaluate.mesh.data=1"])
        prompt, episode = _history(loaded, tokens)
        length = context_tokens(loaded.agent, prompt)
        steps = episode.position.shape[1]
        prompt = pad_and_order(loaded.agent, prompt)
        began = time.perf_counter()
        start = jax.jit(loaded.agent.start, static_argnums=2).lower(loaded.params, prompt, steps).compile()
        compiled = time.perf_counter()
        memory = jax.block_until_ready(start(loaded.params, prompt))
        read = time.perf_counter() - compiled
        actions, took = _act(loaded, memory, episode)
        reference = actions if reference is None else reference
        share = _operations(loaded, length) / read / _peak(ring)
        difference = float(np.abs(actions - reference).max())
        found.append(
            Reading(length, ring, compiled - began, read, share, statistics.median(took), max(took), difference)
        )
    return found


def reading_table(rows: Sequence[Reading]) -> str:
    """Returns the measurements as a Markdown table."""
    lines = [
        "| tokens read | devices | compile s | read s | of peak | step ms (slowest) | difference of actions |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        lines.append(
            f"| {row.tokens:,} | {row.devices} | {row.compile_seconds:.1f} | {row.read_seconds:.1f} "
            f"| {row.of_peak:.0%} | {row.step_ms:.2f} ({row.slowest_ms:.2f}) | {row.difference:.1e} |"
        )
    return "\n".join(lines)


def _history(loaded: TrainedAgent, tokens: int) -> tuple[ChainBatch, ChainBatch]:
    """Returns a history of at most `tokens` tokens, and the episode after it. Raises ConfigError for agents that do not
    read a history by attention, and for fewer tokens than an episode."""
    agent, config = loaded.agent, loaded.config
    if not isinstance(agent, ReturnConditionedAgent) or config.agent.kind == "decision_transformer":
        raise ConfigError(
            f"{loaded.folder} is a run of agent.kind={config.agent.kind}, which reads no history by attention; give "
            "one of agentic_transformer"
        )
    longest = loaded.meta.episode_steps
    timesteps = tokens // agent.tokens_per_timestep // longest * longest
    if timesteps < longest:
        raise ConfigError(
            f"a history has at least one episode, {longest * agent.tokens_per_timestep} tokens of {loaded.folder}; got "
            f"--tokens {tokens}"
        )
    trajectories = timesteps // longest + 2
    chain = config.chain.model_dump(exclude={"grow_until", "grow"}) | {"trajectories": trajectories + trajectories % 2}
    task = config.data.tasks[0]
    batch = chains(config, [loaded.store(task)], **chain).sample(0, np.arange(1), None)
    return batch.take(np.arange(timesteps)), batch.take(timesteps + np.arange(longest))


def _act(loaded: TrainedAgent, memory, episode: ChainBatch) -> tuple[np.ndarray, list[float]]:
    """Returns the mean actions at the timesteps of an episode [M, 1, A], and the time of each step in milliseconds,
    without the first, which compiles."""
    act, actions, took = jax.jit(loaded.agent.act, donate_argnums=1), [], []
    for m in range(episode.position.shape[1]):
        now = Timesteps(*(jnp.asarray(getattr(episode, name)[:, m]) for name in Timesteps._fields[:-2]))
        began = time.perf_counter()
        action, memory = act(loaded.params, memory, now, None)
        actions.append(np.asarray(action))
        took.append(1e3 * (time.perf_counter() - began))
    return np.stack(actions), took[1:] or took


def _operations(loaded: TrainedAgent, tokens: int) -> float:
    """Returns the floating-point operations of reading: 2 per weight and token, and 2 T^2 / 2 per layer and channel for
    each of the two products of causal attention. Pairs that a window or a sparse pattern masks are counted too."""
    blocks = sum(leaf.size for leaf in jax.tree.leaves(loaded.params["transformer"]["blocks"]))
    model = loaded.config.model
    return 2.0 * tokens * blocks + 2.0 * tokens**2 * model.layers * model.width


def _peak(devices: int) -> float:
    """Returns the operations per second of float32 products of square matrices, on all devices together."""
    side = MATMUL.get(jax.default_backend(), LARGE_MATMUL)
    run, took = product(devices, side, "float32").call, []
    for _ in range(6):
        began = time.perf_counter()
        run()
        took.append(time.perf_counter() - began)
    return 2.0 * side**3 * devices / statistics.median(took[1:])
