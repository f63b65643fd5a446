"""The device mesh: its three axes, and virtual CPU devices for machines that have only one."""

import os
import re
from collections.abc import Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from rlring.errors import UsageError

AXES = ("data", "ring", "ulysses")
SEQUENCE_AXES = ("ring", "ulysses")  # ulysses innermost: it wants the fast links

_CPU_FLAGS = {
    # A virtual CPU device that is busy with a long hop looks stuck to XLA, which aborts the process after 40 s.
    "xla_cpu_collective_call_warn_stuck_timeout_seconds": 300,
    "xla_cpu_collective_call_terminate_timeout_seconds": 1800,
    "xla_cpu_collective_timeout_seconds": 1800,
    # The scheduler for concurrency begins all hops of a ring as early as it can, and holds their keys all at once: of 8
    # devices each needed 2.9 times the temporary memory. The devices keep the cores busy without it.
    "xla_cpu_enable_concurrency_optimized_scheduler": "false",
}


def make_mesh(*, data: int = 1, ring: int = 1, ulysses: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns the mesh ("data", "ring", "ulysses") over the first data * ring * ulysses devices.

    devices: those of another cluster (rlring.topology), to compile for it. None: this process' own.

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
    # Neighbours of an axis are neighbours on the torus of a TPU. jax.make_mesh would refuse a ring of half a side.
    ordered = mesh_utils.create_device_mesh(sizes, devices[:wanted], allow_split_physical_axes=True)
    return Mesh(ordered, AXES, axis_types=(AxisType.Auto,) * 3)


def request_cpu_devices(count: int) -> None:
    """Makes this process see `count` virtual CPU devices, with patient collectives. Call it before any computation.

    Of several calls the largest count holds. Only the CPU backend is told: where JAX picks a GPU or a TPU it changes
    nothing. What the user put into XLA_FLAGS stays. A no-op once JAX is up with enough devices.

    Raises:
        UsageError: JAX is up already and sees fewer devices.
    """
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
