"""What agents.bench prints and writes. No time is compared."""

import importlib.util
import json

import pytest

from agents import bench


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(bench, "SHAPES", ((4, 2),))
    monkeypatch.setattr(bench, "HISTORIES", (64, 128))
    monkeypatch.setattr(bench, "TRIED_SECONDS", 0.0)
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else found(name))


@pytest.mark.slow
def test_learning(capsys, tmp_path):
    assert bench.main(["learning", "--rounds", "2", "--json", str(tmp_path / "learning.json")]) == 0
    printed = capsys.readouterr()
    assert "torch or transformers is not installed: left out" in printed.err
    rows = json.loads((tmp_path / "learning.json").read_text())["rows"]
    assert [(row["name"], row["window"], row["batch"], row["ratio"]) for row in rows] == [
        ("rlring, fused", 4, 2, None),
        ("rlring, rsar", 4, 2, None),
    ]
    assert all(0 < row["slowest"] <= row["steps_per_second"] <= row["fastest"] for row in rows)
    assert "| rlring, fused | 4 | 2 | " in printed.out


@pytest.mark.slow
def test_acting(capsys, tmp_path):
    assert bench.main(["acting", "--rounds", "1", "--devices", "2", "--json", str(tmp_path / "acting.json")]) == 0
    rows = json.loads((tmp_path / "acting.json").read_text())["rows"]
    assert [(row["tokens"], row["devices"]) for row in rows] == [(64, 1), (128, 1), (64, 2), (128, 2)]
    # Keys and values of 3 layers of 128 numbers, and a little room.
    assert all(2 * 3 * 128 * 4 * row["tokens"] <= row["cache_mib"] * 2**20 for row in rows)
    assert rows[1]["cache_mib"] > rows[0]["cache_mib"]


@pytest.mark.slow
def test_reading(trained, capsys, tmp_path):
    """A ring acts as one device does, after a history that is longer than the chains of training."""
    run, file = trained(), tmp_path / "reading.json"
    assert bench.main(["reading", str(run), "--tokens", "200", "--devices", "4", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert [(row["tokens"], row["devices"]) for row in rows] == [(192, 1), (192, 4)]
    assert rows[0]["difference"] == 0
    assert 0 < rows[1]["difference"] < 1e-4
    assert all(row["read_seconds"] > 0 and 0 < row["of_peak"] < 1.5 for row in rows)
    assert "| 192 | 4 | " in capsys.readouterr().out
    assert bench.main(["reading", str(run), "--tokens", "8"]) == 2
    assert "a history has at least one episode, 16 tokens of" in capsys.readouterr().err
    run.rename(run.with_name("before"))
    assert bench.main(["reading", str(trained("agent.kind=decision_transformer", "chain.trajectories=1"))]) == 2
    assert "reads no history by attention; give one of agentic_transformer" in capsys.readouterr().err
