"""The command python -m rlring.plan: parses the arguments, reports progress on stderr, prints and writes the plans."""

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import jax

from rlring.cli import Parser, check_json, count, run, version, write_json
from rlring.errors import UsageError
from rlring.language_model import PRESETS, preset
from rlring.plan.compiled import GIB, Plan, plan, search
from rlring.plan.step_cost import Request
from rlring.plan.table import table
from rlring.plan.topology import EXAMPLES, topology_devices


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status: 0, 2 for invalid arguments, 130 when interrupted.

    A model that does not fit is no error; the table says whether it fits.
    """
    arguments = _arguments(argv)
    command = ["python", "-m", "rlring.plan", *(sys.argv[1:] if argv is None else argv)]

    def body() -> None:
        check_json(arguments.json)
        jax.config.update("jax_platforms", "cpu")  # programs are only compiled, so a TPU of this machine stays unused
        request = _request(arguments)
        plans = list(search(request, _reported)) if arguments.search else [_reported(request)]
        publish(plans, command, arguments.json)

    return run(body)


def publish(plans: Sequence[Plan], command: Sequence[str], path: Path | None) -> None:
    """Prints the table with the command and the versions; if `path` is given, writes everything to it as JSON."""
    line = shlex.join(command)
    versions = {name: version(name) for name in ("rlring", "jax", "jaxlib", "libtpu")}
    print(table(plans))
    print(f"\n`{line}`: {', '.join(f'{k} {v}' for k, v in versions.items() if v)}.")
    if path is not None:
        made = {"command": line, "date": datetime.now(UTC).isoformat(timespec="seconds"), "versions": versions}
        write_json(path, made | {"plans": [asdict(one) for one in plans]})


def _reported(request: Request) -> Plan:
    return reported(request, lambda: plan(request))


def reported(request: Request, make: Callable[[], Plan]) -> Plan:
    """Calls `make`, which may take minutes, reports progress and result on stderr, and returns the plan."""
    what = f"{request.model} at {request.tokens:,} tokens on {request.topology}"
    print(f"{what}: compiling ...", end=" ", file=sys.stderr, flush=True)
    try:
        one = make()
    except BaseException:
        print(file=sys.stderr)  # ends the line, so that the error message starts a new one
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
    parser = Parser(
        prog="python -m rlring.plan", description="Memory and traffic of a training step, from the compiler."
    )
    add = parser.add_argument
    add("--model", required=True, metavar="M", help=", ".join(PRESETS))
    add("--topology", required=True, metavar="T", help=f"such as {', '.join(EXAMPLES)}; cpu:N is N virtual devices")
    add("--tokens", required=True, type=count, help="tokens of one sequence")
    add("--data", type=count, default=1, help="devices over which the sequences of a batch are split")
    add("--ulysses", type=count, default=1, help="devices over which heads are split; the ring takes the rest")
    add("--rows", type=count, help="sequences of a batch; as many as --data if left out")
    remat = "what the backward pass recomputes (default all); offload also keeps block inputs on the host"
    add("--remat", choices=("none", "attention", "all", "offload"), default="all", help=remat)
    add("--search", action="store_true", help="double (or halve) the tokens up to the longest context that fits")
    add("--json", type=Path, metavar="F", help="also write everything to this file")
    return parser.parse_args(argv)
