"""Compares rlring with other libraries over twelve masks: time, memory and the error against float64."""

import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from rlring.bench.candidates import Settings, say
from rlring.bench.masks import Case, cases
from rlring.bench.peers import LACKS, Inputs, Peer, Refused, peers
from rlring.bench.table import Versions


@dataclass(frozen=True)
class PeerMeasurement:
    """The results of one library with one mask; `refused` has the reason if the library could not run it."""

    mask: str
    length: int
    name: str
    devices: int
    refused: str | None = None
    forward_ms: tuple[float, ...] = ()  # of each round
    forward_backward_ms: tuple[float, ...] = ()
    temporary_bytes: int | None = None  # of forward and backward, on one device; None if unknown
    error: float | None = None  # largest error of the output, divided by its largest absolute value
    gradient_error: float | None = None  # the same, the largest of dq, dk and dv


def measure_peers(settings: Settings) -> list[PeerMeasurement]:
    """Returns the measurements of all libraries, for each length and each mask of `settings`."""
    found = []
    for length in settings.lengths:
        inputs = _inputs(length, settings)
        chosen = (case for case in cases(length) if case.name in settings.masks)
        for case in chosen:
            found += _measured(case, inputs, settings)
    return found


def peer_table(measurements: Iterable[PeerMeasurement], settings: Settings, versions: Versions) -> str:
    """Returns the measurements as a Markdown table, followed by the settings, versions and machine."""
    columns = ["mask", "tokens", "who", "devices", "forward ms (min)", "forward+backward ms (min)", "temporary MiB"]
    columns += ["error", "of gradients"]
    lines = ["| " + " | ".join(columns) + " |", "| --- | ---: | --- |" + " ---: |" * (len(columns) - 3)]
    refused: dict[str, list[str]] = {}
    for m in measurements:
        if m.refused is not None:
            refused.setdefault(f"{m.name} on {m.devices}: {m.refused}", []).append(m.mask)
            continue
        took = (f"{statistics.median(x):.1f} ({min(x):.1f})" for x in (m.forward_ms, m.forward_backward_ms))
        held = "-" if m.temporary_bytes is None else f"{m.temporary_bytes / 2**20:.1f}"
        errors = (f"{x:.1e}" for x in (m.error, m.gradient_error))
        lines.append("| " + " | ".join([m.mask, str(m.length), m.name, str(m.devices), *took, held, *errors]) + " |")
    note = (
        f"`{versions.command}`: batch {settings.batch}, {settings.heads} query heads over {settings.kv_heads} key/value"
        f" heads of size {settings.head_size}, {settings.type}; median (min) of {settings.repeats} interleaved rounds; "
        "temporary memory of one device, from the compiler; errors against float64, as a share of the greatest number. "
        f"{versions.device_kind} ({versions.platform}), {versions.cores} cores, rlring {versions.rlring}, jax "
        f"{versions.jax}{f', torch {versions.torch}' if versions.torch else ''}, {versions.date}."
    )
    why = [
        f"- {reason} ({'all masks' if len(masks) == len(settings.masks) * len(settings.lengths) else ', '.join(masks)})"
        for reason, masks in refused.items()
    ]
    return "\n".join([*lines, "", note, *(["", "Not measured:", "", *why] if why else [])])


def _measured(case: Case, inputs: Inputs, settings: Settings) -> list[PeerMeasurement]:
    expected, of = _exact(inputs, case.seen), partial(PeerMeasurement, case.name, len(case.seen))
    done, ready = [], []
    for peer in peers(case, inputs, settings):
        if isinstance(peer, Refused):
            done.append(of(peer.name, peer.devices, peer.reason))
            continue
        try:  # the first run is slower, and is not timed
            errors = [_error(*pair) for pair in zip(peer.both(), expected, strict=True)]
            peer.forward()
        except LACKS as error:
            done.append(of(peer.name, peer.devices, f"{type(error).__name__} when it ran"))
            continue
        ready.append((peer, errors))
    took = _rounds([peer for peer, _ in ready], settings.repeats)
    return [
        of(peer.name, peer.devices, None, *times, peer.temporary_bytes, errors[0], max(errors[1:]))
        for (peer, errors), times in zip(ready, took, strict=True)
    ] + done


def _rounds(ready: list[Peer], repeats: int) -> list[tuple[tuple[float, ...], tuple[float, ...]]]:
    """Returns, for each peer, the milliseconds of its forward, and of its forward and backward, by round. In every
    round each runs once."""
    took: list[tuple[list[float], list[float]]] = [([], []) for _ in ready]
    for number in range(repeats):
        say(f"round {number + 1} of {repeats}")
        for peer, times in zip(ready, took, strict=True):
            for run, ms in zip((peer.forward, peer.both), times, strict=True):
                start = time.perf_counter()
                run()
                ms.append(1e3 * (time.perf_counter() - start))
    return [(tuple(forward), tuple(both)) for forward, both in took]


def _inputs(length: int, settings: Settings) -> Inputs:
    shapes = [(settings.batch, length, n, settings.head_size) for n in (settings.heads, settings.kv_heads)]
    keys = jax.random.split(jax.random.key(0), 4)
    sizes = (shapes[0], shapes[1], shapes[1], shapes[0])
    return Inputs(*(jax.random.normal(k, shape, settings.type) for k, shape in zip(keys, sizes, strict=True)))


def _exact(inputs: Inputs, seen: np.ndarray) -> list[np.ndarray]:
    """Returns out, dq, dk and dv in float64, computed from the definition of attention, one head at a time."""
    with jax.enable_x64(True):
        q, k, v, d_out = (jnp.moveaxis(jnp.asarray(x, jnp.float64), 2, 0) for x in inputs)
        group = q.shape[0] // k.shape[0]
        run, visible = jax.jit(_one_head), jnp.asarray(seen)
        heads = [run(q[n], k[n // group], v[n // group], d_out[n], visible) for n in range(q.shape[0])]
        out, dq, dk, dv = (np.stack(x) for x in zip(*heads, strict=True))
    dk, dv = (x.reshape(-1, group, *x.shape[1:]).sum(1) for x in (dk, dv))
    return [np.moveaxis(x, 0, 2) for x in (out, dq, dk, dv)]


def _one_head(q: Float[Array, "B T H"], k, v, d_out, seen):
    def attend(q, k, v):
        logits = jnp.einsum("bth,bsh->bts", q, k) * q.shape[-1] ** -0.5
        return jnp.einsum("bts,bsh->bth", jax.nn.softmax(jnp.where(seen, logits, -jnp.inf), -1), v)

    out, pull = jax.vjp(attend, q, k, v)
    return out, *pull(d_out)


def _error(found, exact: np.ndarray) -> float:
    return float(np.abs(np.asarray(found, np.float64) - exact).max() / np.abs(exact).max())
