"""What the compiler of a cluster says of a training step: whether it fits, and how much of its sending is hidden."""

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

# What a program may use of a device, in GiB: the compiler's own figure, from its refusal of a program of 512 GiB
# (libtpu 0.0.52). The chips have 16 (each core of a v3), 32, 16, 95 and 32: cloud.google.com/tpu/docs/v3 to v6e.
HBM = {"v3": 15.48, "v4": 30.75, "v5e": 15.75, "v5p": 95.73, "v6e": 31.24}
_REFUSED = re.compile(r"(?:total memory required for .*?|Used )\(?([\d.]+)([KMGTP])\)? ", re.S)
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "P": 2**50}


@dataclass(frozen=True)
class Plan:
    """The answer. Bytes and operations are those of one device in one step."""

    request: Request
    parameters: int
    fits: bool | None  # None where nobody says how much memory there is
    hbm_bytes: int | None
    argument_bytes: int | None  # weights, optimizer state and tokens; None where the compiler refused
    temporary_bytes: int | None
    total_bytes: int | None
    flops: float  # of the model: forward and backward, causal, nothing computed twice
    computed_flops: float  # with what remat computes again
    ring_bytes: float  # sent to the next device of the ring
    gather_bytes: float  # of weights and gradients, received: FSDP
    permutes: int | None  # of the ring, in the program, and how many are sent while matrices are multiplied
    permutes_hidden: int | None
    hidden_share: float | None  # of the time that the ring sends, by the model of the links
    compile_seconds: float


def plan(request: Request) -> Plan:
    """Returns what the compiler says of the training step.

    Raises:
        UsageError: a topology, mesh or model that cannot be.
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
    """Returns what the compiler says of a step that was lowered for the devices of request.topology."""
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
        # The ring's; the compiler turns products with scattered gradients into rings of its own.
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
    """Yields the plans on the way to the longest context that fits, the tokens doubled or halved each time.

    Raises:
        UsageError: nobody says how much memory the devices have.
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
    """Returns how many bytes the refused program wanted."""
    found = _REFUSED.search(refusal)
    return int(float(found[1]) * _UNITS[found[2]]) if found else None
