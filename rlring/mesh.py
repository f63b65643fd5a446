"""The device mesh and its three axes, multi-process runs, and virtual CPU devices."""

import os
import re
from collections.abc import Sequence

import jax
import numpy as np
from jax._src import distributed  # the only way to find the number of processes without starting a backend
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from rlring.errors import UsageError

AXES = ("data", "ring", "ulysses")
SEQUENCE_AXES = ("ring", "ulysses")  # ulysses is innermost, because it needs the fast links

# TPUs whose slices of more than 4 x 4 chips send asynchronously only along straight lines of 1, 2 or 4 chips, but not
# back over a whole side. With JAX's default mesh no step of a ring was hidden there (compiled with libtpu 0.0.52).
_STRAIGHT_ONLY = ("TPU v5 lite", "TPU v5e")

MOST_CPU_DEVICES = 4096  # 2,048 start in seconds, 32,768 not within minutes
_CPU_FLAGS = {
    # XLA takes a virtual CPU device in a long ring step for stuck, and would abort the process after 40 s.
    "xla_cpu_collective_call_warn_stuck_timeout_seconds": 300,
    "xla_cpu_collective_call_terminate_timeout_seconds": 1800,
    "xla_cpu_collective_timeout_seconds": 1800,
    # The concurrency-optimised scheduler starts all steps of a ring as early as possible, and so holds the keys of all
    # steps at once: with 8 devices it needed 2.9 times the temporary memory. The cores are busy without it.
    "xla_cpu_enable_concurrency_optimized_scheduler": "false",
}


