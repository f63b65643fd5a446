"""Does this model fit that cluster? python -m rlring.plan --model 3b --topology v4:8x8x16 --tokens 16777216

Compiles the whole training step (forward, backward, AdamW, FSDP, remat) with the compiler of the cluster, without the
cluster, and prints a Markdown table: memory of a device, work, traffic. Progress is on stderr.

Memory is the compiler's word, and so is whether a hop is sent while it computes. Times are a model: peak compute and
one link of the torus (rlring.traffic), so the share of hidden communication is a prediction.
"""

import argparse
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import jax
import jax.numpy as jnp

from rlring.cli import Parser, check_json, count, run, version, write_json
from rlring.errors import UsageError
from rlring.language_model import PRESETS, Training, preset
from rlring.mesh import make_mesh
from rlring.schedule import permutes
from rlring.topology import EXAMPLES, topology_devices
from rlring.traffic import DATASHEETS
from rlring.work import Request, Work

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
    return compiled_plan(request, Work.of(training.config, request, weights), step.lower(state, tokens, tokens))


def compiled_plan(request: Request, work: Work, lowered: jax.stages.Lowered) -> Plan:
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
        parameters=work.parameters,
        fits=None if hbm is None else refusal is None and total is not None and total <= hbm,
        hbm_bytes=hbm,
        argument_bytes=arguments,
        temporary_bytes=temporary,
        total_bytes=total,
        flops=work.flops,
        computed_flops=work.computed_flops,
        ring_bytes=work.ring_bytes,
        gather_bytes=work.gather_bytes,
        permutes=len(transfers) if known else None,
        permutes_hidden=sum(x.is_hidden for x in transfers) if known else None,
        hidden_share=work.hidden_share(link, transfers) if known else None,
        compile_seconds=round(seconds, 1),
    )


def search(request: Request, report) -> Iterator[Plan]:
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


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status: 0, 2 for arguments that cannot work, 130 when interrupted.

    Whether the model fits is no error: it is in the table.
    """
    arguments = _arguments(argv)
    command = ["python", "-m", "rlring.plan", *(sys.argv[1:] if argv is None else argv)]

    def body() -> None:
        check_json(arguments.json)
        jax.config.update("jax_platforms", "cpu")  # nothing runs: a TPU that is here is left alone
        request = _request(arguments)
        plans = list(search(request, _reported)) if arguments.search else [_reported(request)]
        publish(plans, command, arguments.json)

    return run(body)


def publish(plans: Sequence[Plan], command: Sequence[str], path: Path | None) -> None:
    """Prints the table with the command and versions that made it, and writes all of it as JSON where asked."""
    line = shlex.join(command)
    versions = {name: version(name) for name in ("rlring", "jax", "jaxlib", "libtpu")}
    print(table(plans))
    print(f"\n`{line}`: {', '.join(f'{k} {v}' for k, v in versions.items() if v)}.")
    if path is not None:
        made = {"command": line, "date": datetime.now(UTC).isoformat(timespec="seconds"), "versions": versions}
        write_json(path, made | {"plans": [asdict(one) for one in plans]})


def table(plans: Sequence[Plan]) -> str:
    """Returns the plans as a Markdown table; memory, work and traffic are those of one device in one step."""
    columns = (
        *("model", "topology", "data x ring x ulysses", "remat", "tokens", "a device", "arguments GiB"),
        *("temporaries GiB", "total of GiB", "fits", "PFLOP", "computed", "ring GB", "weights GB", "hops hidden"),
    )
    lines = [f"| {' | '.join(columns)} |", "| --- | --- | --- | --- |" + " ---: |" * (len(columns) - 4)]
    for one in plans:
        r = one.request
        gib = ["-" if x is None else f"{x / GIB:.2f}" for x in (one.argument_bytes, one.temporary_bytes)]
        total = "-" if one.total_bytes is None else f"{one.total_bytes / GIB:.2f}"
        hbm = "-" if one.hbm_bytes is None else f"{one.hbm_bytes / GIB:.2f}"
        hidden = "-" if one.hidden_share is None else f"{one.hidden_share:.0%}"
        cells = (
            *(f"{r.model} ({_counted(one.parameters)})", r.topology, f"{r.data} x {r.ring} x {r.ulysses}", r.remat),
            *(f"{r.tokens:,}", f"{r.rows * r.tokens // (r.data * r.ring * r.ulysses):,}", *gib, f"{total} of {hbm}"),
            {True: "yes", False: "no", None: "-"}[one.fits],
            *(_shown(one.flops / 1e15), _shown(one.computed_flops / 1e15)),
            *(_shown(one.ring_bytes / 1e9), _shown(one.gather_bytes / 1e9), hidden),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _counted(parameters: int) -> str:
    return f"{parameters / 1e9:.2f}B" if parameters >= 1e7 else f"{parameters / 1e6:.2f}M"


def _shown(number: float) -> str:
    return f"{number:.1f}" if number >= 10 or not number else f"{number:.2g}"


def _reported(request: Request) -> Plan:
    return reported(request, lambda: plan(request))


def reported(request: Request, make: Callable[[], Plan]) -> Plan:
    """Returns make(), which takes minutes, and says so on stderr."""
    what = f"{request.model} at {request.tokens:,} tokens on {request.topology}"
    print(f"{what}: compiling ...", end=" ", file=sys.stderr, flush=True)
    try:
        one = make()
    except BaseException:
        print(file=sys.stderr)  # what went wrong has a line of its own
        raise
    total = "" if one.total_bytes is None else f"{one.total_bytes / GIB:.2f} GiB a device, "
    fits = {True: "fits", False: "does not fit", None: "compiled"}[one.fits]
    print(f"{total}{fits} ({one.compile_seconds:.0f} s)", file=sys.stderr)
    return one


def _request(arguments: argparse.Namespace) -> Request:
    devices = len(topology_devices(arguments.topology))
    data, ulysses = arguments.data, arguments.ulysses
    if devices % (data * ulysses):
        raise UsageError(
            f"--data {data} times --ulysses {ulysses} does not divide the {devices} devices of {arguments.topology}. "
            "The ring takes the devices that they leave."
        )
    ring, rows = devices // (data * ulysses), arguments.rows or data
    if rows % data or arguments.tokens % (ring * ulysses):
        raise UsageError(
            f"{data} x {ring} x {ulysses} devices share --rows {rows} sequences of --tokens {arguments.tokens}. Use "
            f"a multiple of {data} rows and of {ring * ulysses} tokens."
        )
    preset(arguments.model)
    return Request(arguments.model, arguments.topology, arguments.tokens, data, ring, ulysses, rows, arguments.remat)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m rlring.plan", description="Memory and traffic of training, from the compiler.")
    add = parser.add_argument
    add("--model", required=True, metavar="M", help=", ".join(PRESETS))
    add("--topology", required=True, metavar="T", help=f"such as {', '.join(EXAMPLES)}; cpu: virtual devices")
    add("--tokens", required=True, type=count, help="of one sequence")
    add("--data", type=count, default=1, help="devices over which the sequences of a batch are split")
    add("--ulysses", type=count, default=1, help="devices over which heads are split; the ring takes the rest")
    add("--rows", type=count, help="sequences of a batch; as many as --data if left out")
    add("--remat", choices=("none", "attention", "all", "offload"), default="all")
    add("--search", action="store_true", help="double (or halve) the tokens up to the longest context that fits")
    add("--json", type=Path, metavar="F", help="also write everything into this file")
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())
