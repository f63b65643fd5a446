"""What each scheme sends: counted in compiled programs, and what the formulas say."""

import json
import os
import subprocess
import sys

import pytest

from rlring import bench
from rlring.bench.candidates import Settings
from rlring.bench.traffic import MEGATRON, Shape, counted, formulas


def settings(heads: int = 8, kv_heads: int | None = None, **changes) -> Settings:
    shape = {"heads": heads, "kv_heads": kv_heads or heads, "head_size": 4, "batch": 2, "type": "float32"}
    return Settings(("ring",), (64,), (8,), **shape, repeats=1, matmul=1, **changes)


@pytest.mark.parametrize(
    ("scheme", "devices", "kv_heads"),
    [
        ("ring", 4, 2),
        ("ulysses", 8, 2),  # whose heads of keys are copied
        pytest.param("ring", 8, None, marks=pytest.mark.slow),
        ("all_gather", 4, 2),
        pytest.param("ulysses", 4, None, marks=pytest.mark.slow),
        pytest.param("hybrid", 2, None, marks=pytest.mark.slow),
        ("hybrid", 8, 2),
        (MEGATRON, 2, None),
        pytest.param(MEGATRON, 8, None, marks=pytest.mark.slow),
    ],
)
def test_counted_is_the_formula(scheme, devices, kv_heads):
    one = counted(scheme, 64, devices, settings(kv_heads=kv_heads))
    assert one.refused is None
    assert one.forward == pytest.approx(one.forward_formula, rel=1e-6)
    assert one.backward == pytest.approx(one.backward_formula, rel=1e-6)
    assert one.forward > 0


def test_the_papers_formulas():
    """4 N h / P of Ulysses and 4 N h of Megatron, and 2 N h of a ring: of many devices and a wide model."""
    tokens, width, devices, item = 2**20, 2**14, 128, 2
    here = Shape(tokens / devices, width, width, item)
    whole = tokens * width * item
    assert formulas("ulysses", here, 1, devices)[0] == pytest.approx(4 * whole / devices, rel=0.05)
    assert formulas(MEGATRON, here, 1, devices)[0] == pytest.approx(4 * whole, rel=0.01)
    assert formulas("ring", here, devices, 1)[0] == pytest.approx(2 * whole, rel=0.01)
    assert formulas("all_gather", here, devices, 1)[0] == pytest.approx(2 * whole, rel=0.01)
    both = formulas("hybrid", here, 16, 8)[0]
    assert both == pytest.approx(4 * whole / devices + 2 * whole / 8, rel=0.1)


def test_what_does_not_fit_is_said(capsys):
    argv = ["--traffic", "--schemes", "ulysses", "--heads", "4", "--lengths", "63", "--devices", "3", "7", "8"]
    assert bench.main(argv) == 0
    printed = capsys.readouterr().out
    assert "- ulysses, 63 tokens on 3 devices: attention scheme 'ulysses' splits the heads over" in printed
    assert f"- {MEGATRON}, 63 tokens on 7 devices: 4 heads do not divide by 7 devices." in printed
    assert "63 tokens on 8 devices: 63 tokens do not divide by 8 devices." in printed


def test_auto_is_refused(capsys):
    assert bench.main(["--traffic", "--schemes", "auto"]) == 2
    assert "error: --traffic counts what one scheme sends; got 'auto', which is any. Name" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command(tmp_path, capsys):
    out = tmp_path / "traffic.json"
    argv = [
        "--schemes",
        "ring",
        "all_gather",
        "ulysses",
        "hybrid",
        "--lengths",
        "64",
        "--heads",
        "8",
        "--head-size",
        "4",
    ]
    assert bench.main(["--traffic", *argv, "--devices", "2", "4", "8", "--json", str(out)]) == 0
    lines = [line for line in capsys.readouterr().out.split("Tokens a device")[0].splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:17]]
    assert [row[0] for row in rows[:5]] == ["ring", "all_gather", "ulysses", "hybrid", MEGATRON]
    assert {row[6] for row in rows} == {row[9] for row in rows} == {"1.000"}
    written = json.loads(out.read_text())
    assert len(written["traffic"]) == 15
    ring = written["traffic"][0]
    assert ring["forward_collectives"][0] == {
        "operation": "collective-permute",
        "operand": "u32[2112]",
        "parts": 1,
        "devices": 2,
        "times": 1,
        "bytes": 8448,
    }


@pytest.mark.slow
def test_a_thousand_devices():
    """Compiled in a process of its own, and not run."""
    argv = [
        "--schemes",
        "ring",
        "hybrid",
        "--lengths",
        "65536",
        "--heads",
        "8",
        "--head-size",
        "4",
        "--devices",
        "1024",
    ]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-m", "rlring.bench", "--traffic", *argv], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split("|") for line in done.stdout.splitlines() if line.startswith(("| ring |", "| hybrid |"))]
    assert [(row[3].strip(), row[7].strip(), row[10].strip()) for row in rows] == [("1024", "1.000", "1.000")] * 2
