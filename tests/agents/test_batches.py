"""Batches made by processes: the same as those of this one, and no process is left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agents.checkpoint import read_metrics
from agents.train import main


def losses(folder: Path) -> list[float]:
    return [line["loss/action"] for line in read_metrics(folder / "metrics.jsonl")]


def command(config: Path, *more: str) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "JAX_PLATFORMS": "cpu"}
    words = [sys.executable, "-m", "agents.train", str(config), *more]
    pipe = subprocess.PIPE
    return subprocess.Popen(words, env=environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def children(process: subprocess.Popen) -> list[int]:
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True).stdout
    return [int(line) for line in listed.split()]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_workers_make_the_same_batches(write_config, trained_once, workers):
    assert main([str(write_config), f"train.workers={workers}", "train.prefetch=1"]) == 0
    assert losses(Path("runs/tiny")) == losses(trained_once())


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks Linux which processes live")
@pytest.mark.parametrize(
    ("how", "status"),
    [
        slow("interrupt", 130),
        slow("terminate", 130),
        slow("kill a worker", 2),
        ("kill", -signal.SIGKILL),
    ],
)
def test_no_worker_is_left_however_training_ends(write_config, how, status):
    """Ctrl-C and SIGTERM to the whole group, a killed worker, a killed trainer."""
    process = command(write_config, "train.updates=100000", "train.workers=2", "train.log_every=5")
    while process.poll() is None and len(read_metrics(Path("runs/tiny/metrics.jsonl"))) < 2:
        time.sleep(0.05)
    workers = children(process)
    assert len(workers) >= 2
    if how in ("interrupt", "terminate"):
        os.killpg(process.pid, signal.SIGINT if how == "interrupt" else signal.SIGTERM)
    else:
        os.kill(workers[-1] if how == "kill a worker" else process.pid, signal.SIGKILL)
    _, error = process.communicate(timeout=60)
    assert process.returncode == status, error
    assert "Traceback" not in error
    if how == "kill a worker":
        assert error.splitlines()[-1].startswith("error: a process that makes batches was killed")
    until = time.monotonic() + 20
    while any(map(is_alive, workers)) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(map(is_alive, workers))
