"""Times the attention schemes for the table of rlring.bench.

Candidates are measured in rounds. In every round each candidate of a length runs once, so that a slowdown of the
machine affects all of them. Ratios and shares are computed within a round, and their medians are reported. A matrix
product on the same number of devices is timed too; its speed is the peak for the shares. torch's attention is measured
if torch is installed. All candidates compute causal self-attention; on a ring the tokens are in zigzag order.
"""

import statistics
import time
from dataclasses import dataclass

from rlring.attention.checks import check_scheme
from rlring.attention.schemes import DETERMINISTIC
from rlring.bench.candidates import (
    ONE_DEVICE,
    Candidate,
    Run,
    Settings,
    hops_candidates,
    jax_candidates,
    matmul,
    matmul_flops,
    say,
    scheme_candidate,
    sparse_candidate,
    torch_candidates,
)
from rlring.errors import UsageError
from rlring.mesh import make_mesh

BACKWARD_FLOPS = 2.5  # relative to the forward: the backward has five matrix products, the forward two


@dataclass(frozen=True)
class Pass:
    """The timing of a forward pass, or of a forward and backward pass together."""

    median_ms: float
    min_ms: float
    ratio_to_blockwise: float | None  # of the times; None if blockwise was not measured
    share_of_peak: float
    temporary_bytes: int | None  # of one device, without arguments and results; None if unknown
    rounds_ms: tuple[float, ...]
    ratio_to_jax: float | None = None  # to jax.nn.dot_product_attention; None if it was not measured


@dataclass(frozen=True)
class Measurement:
    """The results of a scheme at a length. `devices` is the number used: 1 for dense, blockwise and torch."""

    scheme: str
    length: int
    devices: int
    ring: int
    ulysses: int
    peak_flops: float  # operations per second of the matrix product, summed over these devices
    forward: Pass
    forward_backward: Pass


def measure(settings: Settings) -> list[Measurement]:
    """Returns the measurements of all candidates, for each length of `settings`.

    Raises:
        UsageError: a scheme or a length does not fit the devices, or there are too few of them.
    """
    check_settings(settings)
    found = []
    for length in settings.lengths:
        found += _measure_length(length, settings)
    return found


def causal_flops(settings: Settings, length: int) -> float:
    """Returns the floating-point operations of a causal forward; forward and backward together have 3.5 times as many.

    Counted as in FlashAttention (2205.14135, 2307.08691): two matrix products in the forward, five in the backward,
    without the masked half.
    """
    pairs = length * (length + 1) / 2
    return 4.0 * settings.batch * settings.heads * settings.head_size * pairs


def _measure_length(length: int, settings: Settings) -> list[Measurement]:
    candidates = [
        scheme_candidate(scheme, length, devices, settings, deterministic=deterministic)
        for scheme in settings.schemes
        for deterministic in ((False, True) if settings.deterministic and scheme in DETERMINISTIC else (False,))
        for devices in ((1,) if scheme in ONE_DEVICE else settings.devices)
    ]
    candidates += [sparse_candidate(pattern, length, settings) for pattern in settings.sparse]
    candidates += (
        hops_candidates(length, settings) + jax_candidates(length, settings) + torch_candidates(length, settings)
    )
    matmuls = {devices: matmul(devices, settings) for devices in sorted({c.devices for c in candidates})}
    runs = {("matmul", n): run for n, run in matmuls.items()}
    for place, candidate in enumerate(candidates):
        runs |= {(place, "forward"): candidate.forward, (place, "both"): candidate.forward_backward}
    rounds = _Rounds(_in_turns(runs, f"{length} tokens", settings.repeats), candidates, length, settings)
    return [
        Measurement(
            c.scheme,
            length,
            c.devices,
            c.ring,
            c.ulysses,
            peak_flops=matmul_flops(c.devices, settings) / statistics.median(rounds.seconds["matmul", c.devices]),
            forward=rounds.summary(place, "forward", c.forward, 1.0),
            forward_backward=rounds.summary(place, "both", c.forward_backward, 1.0 + BACKWARD_FLOPS),
        )
        for place, c in enumerate(candidates)
    ]


def _in_turns(runs: dict[tuple, Run], what: str, rounds: int) -> dict[tuple, list[float]]:
    """Returns the seconds of every run, one number per round."""
    for run in runs.values():
        run.call()  # the first run is slower, and is not timed
    seconds: dict[tuple, list[float]] = {name: [] for name in runs}
    for number in range(rounds):
        say(f"{what}: round {number + 1} of {rounds}")
        for name, run in runs.items():
            start = time.perf_counter()
            run.call()
            seconds[name].append(time.perf_counter() - start)
    return seconds


@dataclass(frozen=True)
class _Rounds:
    """The times of every candidate of a length, by round."""

    seconds: dict[tuple, list[float]]  # keys: ("matmul", devices), (place, "forward") and (place, "both")
    candidates: list[Candidate]  # `place` is an index into this list
    length: int
    settings: Settings

    def peaks(self, candidate: Candidate) -> list[float]:
        """Returns the operations per second of the matrix product on the candidate's devices, by round."""
        flops = matmul_flops(candidate.devices, self.settings)
        return [flops / s for s in self.seconds["matmul", candidate.devices]]

    def summary(self, place: int, name: str, run: Run, times_forward: float) -> Pass:
        took, flops = self.seconds[place, name], times_forward * causal_flops(self.settings, self.length)
        shares = [flops / s / peak for s, peak in zip(took, self.peaks(self.candidates[place]), strict=True)]
        in_ms = tuple(1e3 * s for s in took)
        return Pass(
            statistics.median(in_ms),
            min(in_ms),
            self.ratio(took, "blockwise", name),
            statistics.median(shares),
            run.temporary_bytes,
            in_ms,
            self.ratio(took, "jax.nn", name),
        )

    def ratio(self, took: list[float], scheme: str, name: str) -> float | None:
        """Returns the median ratio of the times `took` to those of the first candidate of `scheme`; None if there is no
        such candidate."""
        other = next((place for place, c in enumerate(self.candidates) if c.scheme == scheme), None)
        if other is None:
            return None
        return statistics.median(s / o for s, o in zip(took, self.seconds[other, name], strict=True))


def check_settings(settings: Settings) -> None:
    """Raises UsageError when a scheme or a length does not fit the devices, or there are too few devices."""
    for length in settings.lengths if settings.hops else ():
        if length % (2 * settings.hops):
            raise UsageError(
                f"--lengths are multiples of 2 * --hops = {2 * settings.hops}; got {length}. "
                f"Use {-(-length // (2 * settings.hops)) * 2 * settings.hops}."
            )
    several = [scheme for scheme in settings.schemes if scheme not in ONE_DEVICE]
    for devices in settings.devices if several else ():
        make_mesh(ring=devices)
        if "ulysses" in several:
            check_scheme("ulysses", settings.heads, settings.kv_heads, 1, devices)
        for length in settings.lengths:
            if devices > 1 and length % (2 * devices):
                raise UsageError(
                    f"--lengths are multiples of 2 * --devices = {2 * devices}, so that all shards are equal; got "
                    f"{length}. Use {-(-length // (2 * devices)) * 2 * devices}."
                )
