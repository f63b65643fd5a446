"""Compiles a training step for a cluster: finds whether it fits, and how much of its communication is hidden."""

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from rlring.errors import UsageError
from rlring.language_model import Training, preset
from rlring.mesh import make_mesh
from rlring.plan.hlo_schedule import permutes
from rlring.plan.links import DATASHEETS
from rlring.plan.step_cost import Request, StepCost
from rlring.plan.topology import topology_devices

GIB = 2**30

# Memory of a device that a program may use, in GiB, as stated in the compiler's error for a program of 512 GiB (libtpu
# 0.0.52). The chips have 16 (each core of a v3), 32, 16, 95 and 32: cloud.google.com/tpu/docs/v3 to v6e.
HBM = {"v3": 15.48, "v4": 30.75, "v5e": 15.75, "v5p": 95.73, "v6e": 31.24}
_REFUSED = re.compile(r"(?:total memory required for .*?|Used )\(?([\d.]+)([KMGTP])\)? ", re.S)
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "P": 2**50}


@dataclass(frozen=True)
class Plan:
    """Memory, operations and traffic of a training step; bytes and operations are per device and step."""

    request: Request
    parameters: int
    fits: bool | None  # None if the memory of the device is not known
    hbm_bytes: int | None
    argument_bytes: int | None  # weights, optimizer state and tokens; None if the compiler refused the program
    temporary_bytes: int | None
    total_bytes: int | None
    flops: float  # of the model: forward and backward, causal, without recomputation
    computed_flops: float  # with what remat recomputes
    ring_bytes: float  # sent to the next device of the ring
    gather_bytes: float  # weights and gradients received, by FSDP
    permutes: int | None  # the ring's collective permutes in the program
    permutes_hidden: int | None  # how many of them are sent while matrices are multiplied
    hidden_share: float | None  # of the ring's communication time, by the model of the links
    compile_seconds: float


def plan(request: Request) -> Plan:
    """Compiles the training step of a request and returns its plan.

    Raises:
        UsageError: an unknown topology or model, or a mesh that does not fit.
    """
    devices = topology_devices(request.topology)
    mesh = make_mesh(data=request.data, ring=request.ring, ulysses=request.ulysses, devices=devices)
    training = Training(preset(request.model, remat=request.remat), mesh=mesh)
    state = jax.eval_shape(training.init)
    tokens = jax.ShapeDtypeStruct((request.rows, request.tokens), jnp.int32)
    _, step = training.jitted()
    weights = sum(x.size for x in jax.tree.leaves(state.weights))
    return compiled_plan(request, StepCost.of(training.config, request, weights), step.lower(state, tokens, tokens))


def compiled_plan(request: Request, cost: StepCost, lowered: jax.stages.Lowered) -> Plan:
    """Compiles a step that was lowered for the devices of request.topology, and returns its plan."""
    started, refusal, compiled = time.perf_counter(), None, None
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        refusal = str(error)
    seconds = time.perf_counter() - started
    generation = _generation(request)
    hbm = int(HBM[generation] * GIB) if generation in HBM else None
    arguments = temporary = None
    total = _wanted(refusal) if refusal else None
    transfers = []
    if compiled is not None:
        memory = compiled.memory_analysis()
        arguments, temporary = memory.argument_size_in_bytes, memory.temp_size_in_bytes
        total = arguments + memory.output_size_in_bytes - memory.alias_size_in_bytes + temporary
        # Only the ring's permutes: the compiler also makes rings of matrix products with scattered gradients.
        transfers = [x for x in permutes(compiled.as_text()) if x.source.endswith("ppermute")]
    link = next((x for x in DATASHEETS if x.device == f"TPU {generation}"), None)
    known = compiled is not None and link is not None
    return Plan(
        request=request,
        parameters=cost.parameters,
        fits=None if hbm is None else refusal is None and total is not None and total <= hbm,
        hbm_bytes=hbm,
        argument_bytes=arguments,
        temporary_bytes=temporary,
        total_bytes=total,
        flops=cost.flops,
        computed_flops=cost.computed_flops,
        ring_bytes=cost.ring_bytes,
        gather_bytes=cost.gather_bytes,
        permutes=len(transfers) if known else None,
        permutes_hidden=sum(x.is_hidden for x in transfers) if known else None,
        hidden_share=cost.hidden_share(link, transfers) if known else None,
        compile_seconds=round(seconds, 1),
    )


def search(request: Request, report: Callable[[Request], Plan]) -> Iterator[Plan]:
    """Searches for the longest context that fits, doubling or halving the tokens, and yields the plan of each try.

    `report(request)` returns the plan of a request.

    Raises:
        UsageError: the memory of the devices is not known.
    """
    if _generation(request) not in HBM:
        raise UsageError(
            f"--search needs a memory to fit into; {request.topology} has no fixed one. Use a TPU topology."
        )
    one = report(request)
    yield one
    step, smallest = 2 if one.fits else 0.5, 2 * request.ring * request.ulysses
    while one.fits == (step == 2) and request.tokens * step >= smallest:
        request = replace(request, tokens=int(request.tokens * step))
        one = report(request)
        yield one


def _generation(request: Request) -> str:
    return request.topology.split(":")[0]


def _wanted(refusal: str) -> int | None:
    """Returns the bytes that a program needs, from the compiler's error message; None if it does not state them."""
    found = _REFUSED.search(refusal)
    return int(float(found[1]) * _UNITS[found[2]]) if found else None
