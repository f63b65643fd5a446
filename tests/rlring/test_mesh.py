"""mesh.py: axes, sizes and what it says when there are too few devices."""

import itertools
import os
import subprocess
import sys
from dataclasses import dataclass

import jax
import pytest

from rlring.errors import UsageError
from rlring.mesh import AXES, _straight_rings, make_mesh, request_cpu_devices


def test_axes_and_order():
    mesh = make_mesh(data=2, ring=2, ulysses=2)
    assert mesh.axis_names == AXES
    assert dict(mesh.shape) == {"data": 2, "ring": 2, "ulysses": 2}
    assert [device.id for device in mesh.devices.reshape(-1)] == list(range(8))  # ulysses innermost
    assert make_mesh(ring=2).devices.size == 2


@dataclass(frozen=True)
class Chip:
    coords: tuple[int, int, int]


def chips(x: int, y: int, z: int = 1) -> list[Chip]:
    return [Chip(place) for place in itertools.product(range(x), range(y), range(z))]


@pytest.mark.parametrize("slice_", [(4, 8), (8, 8), (8, 16), (16, 16)], ids=str)
@pytest.mark.parametrize("ulysses", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("data", [1, 2])
def test_a_ring_on_a_flat_slice_hops_along_straight_lines(slice_, ulysses, data):
    sizes = data, slice_[0] * slice_[1] // (data * ulysses), ulysses
    mesh = _straight_rings(chips(*slice_), sizes)
    assert mesh.shape == sizes
    assert len({chip.coords for chip in mesh.reshape(-1)}) == mesh.size
    for group, place in itertools.product(range(data), range(ulysses)):
        ring = [chip.coords for chip in mesh[group, :, place]]
        for a, b in zip(ring, ring[1:] + ring[:1], strict=True):
            assert (
                sorted(abs(i - j) for i, j in zip(a, b, strict=True)) in ([0, 0, 1], [0, 0, 2], [0, 0, 4])
                or len(ring) == 1
            )
    for box in mesh.reshape(-1, ulysses):  # neighbours: no wider than a square of its size, or half of one
        assert max(abs(a.coords[i] - b.coords[i]) for a in box for b in box for i in (0, 1)) < (2 * ulysses) ** 0.5


def test_where_no_ring_can_be_straight():
    assert _straight_rings(chips(8, 1), (1, 8, 1)) is None  # one row: its ends are far apart
    assert _straight_rings(chips(2, 2, 2), (1, 8, 1)) is None  # not flat
    assert _straight_rings(chips(4, 4)[:-2], (1, 14, 1)) is None  # not the whole of it


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


def test_more_virtual_devices_than_ever_start_are_refused():
    with pytest.raises(UsageError, match=r"1048576 devices of one process were asked for; at most 4096"):
        request_cpu_devices(2**20)
