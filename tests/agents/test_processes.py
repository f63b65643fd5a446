"""Commands of their own processes that meet in one folder."""

import os
import subprocess
import sys
import time
from pathlib import Path

from agents.evaluate import evaluate, main
from agents.results import read_results


def start(folder: Path) -> subprocess.Popen:
    """Returns a process that has begun to evaluate a run."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen([sys.executable, "-m", "agents.evaluate", str(folder)], env=environment)
    while not (folder / ".evaluating").exists():
        assert process.poll() is None
        time.sleep(0.01)
    return process


def test_a_run_is_evaluated_by_one_command_at_a_time(trained, capsys):
    folder = trained()
    with start(folder) as first:
        assert main([str(folder)]) == 2
        told = capsys.readouterr().err
        assert told == f"error: another process evaluates {folder} right now; wait for it to end\n"
        assert first.wait() == 0
    assert len(read_results(folder)) == len((folder / "results.jsonl").read_text().splitlines()) == 6
    assert not (folder / ".evaluating").exists()
    assert evaluate(folder, progress=False) == 0


def test_a_killed_evaluation_leaves_the_run_free(trained):
    folder = trained()
    with start(folder) as first:
        first.kill()
    assert evaluate(folder, progress=False) == 6
