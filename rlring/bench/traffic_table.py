"""The Markdown table of counted traffic and formulas."""

from collections.abc import Sequence
from dataclasses import asdict

from rlring.bench.candidates import Settings
from rlring.bench.table import Versions
from rlring.bench.traffic import Traffic

CLOSE = 0.05  # count and formula agree up to this relative difference


def traffic_table(counted: Sequence[Traffic], settings: Settings, versions: Versions) -> str:
    """Returns the traffic as a Markdown table, followed by settings, versions and deviations from the formulas."""
    columns = ["scheme", "tokens", "devices", "mesh", *("forward MiB", "formula", "ratio")]
    columns += ["backward MiB", "formula", "ratio"]
    lines = ["| " + " | ".join(columns) + " |", "| --- | ---: | ---: | --- |" + " ---: |" * 6]
    off, refused = [], []
    for one in counted:
        name = f"{one.scheme}, {one.length} tokens on {one.devices} device{'s' * (one.devices > 1)}"
        if one.refused is not None:
            refused.append(f"- {name}: {one.refused}")
            continue
        axes = [f"{axis} {size}" for axis, size in (("ring", one.ring), ("ulysses", one.ulysses)) if size > 1]
        cells = [one.scheme, str(one.length), str(one.devices), " x ".join(axes) or "-"]
        for part, sent, formula in (
            ("forward", one.forward, one.forward_formula),
            ("backward", one.backward, one.backward_formula),
        ):
            ratio = sent / formula if formula else 1.0
            cells += [_mib(sent), _mib(formula), f"{ratio:.3f}"]
            if abs(ratio - 1) > CLOSE:
                off.append(f"- {name}, {part}: {ratio:.2f} of the formula")
        lines.append("| " + " | ".join(cells) + " |")
    note = (
        f"`{versions.command}`: MiB that one device sends in one layer, counted in the program that XLA compiled for "
        f"so many CPU devices; the formulas are in `rlring/bench/traffic.py`. Causal, batch {settings.batch}, "
        f"{settings.heads} query heads over {settings.kv_heads} key/value heads of size {settings.head_size}, "
        f"{settings.type}. rlring {versions.rlring}, jax {versions.jax}, jaxlib {versions.jaxlib}, {versions.date}."
    )
    in_full = " XLA for CPUs sends bfloat16 as float32 where it is not packed." if settings.type == "bfloat16" else ""
    more = [f"More than {CLOSE:.0%} off.{in_full}", "", *off] if off else []
    less = [*[""] * bool(more), "Not counted:", "", *refused] if refused else []
    return "\n".join([*lines, "", note, *[""] * bool(more or less), *more, *less])


def as_json(one: Traffic) -> dict:
    """Returns a Traffic as a JSON object."""
    names = ("forward_collectives", "backward_collectives")
    return asdict(one) | {name: [sent._asdict() for sent in getattr(one, name)] for name in names}


def _mib(size: float) -> str:
    mib = size / 2**20
    return f"{mib:,.0f}" if mib >= 1000 else f"{mib:.4g}"
