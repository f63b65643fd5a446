"""Finds what a compiled program computes during its transfers, from the compiler's instruction schedule.

A transfer is asynchronous if it is split into a start and a done instruction, and hidden if matrices are multiplied
between the two. The instructions of a scheduled program run in the order of its text.
"""

import math
import re
from typing import NamedTuple

import jax.numpy as jnp

from rlring.errors import UsageError

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*?[\])}]) ([a-z][\w-]*)\((.*)$")
_CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+)\[([\d,]*)\]")
_PRODUCTS = ("dot", "convolution")  # the TPU compiler writes every matrix product as a convolution


class Transfer(NamedTuple):
    """A collective permute of a program."""

    source: str  # op_name: the operation of the model that it comes from
    bytes: int  # sent by one device
    is_asynchronous: bool
    is_hidden: bool
    is_repeated: bool  # not in the entry computation, so usually in a loop

    @property
    def is_backward(self) -> bool:
        return "transpose(" in self.source


class Instruction(NamedTuple):
    """A line of a computation: `name = type operation(rest`."""

    name: str
    type: str
    operation: str
    rest: str

    @property
    def called(self) -> list[str]:
        branches = [name for group in _BRANCHES.findall(self.rest) for name in re.findall(r"[\w.-]+", group)]
        return _CALLED.findall(self.rest) + branches


def permutes(program: str) -> list[Transfer]:
    """Returns the collective permutes of a compiled program (compiled.as_text()) in the order of its text.

    Raises:
        UsageError: the program is not scheduled.
    """
    if "is_scheduled=true" not in program.split("\n", 1)[0]:
        raise UsageError(
            "the order of the instructions is known of a scheduled program; got one that is not. Pass "
            "jax.jit(f).lower(...).compile().as_text()."
        )
    computations = computations_of(program)
    multiplying: dict[str, bool] = {}

    def multiplies(instruction: Instruction) -> bool:
        if instruction.operation in _PRODUCTS or 'custom_call_target="tpu_custom_call"' in instruction.rest:
            return True
        for name in instruction.called:
            if name not in multiplying:
                multiplying[name] = any(map(multiplies, computations.get(name, ())))
        return any(multiplying[name] for name in instruction.called)

    entry, found = entry_of(program), []
    for name, instructions in computations.items():
        for i, one in enumerate(instructions):
            if one.operation not in ("collective-permute", "collective-permute-start"):
                continue
            is_asynchronous = one.operation == "collective-permute-start"
            done, between = one, []
            if is_asynchronous:
                after = instructions[i + 1 :]
                end = next(
                    j
                    for j, x in enumerate(after)
                    if x.operation == "collective-permute-done" and re.match(rf".*%?{re.escape(one.name)}\)", x.rest)
                )
                done, between = after[end], after[:end]
            source = re.search(r'op_name="([^"]*)"', one.rest)
            is_hidden = any(map(multiplies, between))
            found.append(
                Transfer(
                    source[1] if source else "", sizes_in_bytes(done.type)[0], is_asynchronous, is_hidden, name != entry
                )
            )
    return found


def computations_of(program: str) -> dict[str, list[Instruction]]:
    """Returns the instructions of each computation of a program, in order, by the name of the computation."""
    computations, current = {}, []
    for line in program.splitlines():
        if start := _COMPUTATION.match(line):
            current = computations[start[1]] = []
        elif instruction := _INSTRUCTION.match(line):
            current.append(Instruction(*instruction.groups()))
    return computations


def entry_of(program: str) -> str:
    """Returns the name of the entry computation of a program."""
    return _COMPUTATION.match(next(line for line in program.splitlines() if line.startswith("ENTRY")))[1]


def sizes_in_bytes(type: str) -> list[int]:
    """Returns the sizes in bytes of the arrays in a type such as u16[2,1024]{1,0:T(8,128)} or a tuple of such types."""
    found = _ARRAY.findall(type)
    return [_item_bytes(kind) * math.prod(map(int, filter(None, sizes.split(",")))) for kind, sizes in found]


def _item_bytes(kind: str) -> int:
    names = {"s": "int", "u": "uint", "f": "float", "bf": "bfloat"}
    letters, bits = re.match(r"([a-z]+)(\d*)", kind).groups()
    return 1 if kind == "pred" else jnp.dtype(names[letters] + bits).itemsize
