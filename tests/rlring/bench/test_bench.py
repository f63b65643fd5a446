"""The bench command: what it prints and writes, and its errors. No time is compared."""

import contextlib
import json
import os
import re
import subprocess
import sys
from functools import partial
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest

from rlring import bench
from rlring.bench import candidates, timing
from rlring.errors import UsageError

TINY = ["--head-size", "4", "--repeats", "2", "--matmul", "8", "--lengths"]


@pytest.fixture(autouse=True)
def no_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)


def rows_of(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]


def test_table_and_json(tmp_path, capsys):
    out = tmp_path / "bench.json"
    argv = [*TINY, "32", "--heads", "8", "--kv-heads", "4", "--devices", "4", "--json", str(out)]
    assert bench.main(["--schemes", *candidates.EXACT, *argv]) == 0
    printed = capsys.readouterr()
    columns, rule, *rows = rows_of(printed.out)
    assert columns[:4] == ["scheme", "tokens", "devices", "mesh"]
    assert columns[4:] == [
        *("forward ms (min)", "x blockwise", "of peak", "temporary MiB"),
        *("forward+backward ms (min)", "x blockwise", "of peak", "temporary MiB"),
    ]
    assert {len(row) for row in (rule, *rows)} == {12}
    assert [row[:4] for row in rows] == [
        ["auto", "32", "4", "ring 4"],
        ["dense", "32", "1", "-"],
        ["blockwise", "32", "1", "-"],
        ["ring", "32", "4", "ring 4"],
        ["all_gather", "32", "4", "ring 4"],
        ["ulysses", "32", "4", "ulysses 4"],
        ["hybrid", "32", "4", "ring 2 x ulysses 2"],
    ]
    assert "8 query heads over 4 key/value heads of size 4, float32" in printed.out
    assert "32 tokens: round 2 of 2" in printed.err

    written = json.loads(out.read_text())
    assert list(written) == ["versions", "settings", "measurements"]
    assert set(written["versions"]) == {
        *("command", "date", "rlring", "jax", "jaxlib", "torch", "python", "platform", "device_kind", "system"),
        "cores",
    }
    assert written["versions"]["command"].startswith("python -m rlring.bench --schemes auto dense")
    assert written["versions"]["platform"] == "cpu"
    assert written["settings"]["devices"] == [4]
    assert written["settings"]["matmul"] == 8
    assert len(written["measurements"]) == len(rows)
    for m in written["measurements"]:
        assert set(m) == {
            *("scheme", "length", "devices", "ring", "ulysses", "peak_flops", "forward", "forward_backward"),
        }
        assert m["ring"] * m["ulysses"] == m["devices"]
        for name in ("forward", "forward_backward"):
            one = m[name]
            assert set(one) == {
                *("median_ms", "min_ms", "ratio_to_blockwise", "share_of_peak", "temporary_bytes", "rounds_ms"),
                "ratio_to_jax",
            }
            assert len(one["rounds_ms"]) == 2
            assert 0 < one["min_ms"] == min(one["rounds_ms"]) <= one["median_ms"]
            assert one["temporary_bytes"] >= 0
            assert one["share_of_peak"] > 0
            assert (one["ratio_to_blockwise"] == 1) == (m["scheme"] == "blockwise")
    assert os.listdir(tmp_path) == ["bench.json"]


@pytest.mark.parametrize(
    "patterns",
    [pytest.param({"4,2,2": "70.8", "4,8,1": "100.0"}, marks=pytest.mark.slow)],
    ids=len,
)
def test_hops_and_patterns(capsys, patterns):
    more = ["--hops", "4", "--sparse", *patterns, "--blocks", "8", "8", "--kernel", "auto"]
    assert bench.main(["--schemes", "blockwise", *TINY, "32", *more]) == 0
    rows = rows_of(capsys.readouterr().out)[2:]
    names = [row[0] for row in rows]
    assert names == ["blockwise", *(f"sparse, {kept}% kept" for kept in patterns.values()), "hops of a ring of 4"]


@pytest.mark.slow
def test_lengths_and_devices_and_no_blockwise(capsys):
    assert bench.main(["--schemes", "ring", *TINY, "16", "32", "--devices", "1", "2", "--type", "bfloat16"]) == 0
    rows = rows_of(capsys.readouterr().out)[2:]
    assert [row[1:4] for row in rows] == [
        ["16", "1", "-"],
        ["16", "2", "ring 2"],
        ["32", "1", "-"],
        ["32", "2", "ring 2"],
    ]
    assert {row[n] for row in rows for n in (5, 9)} == {"-"}  # no ratio to what was not measured


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--schemes", "rings"], r"argument --schemes: invalid choice: 'rings' \(choose from"),
        (["--heads", "0"], r"argument --heads: '0' is not a whole number of at least 1"),
        (["--repeats", "few"], r"argument --repeats: 'few' is not a whole number of at least 1"),
        (["--type", "float64"], r"argument --type: invalid choice: 'float64'"),
        (["--tokens", "8"], r"unrecognized arguments: --tokens 8"),
        (["--lengths", "100"], r"--lengths are multiples of 2 \* --devices = 16, .*; got 100. Use 112\."),
        (
            ["--schemes", "ulysses"],
            r"attention scheme 'ulysses' splits the heads over mesh.ulysses=8 devices; got 4 query heads",
        ),
        (["--sparse", "64,16"], r"argument --sparse: '64,16' is not BLOCK,LOCAL,STRIDE, such as 64,16,8"),
        (["--lengths", "64", "--hops", "3"], r"--lengths are multiples of 2 \* --hops = 6; got 64. Use 66"),
        (["--kernel", "splsh"], r"argument --kernel: invalid choice: 'splsh'"),
        (["--heads", "4", "--kv-heads", "3"], r"--heads is a multiple of --kv-heads; got 4 and 3\. Leave"),
        (["--traffic", "--kv-heads", "8"], r"--heads is a multiple of --kv-heads; got 4 and 8\. Leave"),
        (["--json", "nowhere/bench.json"], r"--json nowhere/bench.json: there is no folder nowhere\. Make it first"),
        (["--devices", "16"], r"16 virtual CPU devices were asked for after JAX had started with 8"),
    ],
)
def test_errors_are_one_line(argv, message, capsys):
    try:
        status = bench.main(argv)
    except SystemExit as stopped:  # argparse
        status = stopped.code
    printed = capsys.readouterr()
    assert status == 2
    assert not printed.out
    assert re.fullmatch(rf"error: {message}.*\n", printed.err)


