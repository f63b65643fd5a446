"""One machine for every test: 8 virtual CPU devices, no rendering, no network."""

import os
import socket

os.environ["MUJOCO_GL"] = "disabled"
os.environ.setdefault("WANDB_MODE", "disabled")

import hypothesis
import jax
import pytest

from rlring.mesh import request_cpu_devices

jax.config.update("jax_platforms", "cpu")
request_cpu_devices(8)
# Matrix products of tests are compared at 1e-5: no reduced precision anywhere.
jax.config.update("jax_default_matmul_precision", "highest")
# No test compares a time: on a busy machine any example may be slow.
hypothesis.settings.register_profile("rlring", deadline=None)
hypothesis.settings.load_profile("rlring")


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any connection that leaves this machine fails the test that makes it."""
    connect = socket.socket.connect

    def refuse(self: socket.socket, address):
        if self.family != socket.AF_UNIX and not str(address[0]).startswith(("127.", "::1", "localhost")):
            raise RuntimeError(f"a test tried to reach {address}; tests never touch the network")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", refuse)
