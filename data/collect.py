"""Rolls out a policy into a folder of ExoRL-format episodes.

    python -m data.collect --task point_mass-dark --policy waypoints --episodes 6000 --seed 0 --out datasets/dark

Episode `i` is a function of (task, policy, seed, i) and of the versions of the simulator, whatever the workers and
however often the work was interrupted: the same command again keeps the whole episodes and makes the missing ones.
"""

import argparse
import json
import multiprocessing
import os
import signal
import sys
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.cli import run
from data.dmc import Environment, make
from data.errors import DataError
from data.exorl import write_episode
from data.policies import POLICIES
from data.tasks.catalogue import check_task
from data.trajectory import Trajectory

_CHUNK = 50  # episodes handed to a worker at once, and steps of the progress bar
_STREAM = 0xC011EC7  # keeps the episodes of a dataset apart from those of an evaluation with the same seed


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

    `workers` processes share the work; they are spawned, so a script that calls this with more than one needs the usual
    `if __name__ == "__main__"`. DataError for an unknown task or policy, a policy that does not fit the task, and a
    folder that holds episodes of something else.
    """
    _check(task, policy, episodes, seed, workers)
    # Made here too, so that a policy that does not fit the task fails before a worker starts.
    environment = make(task, episode_steps=episode_steps)
    environment.reset(seed=seed)
    POLICIES[policy](environment, np.random.default_rng(seed))

    out = Path(out)
    _claim(out, _description(task, policy, seed, environment.episode_steps))
    missing = _missing(out, episodes)
    with tqdm(total=episodes, initial=episodes - len(missing), disable=not progress, unit="episode", desc=task) as bar:
        if workers == 1:
            for index in missing:
                write_episode(out, index, roll_out(environment, policy, seed, index))
                bar.update()
        else:
            for count in _spread(task, policy, seed, episode_steps, out, missing, workers):
                bar.update(count)


def roll_out(environment: Environment, policy: str, seed: int, index: int) -> Trajectory:
    """Returns episode `index` of a policy, physics states and the environment's extras included."""
    observation, info = environment.reset(seed=(_STREAM, seed, index, 1))
    act = POLICIES[policy](environment, np.random.default_rng((_STREAM, seed, index, 2)))
    observations, physics = [observation], [info["physics"]]
    actions, rewards, discounts = [], [], []
    is_over = False
    while not is_over:
        actions.append(act(len(actions), physics[-1]))
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
        extras={key: np.tile(value, (len(observations), 1)) for key, value in environment.extras().items()},
        source=f"{environment.task_name}, policy {policy}, seed {seed}, episode {index}",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the verb and returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m data.collect", description="Roll out a policy into episodes.")
    parser.add_argument("--task", required=True, help="domain-task, such as walker-walk or point_mass-dark")
    parser.add_argument("--policy", required=True, help=", ".join(POLICIES))
    parser.add_argument("--episodes", required=True, type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", required=True, type=Path, help="folder of the episodes; continued if it has some")
    parser.add_argument("--workers", type=int, default=1, help="processes (default 1)")
    parser.add_argument("--episode-steps", type=int, default=None, help="length instead of the task's own")
    options = parser.parse_args(argv)
    return run(lambda: collect(**vars(options)))


def _check(task: str, policy: str, episodes: int, seed: int, workers: int) -> None:
    check_task(task)
    if policy not in POLICIES:
        raise DataError(f"policy {policy!r} does not exist; choose one of {', '.join(POLICIES)}")
    for name, value, least in (("episodes", episodes, 1), ("seed", seed, 0), ("workers", workers, 1)):
        if value < least:
            raise DataError(f"{name} must be at least {least}; got {value}")


def _description(task: str, policy: str, seed: int, episode_steps: int) -> dict[str, object]:
    versions = {package: version(package) for package in ("dm_control", "mujoco", "numpy")}
    return {"task": task, "policy": policy, "seed": seed, "episode_steps": episode_steps, "versions": versions}


def _claim(out: Path, description: dict[str, object]) -> None:
    """Writes collect.json, or checks that the folder's own says the same."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "collect.json"
    if path.exists():
        try:
            present = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise DataError(f"{path} is damaged ({error}); delete the folder {out}, or choose another --out") from None
        for key, value in description.items():
            if present.get(key) != value:
                raise DataError(
                    f"{out} holds episodes of {key} {present.get(key)!r}, and this run is of {key} {value!r}. "
                    "Choose another --out, or delete that folder"
                )
        return
    if any(out.glob("*.npz")):
        raise DataError(f"{out} holds episodes but no collect.json that says of what. Choose another --out")
    temporary = out / ".collect.json.tmp"
    temporary.write_text(json.dumps(description, indent=2) + "\n")
    os.replace(temporary, path)


def _missing(out: Path, episodes: int) -> list[int]:
    """Returns the indices below `episodes` that have no whole file. Longer leftovers of a bigger run stay."""
    present = {int(path.stem.split("_")[1]) for path in out.glob("episode_*_*.npz") if _is_whole(path)}
    return [index for index in range(episodes) if index not in present]


def _is_whole(path: Path) -> bool:
    # Episodes appear under their name only when complete. What is left is what a power cut can do: an archive without
    # its directory, which stands at the end. Reading every array would take as long as collecting them.
    try:
        with zipfile.ZipFile(path) as archive:
            return "observation.npy" in archive.namelist()
    except zipfile.BadZipFile:
        return False


def _spread(
    task: str, policy: str, seed: int, episode_steps: int | None, out: Path, missing: list[int], workers: int
) -> Iterator[int]:
    """Yields how many episodes a worker has written, chunk by chunk."""
    chunks = [missing[start : start + _CHUNK] for start in range(0, len(missing), _CHUNK)]
    # Spawned: a forked child of a process that runs JAX's threads can hang.
    pool = ProcessPoolExecutor(
        max_workers=max(1, min(workers, len(chunks))),
        mp_context=multiprocessing.get_context("spawn"),
        # The parent alone answers Ctrl-C; it then waits for the chunks that are being written.
        initializer=signal.signal,
        initargs=(signal.SIGINT, signal.SIG_IGN),
    )
    try:
        for future in as_completed(
            [pool.submit(_write_chunk, task, policy, seed, episode_steps, out, chunk) for chunk in chunks]
        ):
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _write_chunk(
    task: str, policy: str, seed: int, episode_steps: int | None, out: Path, indices: Sequence[int]
) -> int:
    environment = _workers_environment(task, episode_steps)
    for index in indices:
        write_episode(out, index, roll_out(environment, policy, seed, index))
    return len(indices)


@lru_cache(maxsize=1)
def _workers_environment(task: str, episode_steps: int | None) -> Environment:
    return make(task, episode_steps=episode_steps)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
