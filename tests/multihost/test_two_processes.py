"""Two real processes of four devices each, over gloo: the losses of one process, whatever happens to them."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest

from agents.checkpoint import read_metrics
from agents.train import main
from data import ChainSampler, TrajectoryStore
from data.atomic_file import lock
from data.build import build
from data.collect import collect
from data.store_file import seal
from rlring import make_mesh
from rlring.sharding import BatchPart

TASK = "point_mass-dark"
CONFIG = """
name = "one"
[data]
tasks = ["{task}"]
episodes = "{folder}/episodes"
stores = ["{folder}/store.h5"]
held_out = 0.2
[agent]
kind = "agentic_transformer"
[chain]
trajectories = 4
[model]
width = 16
layers = 2
heads = 2
fsdp = true
[mesh]
ring = 8
[train]
updates = 8
batch = 4
log_every = 1
checkpoint_every = 2
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folder of a store, a config, and the run `one` of a single process."""
    folder = tmp_path_factory.mktemp("two")
    collect(TASK, "waypoints", 240, 0, folder / "episodes", workers=1, progress=False)
    build(folder / "episodes", TASK, folder / "store.h5", workers=1, progress=False)
    (folder / "config.toml").write_text(CONFIG.format(task=TASK, folder=folder))
    finish([start(folder, "mesh.ring=1")])
    return folder


@pytest.fixture
def folder(made, tmp_path):
    """The folder of a test of its own."""
    shutil.copytree(made / "runs", tmp_path / "runs")
    shutil.copy(made / "config.toml", tmp_path)
    return tmp_path


def start(folder: Path, *arguments: str) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "agents.train", "config.toml", *arguments]
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def start_two(folder: Path, *arguments: str, own=((), ())) -> list[subprocess.Popen]:
    """Starts both processes; `own` are arguments of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    cluster = ["--cluster", f"127.0.0.1:{port}", "--processes", "2", "--patience", "10"]
    return [start(folder, *arguments, *own[i], *cluster, "--process", str(i)) for i in range(2)]


def finish(processes: list[subprocess.Popen], codes=(0,)) -> list[str]:
    printed = [process.communicate(timeout=300)[0] for process in processes]
    for process, text in zip(processes, printed, strict=True):
        assert process.returncode in codes, text[-3000:]
    return printed


def losses(folder: Path, name: str) -> dict[int, tuple[float, float]]:
    lines = read_metrics(folder / "runs" / name / "metrics.jsonl")
    return {line["step"]: (line["loss/action"], line["gradient/global_norm"]) for line in lines}


def assert_same_losses(folder: Path, name: str) -> None:
    want, got = losses(folder, "one"), losses(folder, name)
    assert got.keys() == want.keys()
    np.testing.assert_allclose([got[s] for s in want], [want[s] for s in want], rtol=1e-5)


def test_two_processes_log_the_losses_of_one(folder):
    printed = finish(start_two(folder, "name=two"))
    assert_same_losses(folder, "two")
    assert "8 updates, loss" in printed[0]  # the first alone speaks
    assert "updates" not in printed[1]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [["mesh.data=2", "mesh.ring=4"], ["mesh.data=2", "mesh.ring=2", "mesh.ulysses=2"]])
def test_on_other_meshes(folder, mesh):
    finish(start_two(folder, "name=two", *mesh, "model.fsdp=false", "train.accumulate=2", "attention.scheme=hybrid"))
    assert_same_losses(folder, "two")


@pytest.mark.slow
def test_each_process_reads_only_its_part(made, folder):
    """What a process does not hold is NaN in its store, and nobody notices."""
    few = ["train.updates=2", "train.batch=2"]
    finish([start(folder, "name=few", *few)])
    stores = [poisoned(made / "store.h5", folder / f"store{i}.h5", process=i) for i in range(2)]
    finish(start_two(folder, "name=apart", *few, own=[[f'data.stores=["{path}"]'] for path in stores]))
    np.testing.assert_allclose(list(losses(folder, "apart").values()), list(losses(folder, "few").values()), rtol=1e-5)
    # The other's store is of no use.
    swapped = start_two(folder, "name=swapped", *few, own=[[f'data.stores=["{path}"]'] for path in stores[::-1]])
    assert "is not a number" in finish(swapped, codes=(2, -signal.SIGABRT, 1))[0]


