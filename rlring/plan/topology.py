"""Clusters that are not here: the devices of a TPU topology, for the compiler alone, and a mesh over them.

libtpu holds the whole TPU compiler and needs no TPU for it: a program lowered for these devices is compiled as it would
be on the cluster, with its schedule and its memory, and is refused if it does not fit. Nothing can run on them.
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

# Without a TPU around libtpu asks the network who it is, warns, and lets one process at a time in.
_ALONE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v4-8",  # of the host that it should believe to be on; the topology is another matter
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def topology_devices(name: str) -> Sequence[jax.Device]:
    """Returns the devices of a cluster by its name: v4:8x8x16 is a TPU v4 of 8 x 8 x 16 chips, cpu:8 is 8 virtual ones.

    A device is what a program runs on: a chip, but half a chip of a v3, whose two cores are apart. From the first TPU
    topology on this process can only compile for TPUs: a real one that it has not used yet stays out of its reach.

    Raises:
        UsageError: libtpu is not installed, or its compiler knows no such topology.
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
    # The two cores of a v4 chip work as one device, as they do on a real one.
    chip = {"chip_config_name": "megacore"} if name.startswith("v4:") else {}
    try:
        return topologies.get_topology_desc(name, platform="tpu", **chip).devices
    except jax.errors.JaxRuntimeError as error:
        raise UsageError(
            f"the TPU compiler knows no topology {name!r}: {str(error).splitlines()[0]}. "
            f"Use one that exists, such as {', '.join(EXAMPLES)}."
        ) from error


def libtpu_wanted() -> str:
    """Returns the requirement on libtpu that this jax was released with."""
    wanted = [line for line in importlib.metadata.requires("jax") or () if line.startswith("libtpu")]
    return wanted[0].split(";")[0].strip() if wanted else "libtpu"
