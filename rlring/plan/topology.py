"""Devices of a TPU cluster for compiling without the cluster.

libtpu contains the TPU compiler, which needs no TPU. A program lowered for these devices is compiled as on the cluster,
with the same schedule and memory use, and with an error if it does not fit. Programs cannot run on these devices.
"""

import importlib.util
import os
import re
from collections.abc import Sequence

import jax
from jax.experimental import topologies

from rlring.errors import UsageError
from rlring.mesh import request_cpu_devices

EXAMPLES = ("v3:16x16", "v4:8x8x16", "v5e:16x16", "v5p:8x8x16", "v6e:16x16", "cpu:8")

# Without these variables, on a machine without a TPU, libtpu queries a metadata server, prints warnings, and allows
# only one process at a time.
_ALONE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v4-8",  # a pretended host type, which is independent of the topology
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def topology_devices(name: str) -> Sequence[jax.Device]:
    """Returns the devices of a cluster by name: v4:8x8x16 is a TPU v4 of 8 x 8 x 16 chips, cpu:8 is 8 virtual CPUs.

    A device is a chip, except for v3, where each of the two cores of a chip is a device. After a call with a TPU
    topology this process can only compile for TPUs: it cannot use a real TPU that it has not used before.

    Raises:
        UsageError: `name` is not of this form, libtpu is not installed, or the compiler has no such topology.
    """
    if cpu := re.fullmatch(r"cpu:([1-9]\d*)", name):
        request_cpu_devices(int(cpu[1]))
        return jax.devices("cpu")[: int(cpu[1])]
    if not re.fullmatch(r"v\d+[a-z]*:\d+(x\d+)+", name):
        raise UsageError(
            f"a topology is a generation and how many chips it has along each side; got {name!r}. "
            f"Write it like {', '.join(EXAMPLES)}."
        )
    if importlib.util.find_spec("libtpu") is None:
        raise UsageError(
            f"topology {name!r} needs the TPU compiler, which is in libtpu; it is not installed. Run "
            f"`pip install libtpu` ({libtpu_wanted()} is made for jax {jax.__version__}); no TPU is needed."
        )
    for variable, value in _ALONE.items():
        os.environ.setdefault(variable, value)
    # As on a real v4, the two cores of a chip form one device.
    chip = {"chip_config_name": "megacore"} if name.startswith("v4:") else {}
    try:
        return topologies.get_topology_desc(name, platform="tpu", **chip).devices
    except jax.errors.JaxRuntimeError as error:
        raise UsageError(
            f"the TPU compiler knows no topology {name!r}: {str(error).splitlines()[0]}. "
            f"Use one that exists, such as {', '.join(EXAMPLES)}."
        ) from error


def libtpu_wanted() -> str:
    """Returns the version requirement on libtpu of the installed jax."""
    wanted = [line for line in importlib.metadata.requires("jax") or () if line.startswith("libtpu")]
    return wanted[0].split(";")[0].strip() if wanted else "libtpu"