def poisoned(source: Path, path: Path, *, process: int) -> Path:
    """Writes a copy of a store with NaN where no timestep of this process is, for two updates of two rows."""
    shutil.copy(source, path)
    with h5py.File(path, "r+") as file:
        kept = {}
        for field in ("observation", "action"):
            rows, size = file[field].shape
            kept[field] = np.array(file[field])
            file[field][:] = np.broadcast_to(np.arange(rows)[:, None], (rows, size))  # every row says which it is
    with path.open("r+b") as file:
        seal(file)
    part = BatchPart.of((2, 64), make_mesh(ring=8))
    half = part.places[32 * process : 32 * (process + 1)]  # the devices of this process: half of the ring
    sampler = ChainSampler(
        TrajectoryStore.open(path), trajectories=4, seed=0, split="train", held_out=0.2, lengths="full"
    )
    drawn = [sampler.sample(update, 2, half) for update in range(2)]
    sampler.store.close()
    used = {
        "observation": [batch.observation for batch in drawn],
        "action": [values for batch in drawn for values in (batch.action, batch.previous_action)],
    }
    with h5py.File(path, "r+") as file:
        for field, values in used.items():
            rows = np.unique(np.concatenate([v[..., 0].ravel() for v in values]).astype(int))
            assert len(rows) < len(kept[field]) / 10
            file[field][:] = np.nan
            file[field][rows] = kept[field][rows]
    with path.open("r+b") as file:
        seal(file)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_killed_while_training_and_while_saving_then_on_two_and_on_one(folder, victim):
    arguments = ["name=killed", "train.checkpoint_every=1"]
    checkpoints = folder / "runs/killed/checkpoints"

    def kill_when(ready, *more: str) -> None:
        processes = start_two(folder, *arguments, *more)
        while not ready() and all(process.poll() is None for process in processes):
            time.sleep(0.002)
        processes[victim].send_signal(signal.SIGKILL)
        finish(processes, codes=(-signal.SIGKILL, -signal.SIGABRT, 1, 2))

    kill_when(lambda: len(losses(folder, "killed")) >= 3)
    assert 3 <= len(losses(folder, "killed")) < 8

    def saves() -> bool:
        """Whether a checkpoint is being written, the one after those that are there."""
        return any("tmp" in path.name for path in checkpoints.iterdir())

    begun = len(losses(folder, "killed"))
    kill_when(lambda: len(losses(folder, "killed")) > begun and saves(), "--resume")
    # Two processes take a few updates more, and are asked to end.
    processes = start_two(folder, *arguments, "--resume")
    finish(processes)
    assert_same_losses(folder, "killed")
    # On one process: from the last checkpoint but one.
    newest = max(int(path.name) for path in checkpoints.iterdir() if path.name.isdecimal())
    assert newest == 8
    shutil.rmtree(checkpoints / "8")
    finish([start(folder, *arguments, "--resume")])
    assert_same_losses(folder, "killed")


@pytest.mark.slow
def test_a_process_that_is_told_to_end_takes_the_other_with_it(folder):
    processes = start_two(folder, "name=ended", "train.updates=100000", "train.checkpoint_every=100000")
    while len(losses(folder, "ended")) < 2 and processes[1].poll() is None:
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGTERM)
    finish(processes, codes=(130,))
    last = max(losses(folder, "ended"))
    assert (folder / f"runs/ended/checkpoints/{last}").is_dir()


def assert_told_by_both(printed: list[str], message: str) -> None:
    for text, beginning in zip(printed, ("error: ", "error: the first process says: "), strict=True):
        assert any(line.startswith(beginning + message) for line in text.splitlines()), text  # gloo speaks too


def test_a_folder_that_another_command_trains_ends_both_with_a_message(folder):
    with (folder / "runs/.two.training").open("w") as held:
        lock(held, "")
        printed = finish(start_two(folder, "name=two"), codes=(2,))
    assert_told_by_both(printed, "another process trains runs/two right now")
    assert not (folder / "runs/two").exists()


@pytest.mark.slow
def test_a_store_that_is_not_there_ends_both_with_a_message(folder):
    printed = finish(start_two(folder, "name=two", 'data.stores=["no.h5"]'), codes=(2,))
    assert_told_by_both(printed, "no store at no.h5")
    assert not (folder / "runs/two").exists()
    assert not (folder / "runs/.two.training").exists()


def test_what_cannot_be_a_cluster(tmp_path, capsys):
    config = tmp_path / "config.toml"
    config.write_text(CONFIG.format(task=TASK, folder=tmp_path))
    for arguments, message in (
        (["--process", "1"], "error: --processes and --process go with --cluster HOST:PORT"),
        (["--cluster", "127.0.0.1:1", "--process", "0"], "error: a cluster takes an address, the number of processes"),
        (["--cluster", "127.0.0.1:1", "--processes", "2", "--process", "2"], "error: of 2 processes one is number 0"),
        (["--cluster", "127.0.0.1", "--processes", "2", "--process", "1"], "error: a cluster's address is HOST:PORT"),
        (["--cluster", "here:x", "--processes", "2", "--process", "1"], "error: a cluster's address is HOST:PORT"),
        (["--cluster", "here:99999", "--processes", "2", "--process", "1"], "error: a cluster's address is HOST:PORT"),
    ):
        assert main([str(config), *arguments]) == 2
        printed = capsys.readouterr().err
        assert printed.startswith(message)
        assert printed.count("\n") == 1
