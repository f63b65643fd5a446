"""Timing of the attention schemes beside each other: what rlring.bench prints.

What is compared is measured in turns: in every round each candidate of a length runs once, so that a machine that gets
slower gets slower for all. Ratios and shares are taken within a round, and their median is what counts. Beside the
schemes run a product of matrices on as many devices, which is the peak that the shares are of, and torch's attention
where torch is there. Everything is causal self-attention; where there is a ring, tokens stand in the zigzag order.
"""

import importlib
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from rlring.attention import AttentionConfig, Mask, attention, zigzag_order
from rlring.attention.ulysses import check_heads
from rlring.errors import UsageError
from rlring.mesh import SEQUENCE_AXES, make_mesh

EXACT = ("auto", "dense", "blockwise", "ring", "all_gather", "ulysses", "hybrid")  # all the same work: comparable
ONE_DEVICE = ("dense", "blockwise")
BACKWARD_FLOPS = 2.5  # of a forward's: five products of matrices for two


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    schemes: tuple[str, ...]
    lengths: tuple[int, ...]
    devices: tuple[int, ...]
    heads: int
    kv_heads: int
    head_size: int
    batch: int
    type: str
    repeats: int
    matmul: int


@dataclass(frozen=True)
class Pass:
    """A forward, or a forward and backward."""

    median_ms: float
    min_ms: float
    ratio_to_blockwise: float | None  # None where blockwise was not measured
    share_of_peak: float
    temporary_bytes: int | None  # of one device, beyond arguments and results; None where nobody knows
    rounds_ms: tuple[float, ...]


@dataclass(frozen=True)
class Measurement:
    """A scheme at a length. devices are those it uses: one for dense, blockwise and torch."""

    scheme: str
    length: int
    devices: int
    ring: int
    ulysses: int
    peak_flops: float  # operations a second of the product of matrices on these devices, all together
    forward: Pass
    forward_backward: Pass


class _Run(NamedTuple):
    """Something to be timed: calling it runs it to its end."""

    call: Callable[[], object]
    temporary_bytes: int | None


class _Candidate(NamedTuple):
    scheme: str
    devices: int
    ring: int
    ulysses: int
    forward: _Run
    forward_backward: _Run


def measure(settings: Settings) -> list[Measurement]:
    """Returns the measurements, length by length.

    Raises:
        UsageError: a scheme or a length does not fit the devices, or there are too few of them.
    """
    _check(settings)
    found = []
    for length in settings.lengths:
        found += _measure_length(length, settings)
    return found


def causal_flops(settings: Settings, length: int) -> float:
    """Returns the operations of a causal forward; of forward and backward together it is 3.5 times as many.

    As FlashAttention counts (2205.14135, 2307.08691): two products of matrices in the forward, five in the backward,
    the masked half left out.
    """
    pairs = length * (length + 1) / 2
    return 4.0 * settings.batch * settings.heads * settings.head_size * pairs


def _measure_length(length: int, settings: Settings) -> list[Measurement]:
    candidates = [
        _scheme(scheme, length, devices, settings)
        for scheme in settings.schemes
        for devices in ((1,) if scheme in ONE_DEVICE else settings.devices)
    ]
    candidates += _torch(length, settings)
    matmuls = {devices: _matmul(devices, settings) for devices in sorted({c.devices for c in candidates})}
    runs = {("matmul", n): run for n, run in matmuls.items()}
    for place, candidate in enumerate(candidates):
        runs |= {(place, "forward"): candidate.forward, (place, "both"): candidate.forward_backward}
    for run in runs.values():
        run.call()  # the first one is never like the others
    seconds: dict[tuple, list[float]] = {name: [] for name in runs}
    for number in range(settings.repeats):
        _say(f"{length} tokens: round {number + 1} of {settings.repeats}")
        for name, run in runs.items():
            start = time.perf_counter()
            run.call()
            seconds[name].append(time.perf_counter() - start)
    blockwise = next((place for place, c in enumerate(candidates) if c.scheme == "blockwise"), None)
    flops = causal_flops(settings, length)

    def summary(place: int, name: str, run: _Run, times_forward: float) -> Pass:
        took, matmul = seconds[place, name], seconds["matmul", candidates[place].devices]
        peaks = [_matmul_flops(candidates[place].devices, settings) / s for s in matmul]
        shares = [times_forward * flops / s / peak for s, peak in zip(took, peaks, strict=True)]
        ratio = None
        if blockwise is not None:
            ratio = statistics.median(s / b for s, b in zip(took, seconds[blockwise, name], strict=True))
        in_ms = tuple(1e3 * s for s in took)
        return Pass(statistics.median(in_ms), min(in_ms), ratio, statistics.median(shares), run.temporary_bytes, in_ms)

    return [
        Measurement(
            c.scheme,
            length,
            c.devices,
            c.ring,
            c.ulysses,
            peak_flops=_matmul_flops(c.devices, settings) / statistics.median(seconds["matmul", c.devices]),
            forward=summary(place, "forward", c.forward, 1.0),
            forward_backward=summary(place, "both", c.forward_backward, 1.0 + BACKWARD_FLOPS),
        )
        for place, c in enumerate(candidates)
    ]


