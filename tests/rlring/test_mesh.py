"""mesh.py: axes, sizes and what it says when there are too few devices."""

import os
import subprocess
import sys

import jax
import pytest

from rlring.errors import UsageError
from rlring.mesh import AXES, make_mesh, request_cpu_devices


def test_axes_and_order():
    mesh = make_mesh(data=2, ring=2, ulysses=2)
    assert mesh.axis_names == AXES
    assert dict(mesh.shape) == {"data": 2, "ring": 2, "ulysses": 2}
    assert [device.id for device in mesh.devices.reshape(-1)] == list(range(8))  # ulysses innermost
    assert make_mesh(ring=2).devices.size == 2


def test_too_few_devices():
    with pytest.raises(UsageError, match=r"data=1, ring=16, ulysses=1 needs 16 devices; this process sees 8 \(cpu\)"):
        make_mesh(ring=16)
    with pytest.raises(UsageError, match=r"at least one device; got data=1, ring=0, ulysses=1. Use 1"):
        make_mesh(ring=0)


def test_request_after_the_start():
    jax.devices()
    request_cpu_devices(8)
    with pytest.raises(UsageError, match=r"16 virtual CPU devices were asked for after JAX had started with 8"):
        request_cpu_devices(16)


def test_request_keeps_the_users_flags():
    program = (
        "import os, jax; from rlring.mesh import request_cpu_devices; request_cpu_devices(3); request_cpu_devices(2);"
        "print(len(jax.devices()), os.environ['XLA_FLAGS'])"
    )
    flag = "--xla_cpu_collective_call_terminate_timeout_seconds=77"
    environment = {**os.environ, "XLA_FLAGS": flag, "JAX_PLATFORMS": "cpu"}
    ran = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True, cwd=os.getcwd()
    )
    devices, *flags = ran.stdout.split()
    assert devices == "3"
    assert flags.count(flag) == 1
    assert [f for f in flags if "terminate_timeout" in f] == [flag]
    assert "--xla_cpu_collective_call_warn_stuck_timeout_seconds=300" in flags
