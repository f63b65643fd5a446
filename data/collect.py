"""Rolls out a policy into a folder of ExoRL-format episodes.

    python -m data.collect --task point_mass-dark --policy waypoints --episodes 6000 --seed 0 --out datasets/dark

Episode `i` is a function of (task, policy, seed, i) and of the versions of the simulator, whatever the workers and
however often the work was interrupted: the same command again keeps the whole episodes and makes the missing ones, with
other versions too, which collect.json then names.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import as_completed
from contextlib import ExitStack, closing, contextmanager
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.atomic_file import lock, write_text
from data.cli import Parser, named_path, run
from data.dmc import Environment, make
from data.errors import DataError
from data.exorl import episode_index, is_whole, write_episode
from data.open_loop import can_play, play
from data.policies import POLICIES, Planned
from data.tasks.catalogue import check_task
from data.trajectory import Trajectory
from data.worker_pool import check_workers, worker_pool

_CHUNK = 50  # episodes handed to a worker at once
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
    out = named_path("--out", out)
    _check(task, policy, episodes, seed, workers, episode_steps)
    # Made here too, so that a policy that does not fit the task fails before a worker starts.
    environment = make(task, episode_steps=episode_steps)
    environment.reset(seed=seed)
    POLICIES[policy](environment, np.random.default_rng(seed))

    _claim(out, _description(task, policy, seed, environment.episode_steps))
    with ExitStack() as locks:
        locks.enter_context(_alone(out))
        missing = _missing(out, episodes)
        if missing and _note_versions(out):
            locks.enter_context(_alone(out))  # the note is another file now, which others would find free
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
    """Returns episode `index` of a policy, physics states and the environment's extras included."""
    observation, info = environment.reset(seed=(_STREAM, seed, index, 1))
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
        extras=_extras(environment, len(observations)),
        source=source,
    )


def _extras(environment: Environment, rows: int) -> dict[str, np.ndarray]:
    return {key: np.tile(value, (rows, 1)) for key, value in environment.extras().items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    parser = Parser(prog="python -m data.collect", description="Roll out a policy into episodes.")
    parser.add_argument("--task", required=True, help="domain-task, such as walker-walk or point_mass-dark")
    parser.add_argument("--policy", required=True, help=", ".join(POLICIES))
    parser.add_argument("--episodes", required=True, type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", required=True, help="folder of the episodes; continued if it has some")
    parser.add_argument("--workers", type=int, default=1, help="processes (default 1)")
    parser.add_argument("--episode-steps", type=int, default=None, help="length instead of the task's own")
    options = parser.parse_args(argv)
    return run(lambda: collect(**vars(options)))


def _check(task: str, policy: str, episodes: int, seed: int, workers: int, episode_steps: int | None) -> None:
    check_task(task)
    if policy not in POLICIES:
        raise DataError(f"policy {policy!r} does not exist; choose one of {', '.join(POLICIES)}")
    check_workers(workers)
    # Six digits in a name, so that the order of names is that of episodes; an episode is held in memory.
    limits = {"episodes": (episodes, 1, 10**6), "seed": (seed, 0, 2**63), "episode_steps": (episode_steps, 1, 10**6)}
    for name, (value, least, most) in limits.items():
        if value is not None and not least <= value <= most:
            raise DataError(f"{name} must be {least} to {most}; got {value}")


def _description(task: str, policy: str, seed: int, episode_steps: int) -> dict[str, object]:
    return {"task": task, "policy": policy, "seed": seed, "episode_steps": episode_steps, "versions": _versions()}


def _versions() -> dict[str, str]:
    return {package: version(package) for package in ("dm_control", "mujoco", "numpy")}


def _note_versions(out: Path) -> bool:
    """Adds to collect.json the versions that make the missing episodes, and tells where they are others than before:
    that is no reason not to go on. Returns whether the file was replaced."""
    path = out / "collect.json"
    present = json.loads(path.read_text())
    before, now = present.get("versions") or {}, _versions()
    other = {name: before.get(name) for name in now if now[name] not in str(before.get(name)).split(", ")}
    if not other:
        return False
    told = ", ".join(f"{name} {was} ({now[name]} now)" for name, was in other.items())
    print(f"note: the episodes in {out} so far were made with {told}; collect.json keeps both", file=sys.stderr)
    both = {name: f"{was}, {now[name]}" if was else now[name] for name, was in other.items()}
    write_text(path, json.dumps({**present, "versions": {**before, **both}}, indent=2) + "\n")
    return True


def _claim(out: Path, description: dict[str, object]) -> None:
    """Writes collect.json, or checks that the folder's own says the same."""
    if out.exists() and not out.is_dir():
        raise DataError(f"{out} is a file; --out names a folder. Choose another")
    out.mkdir(parents=True, exist_ok=True)
    path = out / "collect.json"
    if not path.exists():
        if any(out.glob("*.npz")):
            raise DataError(f"{out} holds episodes but no collect.json that says of what. Choose another --out")
        write_text(path, json.dumps(description, indent=2) + "\n")
        return
    try:
        present = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is damaged ({error}); choose another --out, or delete that folder") from None
    if not isinstance(present, dict) or not isinstance(present.get("versions") or {}, dict):
        raise DataError(f"{path} is not what data.collect writes; choose another --out, or delete that folder")
    for key, value in description.items():
        if key != "versions" and present.get(key) != value:
            raise DataError(
                f"{out} holds episodes of {key} {present.get(key)!r}, and this run is of {key} {value!r}. "
                "Choose another --out, or delete that folder"
            )


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """DataError when another process collects into the same folder: the two would write the same files."""
    with open(out / "collect.json", "rb") as note:
        lock(note, f"another process collects into {out} right now; wait for it, or choose another --out")
        yield


def _missing(out: Path, episodes: int) -> list[int]:
    """Returns the indices below `episodes` that have no whole file. Longer leftovers of a bigger run stay."""
    present = {episode_index(path) for path in out.glob("episode_*_*.npz") if is_whole(path)}
    return [index for index in range(episodes) if index not in present]


def _spread(
    task: str, policy: str, seed: int, episode_steps: int | None, out: Path, missing: list[int], workers: int
) -> Iterator[int]:
    """Yields how many episodes a worker has written, chunk by chunk."""
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
