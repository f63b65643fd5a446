"""What a compiled program does while its transfers are under way: read from the schedule that the compiler settled on.

A transfer is asynchronous if it is split into a start and a done, and hidden if matrices are multiplied between the
two. Instructions of a scheduled program run in the order in which they stand.
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
_PRODUCTS = ("dot", "convolution")  # the TPU compiler writes every product of matrices as a convolution


class Transfer(NamedTuple):
    """One permute of the program."""

    source: str  # the operation of the model that it came from
    bytes: int  # that one device sends
    is_asynchronous: bool
    is_hidden: bool
    is_repeated: bool  # stands in a loop

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
    """Returns the permutes of a compiled program, compiled.as_text(), as they stand in it.

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
    """Returns the computations of a program by name, each with its instructions in their order."""
    computations, current = {}, []
    for line in program.splitlines():
        if start := _COMPUTATION.match(line):
            current = computations[start[1]] = []
        elif instruction := _INSTRUCTION.match(line):
            current.append(Instruction(*instruction.groups()))
    return computations


def entry_of(program: str) -> str:
    """Returns the name of the computation that a program begins with."""
    return _COMPUTATION.match(next(line for line in program.splitlines() if line.startswith("ENTRY")))[1]


def sizes_in_bytes(type: str) -> list[int]:
    """Returns the sizes of the arrays of a type such as u16[2,1024]{1,0:T(8,128)}, or of a tuple of such."""
    found = _ARRAY.findall(type)
    return [_item_bytes(kind) * math.prod(map(int, filter(None, sizes.split(",")))) for kind, sizes in found]


def _item_bytes(kind: str) -> int:
    names = {"s": "int", "u": "uint", "f": "float", "bf": "bfloat"}
    letters, bits = re.match(r"([a-z]+)(\d*)", kind).groups()
    return 1 if kind == "pred" else jnp.dtype(names[letters] + bits).itemsize