def make_mesh(*, data: int = 1, ring: int = 1, ulysses: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns the mesh with axes ("data", "ring", "ulysses") over the first data * ring * ulysses devices.

    Args:
        data: devices over which the rows of a batch are split.
        ring: devices of a ring over which the sequence is split.
        ulysses: devices over which the sequence is split, and during attention the heads.
        devices: None takes jax.devices(). Devices from rlring.plan.topology can only be used for compiling.

    Raises:
        UsageError: an axis is smaller than 1, or there are too few devices.
    """
    sizes = (data, ring, ulysses)
    if min(sizes) < 1:
        raise UsageError(
            f"a mesh axis has at least one device; got data={data}, ring={ring}, ulysses={ulysses}. "
            "Use 1 to turn an axis off."
        )
    wanted, devices = data * ring * ulysses, jax.devices() if devices is None else devices
    if wanted > len(devices):
        raise UsageError(
            f"a mesh of data={data}, ring={ring}, ulysses={ulysses} needs {wanted} devices; this process sees "
            f"{len(devices)} ({devices[0].platform}). Make it smaller, or on a CPU ask for virtual devices before "
            f"the first JAX computation: rlring.request_cpu_devices({wanted}), or JAX_NUM_CPU_DEVICES={wanted} in the "
            "environment."
        )
    devices = devices[:wanted]
    ordered = _straight_rings(devices, sizes) if devices[0].device_kind in _STRAIGHT_ONLY else None
    if ordered is None:
        # Neighbours on an axis are neighbours on the TPU's torus. jax.make_mesh would reject a ring of half a side.
        ordered = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(ordered, AXES, axis_types=(AxisType.Auto,) * 3)


def _straight_rings(devices: Sequence, sizes: tuple[int, int, int]) -> np.ndarray | None:
    """Returns the devices of a two-dimensional slice as [data, ring, ulysses], so that rings send in straight lines.

    The devices of `ulysses` form a box, as square as possible. A ring goes around a rectangle of such boxes, so that
    each step, including the last, leads to a neighbouring box. Returns None if no such rectangles fit, or the devices
    do not form a whole rectangle. The devices must have `coords`.
    """
    places = {tuple(device.coords): device for device in devices}
    sides = tuple(1 + max(place[axis] for place in places) for axis in range(3))
    if sides[2] != 1 or len(places) != sides[0] * sides[1]:
        return None
    _, ring, ulysses = sizes
    fits = [
        (box, rectangle)
        for box in _rectangles(ulysses, sides[:2])
        for rectangle in _rectangles(ring, (sides[0] // box[0], sides[1] // box[1]))
        if ring <= 2 or min(rectangle) > 1  # in a line of three or more, the ends are not neighbours
    ]
    if not fits:
        return None
    (box_x, box_y), (ring_x, ring_y) = min(fits, key=lambda fit: (max(fit[0]), max(fit[1])))
    grid = np.array([[places[x, y, 0] for y in range(sides[1])] for x in range(sides[0])])
    split = grid.reshape(-1, ring_x, box_x, sides[1] // (ring_y * box_y), ring_y, box_y)
    return split.transpose(0, 3, 1, 4, 2, 5).reshape(sizes)[:, _around(ring_x, ring_y)]


def _rectangles(area: int, sides: tuple[int, int]) -> list[tuple[int, int]]:
    """Returns the rectangles (x, y) of this area that tile a rectangle with these sides."""
    found = [(x, area // x) for x in range(1, area + 1) if area % x == 0]
    return [(x, y) for x, y in found if sides[0] % x == 0 and sides[1] % y == 0]


def _around(x: int, y: int) -> list[int]:
    """Returns the cells i * y + j of an x by y rectangle as a closed walk: neighbours in the walk are neighbours in the
    rectangle, and so are the last and the first cell. The number of cells must be even.
    """
    cells = np.arange(x * y).reshape(x, y)
    cells = cells.T if x % 2 else cells
    there = [cell for i, row in enumerate(cells[:, 1:]) for cell in (row if i % 2 == 0 else row[::-1])]
    return [int(cell) for cell in (cells[0, 0], *there, *cells[:0:-1, 0])]


def join_cluster(
    address: str | None = None, *, processes: int | None = None, process: int | None = None, patience_s: int = 100
) -> None:
    """Joins this process to a multi-process run: jax.devices() then returns the devices of all processes.

    Call it before anything else of JAX.

    Leave out address, processes and process if Slurm, Kubernetes, Open MPI or Cloud TPU started this process: then they
    are detected.

    Args:
        address: HOST:PORT of process 0.
        processes: the number of processes.
        process: the index of this process.
        patience_s: seconds without a heartbeat after which a process counts as dead, and the others end too.

    Raises:
        UsageError: only some of the three were given, the address is not HOST:PORT, or no known launcher started this
            process.
    """
    given = (address, processes, process)
    if None in given and given != (None, None, None):
        raise UsageError(
            f"a cluster takes an address, the number of processes and which one this is; got {address}, {processes}, "
            f"{process}. Give all three, or none where Slurm, Kubernetes, Open MPI or Cloud TPU starts the processes."
        )
    if processes is not None and not 0 <= process < processes:
        raise UsageError(f"of {processes} processes one is number 0 to {max(0, processes - 1)}; got {process}.")
    port = "1" if address is None else address.rpartition(":")[2]
    if address is not None and (":" not in address or not port.isdecimal() or not 0 < int(port[:9]) < 2**16):
        raise UsageError(f"a cluster's address is HOST:PORT, such as 10.0.0.1:1234; got {address!r}. Give that.")
    if patience_s < 1:
        raise UsageError(f"patience is a number of seconds, at least 1; got {patience_s}. Leave it out for 100.")
    try:
        jax.distributed.initialize(address, processes, process, heartbeat_timeout_seconds=patience_s)
    except ValueError as nothing_found:
        raise UsageError(
            f"no cluster was found: {nothing_found} Neither Slurm, Kubernetes, Open MPI nor Cloud TPU seems to have "
            "started this process; give the address of process 0, the number of processes, and which one this is."
        ) from nothing_found


def processes() -> int:
    """Returns the number of processes of the run; unlike jax.process_count() it starts no backend."""
    return distributed.global_state.num_processes or 1


def request_cpu_devices(count: int) -> None:
    """Gives this process `count` virtual CPU devices. Call it before the first JAX computation.

    Also raises the timeouts of collectives on these devices. Of several calls the largest count holds. Only the CPU
    backend is affected: on a GPU or a TPU nothing changes. The user's own XLA_FLAGS are kept. Does nothing if JAX has
    already started with enough devices.

    Raises:
        UsageError: JAX has already started with fewer devices, or count is above 4,096.
    """
    if count > MOST_CPU_DEVICES:
        raise UsageError(
            f"{count} devices of one process were asked for; at most {MOST_CPU_DEVICES} virtual CPU devices start in "
            "reasonable time. Use a smaller mesh, or more processes."
        )
    try:
        jax.config.update("jax_num_cpu_devices", max(count, jax.config.jax_num_cpu_devices))
    except RuntimeError as backend_is_up:
        seen = len(jax.devices())
        if seen < count:
            raise UsageError(
                f"{count} virtual CPU devices were asked for after JAX had started with {seen}. Call "
                f"request_cpu_devices before the first JAX computation, or set JAX_NUM_CPU_DEVICES={count} in the "
                "environment."
            ) from backend_is_up
        return
    flags = os.environ.get("XLA_FLAGS", "")
    missing = [f"--{name}={s}" for name, s in _CPU_FLAGS.items() if not re.search(rf"--{name}\b", flags)]
    os.environ["XLA_FLAGS"] = " ".join([flags, *missing]).strip()
