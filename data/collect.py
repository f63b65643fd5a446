"""Rolls out a policy into a folder of ExoRL-format episodes.

    python -m data.collect --task point_mass-dark --policy waypoints --episodes 6000 --seed 0 --out datasets/dark

Episode `i` is a function of (task, policy, seed, i) and of the simulator versions. It does not depend on the number of
workers or on interruptions: the same command, run again, keeps the complete episodes and makes the missing ones. If the
simulator versions have changed in between, it continues, and collect.json names all versions.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from contextlib import ExitStack, closing
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data.cli import Parser, named_path, run
from data.collection import alone, claim, describe, note_versions
from data.dmc import Environment, make
from data.errors import DataError
from data.exorl import episode_index, is_whole, write_episode
from data.open_loop import can_play, play
from data.policies import POLICIES, Planned
from data.tasks.catalogue import check_task
from data.trajectory import Trajectory
from data.worker_pool import check_workers, worker_pool

_CHUNK = 50  # episodes handed to a worker at once
_STREAM = 0xC011EC7  # makes the episodes of a dataset differ from those of an evaluation with the same seed


def collect(
    task: str,
    policy: str,
    episodes: int,
    seed: int,
    out: str | Path,
    workers: int = 1,
    progress: bool = True,
    *,
    episode_steps: int | None = None,
) -> None:
    """Writes `episodes` episodes of `policy` in `task` to the folder `out`, and `collect.json` beside them.

    `episode_steps` replaces the task's time limit. `workers` processes share the work. They are spawned, so a script
    that calls this with more than one worker needs `if __name__ == "__main__"`. DataError for an unknown task or
    policy, a policy that does not fit the task, and a folder whose episodes have another task, policy, seed or length.
    """
    out = named_path("--out", out)
    _check(task, policy, episodes, seed, workers, episode_steps)
    # The policy is created here too, so that one that does not fit the task fails before a worker starts.
    environment = make(task, episode_steps=episode_steps)
    environment.reset(seed=seed)
    POLICIES[policy](environment, np.random.default_rng(seed))

    claim(out, describe(task, policy, seed, environment.episode_steps))
    with ExitStack() as locks:
        locks.enter_context(alone(out))
        missing = _missing(out, episodes)
        if missing:
            note_versions(out, locks)
        if workers == 1:
            written = (_write_chunk(environment, policy, seed, out, [index]) for index in missing)
        else:
            written = _spread(task, policy, seed, episode_steps, out, missing, workers)
        steps, label = environment.episode_steps, f"{task}, {episodes:,} episodes"
        total, done, hidden = episodes * steps, (episodes - len(missing)) * steps, not progress
        bar = tqdm(total=total, initial=done, disable=hidden, unit="step", unit_scale=True, desc=label)
        with closing(written), bar:
            for count in written:
                bar.update(count * steps)


def roll_out(environment: Environment, policy: str, seed: int, index: int) -> Trajectory:
    """Returns episode `index` of a policy as a Trajectory, with physics states and the environment's extras."""
    observation, info = start(environment, seed, index)
    act = POLICIES[policy](environment, np.random.default_rng((_STREAM, seed, index, 2)))
    source = f"{environment.task_name}, policy {policy}, seed {seed}, episode {index}"
    if isinstance(act, Planned) and can_play(environment.task_name):
        played = play(environment, act.actions)
        return Trajectory(
            observation=np.concatenate([observation[None], played.observation]),
            action=act.actions,
            reward=played.reward,
            discount=np.ones(len(act.actions), np.float32),
            physics=np.concatenate([info["physics"][None], played.physics]),
            extras=_extras(environment, len(act.actions) + 1),
            source=source,
        )
    return step_through(environment, observation, info, lambda step, _, physics: act(step, physics), source)


def start(environment: Environment, seed: int, index: int) -> tuple[np.ndarray, dict[str, Any]]:
    """Resets the environment to the start of episode `index` of a dataset with this seed; returns observation, info."""
    return environment.reset(seed=(_STREAM, seed, index, 1))


