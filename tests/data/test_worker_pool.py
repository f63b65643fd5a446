"""Worker processes end with the work: when it is interrupted, when it fails, and when their parent is killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data.errors import DataError
from data.worker_pool import check_workers

ROOT = Path(__file__).parents[2]
SCRIPT = """
import os, signal, sys, time
from pathlib import Path
from data import cli
from data.worker_pool import worker_pool

folder = Path(sys.argv[1])

def work(number):
    temporary = folder / f"{number}.temporary"
    try:
        temporary.touch()
        time.sleep(600)
    finally:
        temporary.unlink(missing_ok=True)

def cling(number):
    (folder / f"{number}.temporary").touch()
    while True:
        try:
            time.sleep(600)
        except SystemExit:
            pass

def fail(number):
    if number == 0:
        while not (folder / "1.temporary").exists():
            time.sleep(0.01)
        open(folder / "nothing")
    work(number)

def die(number):
    os.kill(os.getpid(), signal.SIGKILL)

def body():
    with worker_pool(2) as submit:
        calls = [submit(globals()[sys.argv[2]], number) for number in range(8)]
        print("begun", flush=True)
        for call in calls:
            call.result()

if __name__ == "__main__":
    raise SystemExit(cli.run(body))
"""


@pytest.fixture
def start(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    (tmp_path / "folder").mkdir()

    def run(what):
        return subprocess.Popen(
            [sys.executable, script, tmp_path / "folder", what],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    return run


def wait_for(folder, count):
    deadline = time.monotonic() + 120
    while len(list(folder.iterdir())) < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("what", "end"),
    [*(("work", end) for end in ("ctrl-c", signal.SIGINT, signal.SIGTERM, signal.SIGKILL)), ("cling", "ctrl-c")],
)
def test_workers_end_with_their_parent(tmp_path, start, what, end):
    with start(what) as process:
        wait_for(tmp_path / "folder", 2)
        if end == "ctrl-c":  # a terminal sends it to the whole group
            os.killpg(process.pid, signal.SIGINT)
        else:
            process.send_signal(end)
        # The other end of the output is closed when the last worker is gone: they would sleep for ten minutes.
        output, error = process.communicate(timeout=60)
    assert output == "begun\n"
    if end in ("ctrl-c", signal.SIGINT):
        assert process.returncode == 130
        assert error.startswith("interrupted; ")
        assert error.count("\n") == 1
    if what == "work":
        assert list((tmp_path / "folder").iterdir()) == []


def test_ctrl_c_while_workers_start(start):
    with start("work") as process:
        assert process.stdout.readline() == "begun\n"
        os.killpg(process.pid, signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error.startswith("interrupted; ")
    assert error.count("\n") == 1


def test_a_call_that_fails_ends_the_others(tmp_path, start):
    with start("fail") as process:
        _, error = process.communicate(timeout=60)
    assert process.returncode == 2
    assert error == f"error: No such file or directory: {tmp_path / 'folder' / 'nothing'}\n"
    assert list((tmp_path / "folder").iterdir()) == []


def test_a_worker_that_dies(start):
    with start("die") as process:
        _, error = process.communicate(timeout=60)
    assert process.returncode == 2
    assert error.startswith("error: a worker process died, as it does when memory runs out; try fewer workers (now 2)")


@pytest.mark.parametrize("workers", [-1, 0, 10**6])
def test_how_many_workers(workers):
    with pytest.raises(DataError, match=rf"workers must be 1 to \d+ on this machine, .*; got {workers}"):
        check_workers(workers)