def _scheme(scheme: str, length: int, devices: int, settings: Settings) -> _Candidate:
    _say(f"{length} tokens: compiling {scheme} on {devices} device{'s' * (devices > 1)}")
    ring, ulysses = _axes(scheme, devices, settings)
    mesh, config = make_mesh(ring=ring, ulysses=ulysses), AttentionConfig(scheme)
    order = zigzag_order(length, ring) if ring > 1 else range(length)
    mask = Mask.causal(jnp.broadcast_to(jnp.asarray(order, jnp.int32), (settings.batch, length)))
    shapes = [(settings.batch, length, n, settings.head_size) for n in _heads_of(settings)]
    keys = jax.random.split(jax.random.key(0), len(shapes))
    arrays = [jax.random.normal(key, shape, settings.type) for key, shape in zip(keys, shapes, strict=True)]
    *inputs, d_out, mask = jax.device_put((*arrays, mask), NamedSharding(mesh, P("data", SEQUENCE_AXES)))

    def forward(q, k, v, mask):
        return attention(q, k, v, mask, config=config, mesh=None if scheme in ONE_DEVICE else mesh)

    def forward_backward(q, k, v, mask, d_out):
        out, pull = jax.vjp(lambda q, k, v: forward(q, k, v, mask), q, k, v)
        return out, pull(d_out)

    runs = _compiled(forward, *inputs, mask), _compiled(forward_backward, *inputs, mask, d_out)
    return _Candidate(scheme, devices, ring, ulysses, *runs)


def _axes(scheme: str, devices: int, settings: Settings) -> tuple[int, int]:
    """Returns the sizes of (ring, ulysses). hybrid takes the largest ulysses that fits the heads and leaves a ring."""
    match scheme:
        case "ulysses":
            return 1, devices
        case "hybrid":
            heads, kv_heads = settings.heads, settings.kv_heads
            shares = (n for n in range(max(1, devices // 2), 0, -1) if devices % n == 0 == heads % n)
            ulysses = next(n for n in shares if kv_heads % n == 0 or n % kv_heads == 0)
            return devices // ulysses, ulysses
    return devices, 1


def _heads_of(settings: Settings) -> tuple[int, int, int, int]:
    """Of q, k, v and the gradient of the out."""
    return settings.heads, settings.kv_heads, settings.kv_heads, settings.heads


def _compiled(function: Callable, *arguments) -> _Run:
    compiled = jax.jit(function).lower(*arguments).compile()
    memory = compiled.memory_analysis()
    return _Run(
        lambda: jax.block_until_ready(compiled(*arguments)), None if memory is None else memory.temp_size_in_bytes
    )


def _matmul(devices: int, settings: Settings) -> _Run:
    """The peak to be compared with: on every device a product of two square matrices, all at the same time."""
    mesh, side = make_mesh(ring=devices), settings.matmul
    matrices = jax.random.normal(jax.random.key(0), (devices * side, side), settings.type)
    matrices = jax.device_put(matrices, NamedSharding(mesh, P("ring")))
    return _compiled(jax.shard_map(jnp.matmul, mesh=mesh, in_specs=P("ring"), out_specs=P("ring")), matrices, matrices)


def _matmul_flops(devices: int, settings: Settings) -> float:
    return 2.0 * settings.matmul**3 * devices


def _torch(length: int, settings: Settings) -> list[_Candidate]:
    """Returns torch's own attention on one device, the same work, or nothing where torch cannot run it."""
    device = {"cpu": "cpu", "gpu": "cuda"}.get(jax.default_backend())
    if importlib.util.find_spec("torch") is None:
        return []
    torch = importlib.import_module("torch")
    if device is None or (device == "cuda" and not torch.cuda.is_available()):
        _say(f"torch sees no {jax.default_backend()}: left out")
        return []
    attend = partial(
        torch.nn.functional.scaled_dot_product_attention,
        is_causal=True,
        enable_gqa=settings.heads != settings.kv_heads,
    )
    make = partial(torch.randn, device=device, dtype=getattr(torch, settings.type))
    q, k, v, d_out = (make(settings.batch, n, length, settings.head_size) for n in _heads_of(settings))
    with_gradient = [x.requires_grad_() for x in (q, k, v)]
    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)

    def forward():
        with torch.no_grad():
            attend(q, k, v)
        wait()

    def forward_backward():
        torch.autograd.grad(attend(*with_gradient), with_gradient, d_out)
        wait()

    return [_Candidate("torch", 1, 1, 1, _Run(forward, None), _Run(forward_backward, None))]


def _check(settings: Settings) -> None:
    several = [scheme for scheme in settings.schemes if scheme not in ONE_DEVICE]
    for devices in settings.devices if several else ():
        make_mesh(ring=devices)
        if "ulysses" in several:
            check_heads("ulysses", settings.heads, settings.kv_heads, devices)
        for length in settings.lengths:
            if devices > 1 and length % (2 * devices):
                raise UsageError(
                    f"--lengths are multiples of 2 * --devices = {2 * devices}, so that all shards are equal; got "
                    f"{length}. Use {-(-length // (2 * devices)) * 2 * devices}."
                )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