def test_measure_checks_before_it_compiles():
    settings = candidates.Settings(("ring",), (32,), (16,), 4, 4, 4, 1, "float32", 1, 8)
    with pytest.raises(UsageError, match="needs 16 devices; this process sees 8"):
        timing.measure(settings)


def test_virtual_devices_in_a_fresh_process():
    command = [sys.executable, "-m", "rlring.bench", "--schemes", "ring", *TINY, "12", "--devices", "3"]
    ran = subprocess.run(
        command, env={**os.environ, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, check=True
    )
    assert ["ring", "12", "3", "ring 3"] in [row[:4] for row in rows_of(ran.stdout)]


def test_rounds_ratios_and_shares(monkeypatch):
    """With a clock that only the runs move: the turns of a round, and what is made of their times."""
    clock, turns = SimpleNamespace(now=0.0), []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock.now)

    def call(name, left):
        turns.append(name)
        clock.now += left.pop(0)

    def run(name, *seconds):
        return candidates.Run(partial(call, name, [99.0, *seconds]), 7)  # the first call is the warm-up

    made = {
        "blockwise": candidates.Candidate("blockwise", 1, 1, 1, run("b", 1, 4, 2), run("B", 5, 5, 5)),
        "ring": candidates.Candidate("ring", 2, 2, 1, run("r", 3, 4, 4), run("R", 10, 20, 5)),
    }
    matmuls = {1: run("m", 1, 1, 1), 2: run("M", 2, 1, 4)}
    monkeypatch.setattr(timing, "scheme_candidate", lambda scheme, *_, **__: made[scheme])
    monkeypatch.setattr(timing, "matmul", lambda devices, _: matmuls[devices])
    settings = candidates.Settings(("blockwise", "ring"), (4,), (2,), 3, 3, 5, 1, "float32", 3, 10)
    blockwise, ring = timing.measure(settings)
    assert "".join(turns) == 4 * "mMbBrR"
    assert blockwise.forward == timing.Pass(2000, 1000, 1.0, blockwise.forward.share_of_peak, 7, (1000, 4000, 2000))
    assert (ring.forward.median_ms, ring.forward.min_ms) == (4000, 3000)
    assert ring.forward.ratio_to_blockwise == 2  # of 3, 1 and 2
    assert ring.forward_backward.ratio_to_blockwise == 2  # of 2, 4 and 1
    assert ring.peak_flops == 2 * 2000 / 2  # two products of 2,000 operations; the median round took 2 s
    flops = 4 * 3 * 5 * 10  # 10 pairs of a query and a key not after it
    assert timing.causal_flops(settings, 4) == flops
    # The work over what the matrices of the same round would have done in that time: 2/3, 1/4 and 4/4 of it.
    assert ring.forward.share_of_peak == pytest.approx(flops / 4000 * 2 / 3)
    assert ring.forward_backward.share_of_peak == pytest.approx(3.5 * flops / 4000 * 2 / 10)


def test_torch_runs_beside(monkeypatch, capsys):
    """A stand-in for torch: which layout and which flags it is called with."""
    calls = []

    class Tensor:
        def __init__(self, shape):
            self.shape = shape

        def requires_grad_(self):
            return self

    def attend(q, k, v, **flags):
        calls.append((q.shape, k.shape, v.shape, flags))
        return Tensor(q.shape)

    torch = ModuleType("torch")
    torch.__spec__ = ModuleSpec("torch", None)
    torch.__dict__.update(
        float32="float32",
        randn=lambda *shape, device, dtype: Tensor((*shape, device, dtype)),
        no_grad=contextlib.nullcontext,
        nn=SimpleNamespace(functional=SimpleNamespace(scaled_dot_product_attention=attend)),
        autograd=SimpleNamespace(grad=lambda out, inputs, d_out: calls.append((out.shape, d_out.shape))),
    )
    monkeypatch.setitem(sys.modules, "torch", torch)
    assert bench.main(["--schemes", "blockwise", *TINY, "32", "--heads", "4", "--kv-heads", "2"]) == 0
    assert [row[:4] for row in rows_of(capsys.readouterr().out)[2:]] == [
        ["blockwise", "32", "1", "-"],
        ["torch", "32", "1", "-"],
    ]
    q, k = (1, 4, 32, 4, "cpu", "float32"), (1, 2, 32, 4, "cpu", "float32")
    forward = (q, k, k, {"is_causal": True, "enable_gqa": True})
    assert calls == 3 * [forward, forward, (q, q)]  # a warm-up and two rounds of forward, forward and backward
