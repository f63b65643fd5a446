"""One machine for every test: 8 virtual CPU devices, no rendering, no network."""

import gc
import importlib.util
import os
import signal
import socket
import subprocess
from importlib.metadata import version
from pathlib import Path

os.environ["MUJOCO_GL"] = "disabled"
# Strict, in what tests start as well: no type is promoted to another and no rank to a higher one without being asked.
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ.setdefault("WANDB_MODE", "disabled")
# Tests compile the same small programs again and again, in processes of their own too: compile each once.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "compiled"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
# Where in Python each operation was written is a sixth of the time to compile, and no test reads it.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")

# A background job of a shell ignores Ctrl-C, and so would what it starts: some tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# They compile far more than they compute: what LLVM makes of the same program may be slow. (Any flag of yours wins.)
# Of two ways to emit a fusion the older one compiles in half the time; after jaxlib 0.10 there is but the other.
os.environ["XLA_FLAGS"] = " ".join(
    [
        "--xla_backend_optimization_level=0",
        "--xla_cpu_parallel_codegen_split_count=1",  # modules of one program, each with its own costs
        *["--xla_cpu_use_fusion_emitters=false"] * version("jaxlib").startswith("0.10."),
        os.environ.get("XLA_FLAGS", ""),
    ]
).strip()

import hypothesis
import jax
import pytest

import tests.checked_annotations  # noqa: F401  (before what it checks is imported)
from rlring.mesh import request_cpu_devices

jax.config.update("jax_platforms", "cpu")
request_cpu_devices(8)
# Matrix products of tests are compared at 1e-5: no reduced precision anywhere.
jax.config.update("jax_default_matmul_precision", "highest")
# No test compares a time: on a busy machine any example may be slow.
hypothesis.settings.register_profile("rlring", deadline=None)
hypothesis.settings.load_profile("rlring")


def pytest_collection_finish():
    """What was imported stays: the garbage collector need not visit it again, many times in every compilation."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Linux gives a process 65,530 pieces of memory, and each compiled program takes hundreds: beyond, it crashes."""
    yield
    jax.clear_caches()


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any connection that leaves this machine fails the test that makes it."""
    connect = socket.socket.connect

    def refuse(self: socket.socket, address):
        if self.family != socket.AF_UNIX and not str(address[0]).startswith(("127.", "::1", "localhost")):
            raise RuntimeError(f"a test tried to reach {address}; tests never touch the network")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", refuse)


def pytest_runtest_setup(item):
    if item.get_closest_marker("libtpu") and importlib.util.find_spec("libtpu") is None:
        pytest.skip("the TPU compiler is not installed: pip install libtpu")


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)
