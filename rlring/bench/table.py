"""The Markdown table of a benchmark, with the versions and the machine that its numbers hold for."""

from collections.abc import Iterable
from dataclasses import dataclass

from rlring.bench.candidates import Settings
from rlring.bench.timing import Measurement


@dataclass(frozen=True)
class Versions:
    """The command, date, package versions and machine of a benchmark."""

    command: str
    date: str
    rlring: str
    jax: str
    jaxlib: str
    torch: str | None
    python: str
    platform: str
    device_kind: str
    system: str
    cores: int


def table(measurements: Iterable[Measurement], settings: Settings, versions: Versions) -> str:
    """Returns the measurements as a Markdown table, followed by the settings, versions and machine."""
    measurements = list(measurements)
    beside_jax = any(m.forward.ratio_to_jax is not None for m in measurements)
    columns = ["scheme", "tokens", "devices", "mesh"]
    for name in ("forward", "forward+backward"):
        columns += [f"{name} ms (min)", "x blockwise", *["x jax.nn"] * beside_jax, "of peak", "temporary MiB"]
    lines = ["| " + " | ".join(columns) + " |", "| --- |" + " ---: |" * 2 + " --- |" + " ---: |" * (len(columns) - 4)]
    for m in measurements:
        axes = [f"{name} {size}" for name, size in (("ring", m.ring), ("ulysses", m.ulysses)) if size > 1]
        cells = [m.scheme, str(m.length), str(m.devices), " x ".join(axes) or "-"]
        for one in (m.forward, m.forward_backward):
            ratios = [one.ratio_to_blockwise, *[one.ratio_to_jax] * beside_jax]
            held = "-" if one.temporary_bytes is None else f"{one.temporary_bytes / 2**20:.1f}"
            cells += [f"{one.median_ms:.1f} ({one.min_ms:.1f})", *("-" if r is None else f"{r:.2f}" for r in ratios)]
            cells += [f"{one.share_of_peak:.0%}", held]
        lines.append("| " + " | ".join(cells) + " |")
    torch = f", torch {versions.torch}" if versions.torch else ""
    note = (
        f"`{versions.command}`: causal, batch {settings.batch}, {settings.heads} query heads over {settings.kv_heads} "
        f"key/value heads of size {settings.head_size}, {settings.type}, kernel {settings.kernel}; "
        f"median (min) of {settings.repeats} "
        f"interleaved rounds; peak: a product of {settings.matmul} x {settings.matmul} matrices on each device; "
        f"temporary memory of one device, from the compiler. {versions.device_kind} ({versions.platform}), "
        f"{versions.cores} cores, rlring {versions.rlring}, jax {versions.jax}, jaxlib {versions.jaxlib}{torch}, "
        f"{versions.date}."
    )
    return "\n".join([*lines, "", note])
