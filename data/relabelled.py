"""Reads and relabels episodes in a pool of processes, in order, with only a few episodes in memory at a time."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from data.cli import say
from data.errors import DataError
from data.exorl import read_episode
from data.relabel import Control, relabel
from data.reward_log import RewardLog
from data.trajectory import Trajectory
from data.worker_pool import worker_pool

# Episodes in flight per worker: enough that no worker waits, and few enough that memory use stays small.
_AHEAD = 4

Reward = Float32[np.ndarray, " M"]
Read = Callable[[Path, Reward | None], Trajectory | DataError]


def unlabelled_episodes(paths: Sequence[Path], skipped: list[str] | None) -> Iterator[Trajectory]:
    """Yields the episodes of a task that hides its goal, with physics states and rewards of 0.

    `skipped` is as for `relabelled_episodes`.
    """
    for path in paths:
        yield from _kept(_attempt(_read_without_reward, path, tolerant=skipped is not None), skipped)


def relabelled_episodes(
    paths: Sequence[Path],
    digests: Sequence[bytes],
    task: str,
    control: Control,
    workers: int,
    log: RewardLog,
    skipped: list[str] | None,
) -> Iterator[Trajectory]:
    """Yields the episodes in order, with the task's rewards and without physics states.

    Rewards in `log` are taken from it; others are computed and added to it. DataError names an episode that cannot be
    used. If `skipped` is a list, such an episode is left out instead, and the message is added to the list and printed
    to stderr.
    """
    one = partial(_relabel_episode, task, control, skipped is not None)
    known = ((path, log.get(digest)) for path, digest in zip(paths, digests, strict=True))
    for digest, episode in zip(digests, _spread(one, known, min(workers, len(paths))), strict=True):
        for trajectory in _kept(episode, skipped):
            if log.get(digest) is None:
                log.add(digest, trajectory.reward)
            yield trajectory


def _spread(one: Read, jobs: Iterator[tuple[Path, Reward | None]], workers: int) -> Iterator[Trajectory | DataError]:
    if workers == 1:
        yield from (one(*job) for job in jobs)
        return
    with worker_pool(workers) as submit:
        pending = deque(submit(one, *job) for job in islice(jobs, _AHEAD * workers))
        while pending:
            yield pending.popleft().result()
            pending.extend(submit(one, *job) for job in islice(jobs, 1))


def _kept(episode: Trajectory | DataError, skipped: list[str] | None) -> Iterator[Trajectory]:
    if not isinstance(episode, DataError):
        yield episode
    elif skipped is not None:
        skipped.append(str(episode))
        say(f"left out: {episode}")


def _attempt(read: Callable[[Path], Trajectory], path: Path, *, tolerant: bool) -> Trajectory | DataError:
    try:
        return read(path)
    except DataError as error:
        if not tolerant:
            raise
        return error


def _relabel_episode(
    task: str, control: Control, tolerant: bool, path: Path, reward: Reward | None
) -> Trajectory | DataError:
    """Runs in a worker. Drops the physics states, so that they are not sent back to the parent."""

    def labelled(path: Path) -> Trajectory:
        trajectory = _read_with_physics(path)
        paid = relabel(task, trajectory, control=control) if reward is None else reward
        return replace(trajectory, reward=paid, physics=None, extras={})

    return _attempt(labelled, path, tolerant=tolerant)


def _read_without_reward(path: Path) -> Trajectory:
    trajectory = _read_with_physics(path)
    # Drops the sign of a map task from the observation, because the sampler of chains gives every visit a new sign.
    observation = trajectory.observation[:, : trajectory.physics.shape[1]]
    return replace(trajectory, observation=observation, reward=np.zeros_like(trajectory.reward))


def _read_with_physics(path: Path) -> Trajectory:
    trajectory = read_episode(path)
    if trajectory.physics is None:
        raise DataError(
            f"{path}: has no physics, and rewards are computed from it; use ExoRL's zips (URLB's have none), or "
            "collect with `python -m data.collect`"
        )
    return trajectory
