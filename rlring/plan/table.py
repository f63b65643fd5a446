"""The Markdown table of plans."""

from collections.abc import Sequence

from rlring.plan.compiled import GIB, Plan


def table(plans: Sequence[Plan]) -> str:
    """Returns the plans as a Markdown table; memory, operations and traffic are per device and step."""
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
