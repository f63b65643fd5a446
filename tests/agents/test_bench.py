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


def test_acting(capsys, tmp_path):
    assert bench.main(["acting", "--rounds", "1", "--devices", "2", "--json", str(tmp_path / "acting.json")]) == 0
    rows = json.loads((tmp_path / "acting.json").read_text())["rows"]
    assert [(row["tokens"], row["devices"]) for row in rows] == [(64, 1), (128, 1), (64, 2), (128, 2)]
    # Keys and values of 3 layers of 128 numbers, and a little room.
    assert all(2 * 3 * 128 * 4 * row["tokens"] <= row["cache_mib"] * 2**20 for row in rows)
    assert rows[1]["cache_mib"] > rows[0]["cache_mib"]
