"""Counts what each device of a compiled program sends: its collectives, how often each runs, and their bytes.

In a collective over g devices whose result has r bytes, each device sends (g - 1) / g * r for an all-gather or an
all-to-all, (g - 1) * r for a reduce-scatter, 2 * (g - 1) / g * r for an all-reduce, which is a reduce-scatter followed
by an all-gather, and r for a permute. These are the bytes of the algorithms that send least (Thakur, Rabenseifner and
Gropp 2005, section 4).
"""

import math
import re
from typing import NamedTuple

from rlring.errors import UsageError
from rlring.plan.hlo_schedule import Instruction, computations_of, entry_of, sizes_in_bytes

_SHARES = {  # the bytes that each of g devices sends, relative to the size of the result
    "all-gather": lambda g: (g - 1) / g,
    "all-to-all": lambda g: (g - 1) / g,
    "reduce-scatter": lambda g: g - 1,
    "all-reduce": lambda g: 2 * (g - 1) / g,
    "collective-permute": lambda g: 1,
}
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


class Collective(NamedTuple):
    """A collective of a program."""

    operation: str
    operand: str  # the type of its result on one device; of the first array if the result is a tuple
    parts: int  # arrays in the result
    devices: int  # in a group that communicates; for a permute, in a ring
    times: int  # how often it runs
    bytes: float  # sent by one device each time

    @property
    def total(self) -> float:
        return self.times * self.bytes


def collectives(program: str) -> list[Collective]:
    """Returns the collectives of a program compiled for CPUs (compiled.as_text()). Of the branches of a conditional,
    counts the one that sends most.

    Raises:
        UsageError: asynchronous collectives, which other compilers make, or a collective in a loop whose number of
            iterations is not fixed.
    """
    computations = computations_of(program)
    devices = re.search(r"num_partitions=(\d+)", program.split("\n", 1)[0])
    known: dict[str, list[Collective]] = {}

    def of(name: str) -> list[Collective]:
        if name not in known:
            known[name] = [one for instruction in computations.get(name, ()) for one in sent_by(instruction)]
        return known[name]

    def sent_by(instruction: Instruction) -> list[Collective]:
        if instruction.operation.removesuffix("-start") in _SHARES:
            return [_collective(instruction, int(devices[1]) if devices else 1)]
        called = [of(name) for name in instruction.called]
        if instruction.operation == "conditional":
            return max(called, key=lambda branch: sum(one.total for one in branch))
        inside = [one for computation in called for one in computation]
        if instruction.operation != "while" or not inside:
            return inside
        trips = _TRIPS.search(instruction.rest)
        if trips is None:
            raise UsageError(
                f"what a loop sends is counted if it has a fixed count; got {instruction.name} without one. Count a "
                "program whose hops are fixed when it is compiled."
            )
        return [one._replace(times=one.times * int(trips[1])) for one in inside]

    return of(entry_of(program))


def _collective(instruction: Instruction, devices: int) -> Collective:
    operation = instruction.operation
    if operation not in _SHARES:
        raise UsageError(
            f"collectives are counted in programs of CPUs, where they are one instruction each; got {operation}. "
            "Compile for CPU devices."
        )
    group, parts = _group(instruction.rest, devices), sizes_in_bytes(instruction.type)
    operand = re.search(r"[a-z]+\d*\[[\d,]*\]", instruction.type)[0]
    return Collective(operation, operand, len(parts), group, 1, _SHARES[operation](group) * sum(parts))


def _group(rest: str, devices: int) -> int:
    """Returns the number of devices in a group of the collective."""
    if pairs := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", rest):
        to = dict(re.findall(r"\{(\d+),(\d+)\}", pairs[1]))
        first = next(iter(to), None)
        ring = [first]
        while (after := to.get(ring[-1])) not in (None, first):
            ring.append(after)
        return len(ring)
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return len(listed[1].split(","))
    if computed := re.search(r"replica_groups=\[\d+,(\d+)\]<=", rest):
        return int(computed[1])
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\([^)]*\))? \{([^}:]*)\}", rest):
        sizes = dict(re.findall(r"'([^']*)'=(\d+)", named[1]))
        return math.prod(int(sizes[name]) for name in re.findall(r"'([^']*)'", named[2]))
    if "replica_groups=" not in rest or "replica_groups={}" in rest:
        return devices
    groups = rest[rest.index("replica_groups=") :][:80]
    raise UsageError(f"groups of devices are lists or axes of a mesh; got {groups}. Count a program of another JAX.")