def step_through(
    environment: Environment,
    observation: np.ndarray,
    info: Mapping[str, Any],
    act: Callable[[int, np.ndarray, np.ndarray], np.ndarray],
    source: str,
) -> Trajectory:
    """Steps the environment from its first observation and info to the end of the episode, and returns the episode.

    `act(step, observation, physics)` returns the action.
    """
    observations, physics = [observation], [info["physics"]]
    actions, rewards, discounts = [], [], []
    is_over = False
    while not is_over:
        actions.append(act(len(actions), observations[-1], physics[-1]))
        observation, reward, terminated, truncated, info = environment.step(actions[-1])
        observations.append(observation)
        physics.append(info["physics"])
        rewards.append(reward)
        discounts.append(info["discount"])
        is_over = terminated or truncated
    return Trajectory(
        observation=np.stack(observations),
        action=np.stack(actions),
        reward=np.array(rewards, np.float32),
        discount=np.array(discounts, np.float32),
        physics=np.stack(physics),
        extras=_extras(environment, len(observations)),
        source=source,
    )


def _extras(environment: Environment, rows: int) -> dict[str, np.ndarray]:
    return {key: np.tile(value, (rows, 1)) for key, value in environment.extras().items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    parser = Parser(prog="python -m data.collect", description="Runs a policy in a task and writes the episodes.")
    parser.add_argument("--task", required=True, help="domain-task, such as walker-walk or point_mass-dark")
    parser.add_argument("--policy", required=True, help=", ".join(POLICIES))
    parser.add_argument("--episodes", required=True, type=int, help="total number of episodes in the folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", required=True, help="folder for the episodes; episodes that it has are kept")
    parser.add_argument("--workers", type=int, default=1, help="processes (default 1)")
    parser.add_argument("--episode-steps", type=int, default=None, help="steps per episode (default: the task's)")
    options = parser.parse_args(argv)
    return run(lambda: collect(**vars(options)))


def _check(task: str, policy: str, episodes: int, seed: int, workers: int, episode_steps: int | None) -> None:
    check_task(task)
    if policy not in POLICIES:
        raise DataError(f"policy {policy!r} does not exist; choose one of {', '.join(POLICIES)}")
    check_workers(workers)
    # File names have six digits, so that they sort in the order of episodes; and an episode is held in memory.
    limits = {"episodes": (episodes, 1, 10**6), "seed": (seed, 0, 2**63), "episode_steps": (episode_steps, 1, 10**6)}
    for name, (value, least, most) in limits.items():
        if value is not None and not least <= value <= most:
            raise DataError(f"{name} must be {least} to {most}; got {value}")


def _missing(out: Path, episodes: int) -> list[int]:
    """Returns the indices below `episodes` that have no complete file. Files of higher indices stay."""
    present = {episode_index(path) for path in out.glob("episode_*_*.npz") if is_whole(path)}
    return [index for index in range(episodes) if index not in present]


def _spread(
    task: str, policy: str, seed: int, episode_steps: int | None, out: Path, missing: list[int], workers: int
) -> Iterator[int]:
    """Yields the number of episodes of each chunk when a worker has written it."""
    chunks = [missing[start : start + _CHUNK] for start in range(0, len(missing), _CHUNK)]
    with worker_pool(max(1, min(workers, len(chunks)))) as submit:
        for future in as_completed(
            [submit(_workers_chunk, task, policy, seed, episode_steps, out, chunk) for chunk in chunks]
        ):
            yield future.result()


def _workers_chunk(
    task: str, policy: str, seed: int, episode_steps: int | None, out: Path, indices: Sequence[int]
) -> int:
    return _write_chunk(_workers_environment(task, episode_steps), policy, seed, out, indices)


def _write_chunk(environment: Environment, policy: str, seed: int, out: Path, indices: Sequence[int]) -> int:
    for index in indices:
        write_episode(out, index, roll_out(environment, policy, seed, index))
    return len(indices)


@lru_cache(maxsize=1)
def _workers_environment(task: str, episode_steps: int | None) -> Environment:
    return make(task, episode_steps=episode_steps)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
