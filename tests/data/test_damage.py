"""Damaged files: read right or refused with their name, never wrong, never another error, never for ever."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Runs in a process of its own, because a damaged file may kill or hang the library that reads it: then SIGALRM ends it.
SCRIPT = """
import json, signal, sys
from pathlib import Path
import numpy as np
from data import DataError, Trajectory, TrajectoryStore
from data.exorl import is_whole, read_episode, write_episode
from data.store_writer import write_store

kind, folder, count = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
rng = np.random.default_rng(0)
episodes = [
    Trajectory(
        observation=rng.normal(5, 2, (steps + 1, 3)),
        action=rng.uniform(-1, 1, (steps, 2)),
        reward=rng.random(steps),
        discount=np.ones(steps),
        physics=rng.standard_normal((steps + 1, 4)),
        extras={"goal": rng.random((steps + 1, 2))},
    )
    for steps in (200, 100, 300)
]

def numbers(trajectory):
    arrays = [getattr(trajectory, name) for name in ("observation", "action", "reward", "discount", "physics")]
    return [array.tobytes() for array in (*arrays, *trajectory.extras.values())]

def read_store(path):
    store = TrajectoryStore.open(path, "walker-walk")
    read = [number for episode in range(store.episodes) for number in numbers(store.trajectory(episode))]
    return read, store.content_hash, store.source, store.statistics.observation_mean.tobytes(), store.returns.tobytes()

def mutate(whole):
    whole, size = bytearray(whole), len(whole)
    where = int(rng.integers(size if rng.random() < 0.5 else min(size, 4096)))
    length = int(rng.integers(1, 1 + size // 4)) if rng.random() < 0.5 else int(rng.integers(1, 9))
    match int(rng.integers(6)):
        case 0 | 1:
            whole[where] ^= 1 << int(rng.integers(8))
        case 2:
            del whole[where:]
        case 3:
            whole[where : where + length] = bytes(len(whole[where : where + length]))
        case 4:
            whole[where : where + length] = rng.bytes(len(whole[where : where + length]))
        case 5:
            whole[where:where] = rng.bytes(length)
    return bytes(whole)

if kind == "store":
    read, name = read_store, "s.h5"
    original = write_store(folder / name, episodes, task="walker-walk", source="a test", keep_physics=True).path
else:
    read, name = lambda path: numbers(read_episode(path)), "episode_000000_200.npz"
    original = write_episode(folder, 0, episodes[0])
whole, expected = original.read_bytes(), read(original)
answers = {"right": 0, "refused": 0, "else": []}
for number in range(count):
    path = folder / str(number) / name
    path.parent.mkdir()
    damaged = mutate(whole)
    path.write_bytes(damaged)
    signal.alarm(20)
    try:
        if kind != "store":
            is_whole(path)
        right = read(path) == expected
        answers["right"] += right
        if not right:
            answers["else"].append(f"{number}: wrong numbers")
    except DataError as error:
        answers["refused"] += 1
        if str(path) not in str(error):
            answers["else"].append(f"{number}: does not name the file: {error}")
    except Exception as error:
        answers["else"].append(f"{number}: {error!r}")
    path.unlink()
signal.alarm(0)
print(json.dumps(answers))
"""


@pytest.mark.parametrize("kind", ["store", "episode"])
def test_a_damaged_file_is_refused_or_read_right(tmp_path, kind):
    count = 300
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, kind, tmp_path, str(count)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)
    assert answers["else"] == []
    assert answers["refused"] > count / 2
