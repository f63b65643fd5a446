"""The command python -m rlring.bench: parses the arguments, runs the measurements, prints and writes the results."""

import argparse
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import jax
import jaxlib

from rlring.attention import SparsePattern
from rlring.attention.kernels import KERNELS
from rlring.bench.candidates import EXACT, LARGE_MATMUL, MATMUL, ONE_DEVICE, Settings
from rlring.bench.masks import BLOCKS, cases
from rlring.bench.peer_table import measure_peers, peer_table
from rlring.bench.table import Versions, table
from rlring.bench.timing import check_settings, measure
from rlring.bench.traffic import count_traffic
from rlring.bench.traffic_table import as_json, traffic_table
from rlring.cli import Parser, check_json, count, memory_errors, run, version, write_json
from rlring.errors import UsageError
from rlring.mesh import request_cpu_devices
from rlring.plan.links import links_table

LARGEST_MATMUL = 2**17  # beyond some size XLA aborts the process


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status: 0, 2 for invalid arguments, 130 when interrupted."""
    arguments = _arguments(argv)
    command = shlex.join(["python", "-m", "rlring.bench", *(sys.argv[1:] if argv is None else argv)])
    return run(lambda: _main(arguments, command))


def _main(arguments: argparse.Namespace, command: str) -> None:
    if arguments.heads % arguments.kv_heads:
        raise UsageError(
            f"--heads is a multiple of --kv-heads; got {arguments.heads} and {arguments.kv_heads}. "
            "Leave --kv-heads out for as many."
        )
    if (arguments.matmul or 0) > LARGEST_MATMUL:
        raise UsageError(f"--matmul is at most {LARGEST_MATMUL}; got {arguments.matmul}. Leave it out.")
    check_json(arguments.json)
    if arguments.traffic:
        jax.config.update("jax_platforms", "cpu")  # programs are only compiled, so other devices stay unused
    if not set(arguments.schemes) <= set(ONE_DEVICE):
        request_cpu_devices(max(arguments.devices))
    versions = _versions(command)
    settings = Settings(
        schemes=tuple(arguments.schemes),
        lengths=tuple(arguments.lengths),
        devices=tuple(arguments.devices),
        heads=arguments.heads,
        kv_heads=arguments.kv_heads,
        head_size=arguments.head_size,
        batch=arguments.batch,
        type=arguments.type,
        repeats=arguments.repeats,
        matmul=arguments.matmul or MATMUL.get(versions.platform, LARGE_MATMUL),
        kernel=arguments.kernel,
        blocks=tuple(arguments.blocks) if arguments.blocks else None,
        hops=arguments.hops,
        sparse=tuple(arguments.sparse),
        deterministic=arguments.deterministic,
        masks=tuple(arguments.masks),
    )
    if arguments.traffic:
        _traffic(settings, versions, arguments.json)
        return
    if arguments.peers:
        _peers(settings, versions, arguments.json)
        return
    with memory_errors("Lower --lengths, --batch or --matmul, or leave out the scheme 'dense'."):
        measurements = list(measure(settings))
    print(table(measurements, settings, versions))
    if arguments.json is not None:
        content = {"versions": asdict(versions), "settings": asdict(settings)}
        write_json(arguments.json, content | {"measurements": [asdict(m) for m in measurements]})


def _peers(settings: Settings, versions: Versions, json: Path | None) -> None:
    check_settings(settings)
    with memory_errors("Lower --lengths, --batch or --heads."):
        measurements = measure_peers(settings)
    print(peer_table(measurements, settings, versions))
    if json is not None:
        content = {"versions": asdict(versions), "settings": asdict(settings)}
        write_json(json, content | {"measurements": [asdict(m) for m in measurements]})


def _traffic(settings: Settings, versions: Versions, json: Path | None) -> None:
    counted = list(count_traffic(settings))
    if counted:
        print(traffic_table(counted, settings, versions), end="\n\n")
    print(links_table(settings.heads, settings.kv_heads))
    if json is not None:
        content = {"versions": asdict(versions), "settings": asdict(settings)}
        write_json(json, content | {"traffic": [as_json(one) for one in counted]})


def _versions(command: str) -> Versions:
    device = jax.devices()[0]
    affinity = getattr(os, "sched_getaffinity", None)  # only Linux has it
    return Versions(
        command=command,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        rlring=version("rlring") or "not installed",
        jax=jax.__version__,
        jaxlib=jaxlib.__version__,
        torch=version("torch"),
        python=platform.python_version(),
        platform=device.platform,
        device_kind=device.device_kind,
        system=platform.platform(),
        cores=len(affinity(0)) if affinity else os.cpu_count() or 1,
    )


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m rlring.bench", description="Measures time and memory of attention, by scheme and length."
    )
    add = parser.add_argument
    add("--schemes", nargs="+", choices=EXACT, default=["blockwise", "ring", "all_gather", "hybrid"])
    add("--lengths", nargs="+", type=count, default=[4096, 8192], help="tokens of a sequence")
    add("--heads", type=count, default=4, help="query heads")
    add("--kv-heads", type=count, help="key/value heads; as many as query heads if left out")
    add("--head-size", type=count, default=64)
    add("--batch", type=count, default=1)
    add("--type", choices=("float32", "bfloat16"), default="float32")
    add(
        "--devices",
        nargs="+",
        type=count,
        default=[8],
        help="numbers of devices that split the sequence; virtual on a CPU",
    )
    add("--kernel", choices=KERNELS, default="jax", help="kernel of all schemes but dense and sparse")
    add("--blocks", nargs=2, type=count, metavar=("Q", "K"), help="tokens per block of queries, of keys")
    add("--hops", type=count, default=0, metavar="P", help="also a ring of P devices, simulated on one")
    add(
        "--sparse",
        nargs="+",
        type=_pattern,
        default=[],
        metavar="BLOCK,LOCAL,STRIDE",
        help="also sparse attention (S2) with these patterns (rlring.SparsePattern)",
    )
    add("--deterministic", action="store_true", help="also ring and blockwise with deterministic=True")
    add("--repeats", type=count, default=5, help="rounds, in each of which every candidate runs once")
    add(
        "--matmul",
        type=count,
        help=f"size of the matrix product that gives the peak (default: {MATMUL['cpu']} on a CPU, else {LARGE_MATMUL})",
    )
    add("--json", type=Path, metavar="F", help="also write everything to this file")
    add("--peers", action="store_true", help="compare other libraries, over twelve masks, with errors against float64")
    masks = [case.name for case in cases(BLOCKS)]
    add("--masks", nargs="+", choices=masks, default=masks, metavar="MASK", help="with --peers: " + "; ".join(masks))
    add(
        "--traffic",
        action="store_true",
        help="only compile, for --devices virtual devices: count what each scheme sends, compare with its formula, "
        "and print how many tokens hide the transfers of a ring on known links",
    )
    arguments = parser.parse_args(argv)
    arguments.kv_heads = arguments.kv_heads or arguments.heads
    return arguments


def _pattern(text: str) -> SparsePattern:
    numbers = text.split(",")
    if len(numbers) != 3:
        raise argparse.ArgumentTypeError(f"{text!r} is not BLOCK,LOCAL,STRIDE, such as 64,16,8")
    return SparsePattern(*map(count, numbers))
