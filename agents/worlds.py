"""Evaluation in map tasks: the context holds the last n visits to a world's M places, and a query asks for any of them.

The queries of a world share its history, which is read once: they use copies of its KV cache.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from agents.agent import Memory
from agents.cli import ConfigError
from agents.config import Config
from agents.prompts import context_tokens, pad_and_order
from agents.results import Result, append_results
from agents.rollout import RolloutState, episode_of_all, make_environments
from data import WorldSampler
from data.environment_batch import EnvironmentBatch
from data.tasks import goal_task
from data.worlds import Queries

if TYPE_CHECKING:
    from agents.evaluate import TrainedAgent

PREFILLED = 1 << 16  # timesteps read at a time, over several worlds; a single longer world is read as a whole
GIB = 1 << 30


class History(NamedTuple):
    """A context of a map task: the last `seen` visits in a world of `places` places."""

    task: str
    places: int
    seen: int


class Piece(NamedTuple):
    """Worlds that are evaluated together, all with the same kind of history."""

    history: History
    worlds: np.ndarray  # i64[W]; the last is repeated where there are fewer
    missing: np.ndarray  # indices into worlds of those without results


def is_map(task: str) -> bool:
    """Whether a task is a map task, which this module evaluates."""
    hidden = goal_task(task)
    return hidden is not None and hidden.sign_size > 0


def histories(config: Config, *, context: bool = True) -> Iterator[History]:
    """Yields every history that a config asks for. Agents without context (`Agent.context`) get the empty ones only."""
    settings = config.evaluate
    seen = settings.seen if context else [0.0]
    for task in filter(is_map, config.data.tasks):
        every = (History(task, places, round(share * places)) for places in settings.places for share in seen)
        yield from dict.fromkeys(every)


def evaluate_worlds(
    loaded: "TrainedAgent",
    path: Path,
    before: Sequence[Result],
    result: Callable[..., Result],
    *,
    progress: bool = True,
) -> int:
    """Plays what is missing in `before`, appends the results to `path` piece by piece, and returns their number.

    result: makes a Result from the fields that differ between episodes. With `progress`, prints the memory needed to
    stderr.
    """
    config = loaded.config
    has_maps = any(map(is_map, config.data.tasks))
    pieces = list(_pieces(loaded, before)) if has_maps else []
    if not pieces:
        return 0
    player = _Player(loaded, result)
    player.check(pieces)
    if progress:
        print(player.described(pieces), file=sys.stderr)
    costs = [_cost(config, piece) for piece in pieces]
    new, bar_format = 0, "{desc}: {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}{postfix}]"
    with tqdm(total=sum(costs), desc=f"{config.name}: evaluate", bar_format=bar_format, disable=not progress) as bar:
        for piece, cost in zip(pieces, costs, strict=True):
            bar.set_postfix_str(f"{piece.history.seen:,} of {piece.history.places:,} places")
            played = player.play(piece)
            append_results(path, played)
            new += len(played)
            bar.update(cost)
    return new


class _Player:
    """Plays the queries of worlds. Compiled functions and loaded stores are reused for all pieces."""

    def __init__(self, loaded: "TrainedAgent", result: Callable[..., Result]) -> None:
        self.loaded, self.result = loaded, result
        self.settings = loaded.config.evaluate
        self.start = jax.jit(loaded.agent.start, static_argnums=2)
        self.act = jax.jit(loaded.agent.act, donate_argnums=1)
        self.shared = jax.jit(_shared, static_argnums=1)
        self.environments: dict[tuple[str, int], EnvironmentBatch] = {}
        self.samplers = {task: self._sampler(task) for task in filter(is_map, loaded.config.data.tasks)}

    def described(self, pieces: Sequence[Piece]) -> str:
        """Returns a message with the number of histories and the memory needed."""
        largest = max(pieces, key=lambda piece: _rows(self.loaded, piece) * _row_bytes(self.loaded, piece.history))
        size = (_rows(self.loaded, largest) + len(largest.worlds)) * _row_bytes(self.loaded, largest.history) / GIB
        worlds = sum(len(piece.missing) for piece in pieces)
        return (
            f"{worlds:,} histories to read, {self.settings.queries} queries each; keys and values take up to "
            f"{size:.2f} GiB (evaluate.memory_gib), for {_rows(self.loaded, largest):,} queries at a time with "
            f"{largest.history.seen:,} trajectories each"
        )

    def check(self, pieces: Sequence[Piece]) -> None:
        """Raises errors before anything is played: for a foreign context when there is only one world, for episodes
        longer than the agent supports, and for a store whose held-out episodes share no place of rest."""
        if self.settings.foreign and any(piece.history.seen for piece in pieces):
            _refuse_one_world(self.loaded.config)
        for task in {piece.history.task for piece in pieces}:
            make_environments(self.loaded, task, 1)
            self.samplers[task].history(self.settings.seed, 1, 1, 0, 1)

    def play(self, piece: Piece) -> list[Result]:
        """Returns the results of all queries of the piece's missing worlds, and those of the foreign control."""
        settings, agent, history = self.settings, self.loaded.agent, piece.history
        sampler = self.samplers[history.task]
        prompt, asked = sampler.history(settings.seed, piece.worlds, history.places, history.seen, settings.queries)
        tokens = context_tokens(agent, prompt)
        ordered = pad_and_order(agent, prompt) if agent.context else prompt
        memory = self.start(self.loaded.params, ordered, sampler.longest)
        kinds = {"own" if history.seen else "none": (piece.worlds, asked)}
        if settings.foreign and history.seen:
            others = (piece.worlds + 1) % _worlds(self.loaded.config)
            kinds["foreign"] = (others, sampler.history(settings.seed, others, history.places, 0, settings.queries)[1])
        results = []
        for context, (worlds, queries) in kinds.items():
            groups = worlds[:, None] * settings.queries + np.arange(settings.queries)
            returns, steps = self._answers(history, memory, groups, queries)
            results += [
                self.result(
                    task=history.task,
                    mode="prompted",
                    places=history.places,
                    context=context,
                    context_trajectories=history.seen,
                    context_tokens=tokens,
                    world=int(worlds[row]),
                    age=None if context == "foreign" else int(history.places - 1 - queries.place[row, query]),
                    group=int(groups[row, query]),
                    episode_index=0,
                    return_=float(returns[row, query]),
                    steps=int(steps[row, query]),
                )
                for row in piece.missing
                for query in range(settings.queries)
            ]
        return results

    def _answers(self, history: History, memory: Memory, groups: np.ndarray, asked: Queries):
        """Returns the return and the steps [W, Q] of every query. Plays as many at a time as fit into memory."""
        count = self.settings.queries
        at_once = max(1, min(count, _limit(self.loaded, history) // len(groups)))
        while count % at_once:
            at_once -= 1
        parts = []
        for first in range(0, count, at_once):
            part = slice(first, first + at_once)
            goals, signs = asked.goal[:, part], asked.sign[:, part]
            parts.append(self._episodes(history, self.shared(memory, at_once), groups[:, part], goals, signs))
        return (np.concatenate(values, axis=1) for values in zip(*parts, strict=True))

    def _episodes(self, history: History, memory: Memory, groups: np.ndarray, goals: np.ndarray, signs: np.ndarray):
        """Returns the return and the steps [W, q] of one episode per query. memory: W * q rows."""
        rows, settings = groups.size, self.settings
        key = history.task, rows
        if key not in self.environments:
            self.environments[key] = make_environments(self.loaded, *key)
        environments = self.environments[key]
        seeds = [(settings.seed, int(group), 0) for group in groups.ravel()]
        observation = environments.reset(seeds, *(values.reshape(rows, -1) for values in (goals, signs)))
        label = [settings.seed, self.loaded.config.seed, history.places, history.seen, int(groups.flat[0])]
        key = jax.random.key_data(jax.random.key(int(np.random.SeedSequence(label).generate_state(1)[0])))
        action, reward = (jnp.zeros(shape, jnp.float32) for shape in ((rows, environments.action_size), rows))
        before = RolloutState(memory, key, action, reward)
        returns, steps, _ = episode_of_all(self.loaded, environments, self.act, before, observation, target=None)
        return returns.reshape(groups.shape), steps.reshape(groups.shape)

    def _sampler(self, task: str) -> WorldSampler:
        store, config = self.loaded.store(task), self.loaded.config
        return WorldSampler(store, trajectories=2, seed=config.seed, split="held_out", held_out=config.data.held_out)


def _shared(memory: Memory, times: int) -> Memory:
    """Returns the memory with every row repeated `times` times."""
    return jax.tree.map(lambda leaf: leaf.repeat(times, axis=0) if leaf.ndim else leaf, memory)


def _worlds(config: Config) -> int:
    settings = config.evaluate
    if settings.groups % settings.queries:
        raise ConfigError(
            f"evaluate.groups={settings.groups} are the queries of all worlds, evaluate.queries={settings.queries} "
            "those of one; use a multiple"
        )
    return settings.groups // settings.queries


def _refuse_one_world(config: Config) -> None:
    if _worlds(config) == 1:
        raise ConfigError(
            "evaluate.foreign asks about another world than the one seen, and there is one only; raise evaluate.groups "
            f"to {2 * config.evaluate.queries}, or leave evaluate.foreign out"
        )


def _pieces(loaded: "TrainedAgent", before: Sequence[Result]) -> Iterator[Piece]:
    """Yields the worlds without results in pieces, which for each history have the same size."""
    settings, worlds = loaded.config.evaluate, np.arange(_worlds(loaded.config))
    there = {(r.task, r.places, r.context_trajectories, r.context, r.group) for r in before}

    def is_played(history: History, world: int) -> bool:
        kinds = {"own" if history.seen else "none": world}
        if settings.foreign and history.seen:
            kinds["foreign"] = (world + 1) % len(worlds)
        return all(
            (*history, context, group) in there
            for context, of in kinds.items()
            for group in range(of * settings.queries, (of + 1) * settings.queries)
        )

    for history in histories(loaded.config, context=loaded.agent.context):
        rows = _limit(loaded, history) // settings.queries
        size = max(1, min(len(worlds), rows, PREFILLED // max(1, history.seen * loaded.meta.episode_steps)))
        for first in range(0, len(worlds), size):  # fixed pieces: action noise depends on them
            part = worlds[first : first + size]
            missing = np.array([row for row, world in enumerate(part) if not is_played(history, int(world))], int)
            if len(missing):
                yield Piece(history, np.pad(part, (0, size - len(part)), mode="edge"), missing)


def _row_bytes(loaded: "TrainedAgent", history: History) -> int:
    """Returns the size of the KV cache of one query in bytes."""
    model, timesteps = loaded.config.model, (history.seen + 1) * loaded.meta.episode_steps
    size = {"float32": 4, "bfloat16": 2}[model.compute_type]
    kept = model.layers * 2 * (model.kv_heads or model.heads) * (model.width // model.heads) * size
    return timesteps * loaded.agent.tokens_per_timestep * kept


def _limit(loaded: "TrainedAgent", history: History) -> int:
    """Returns how many queries fit into memory at a time."""
    room = int(loaded.config.evaluate.memory_gib * GIB) // _row_bytes(loaded, history)
    return max(1, min(loaded.config.evaluate.groups, room))


def _rows(loaded: "TrainedAgent", piece: Piece) -> int:
    return min(
        len(piece.worlds) * loaded.config.evaluate.queries, max(_limit(loaded, piece.history), len(piece.worlds))
    )


def _cost(config: Config, piece: Piece) -> float:
    """Returns an estimate of a piece's run time, in tokens of a short prompt. Attention dominates at 64K tokens."""
    tokens = piece.history.seen * 16
    return len(piece.worlds) * (tokens * (1 + tokens / 8192) + config.evaluate.queries * (256 + tokens / 8))
