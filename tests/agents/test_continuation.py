"""Whose a folder is: what its checkpoints say counts, whatever became of its other files."""

import json
import os
from pathlib import Path

import pytest

from agents import sweep
from agents.checkpoint import Checkpoints
from agents.cli import ConfigError
from agents.config import SweepConfig, dump, load
from agents.evaluate import evaluate, main
from agents.results import append_results
from agents.train import train
from data.build import build

SWEEP = """
name = "tiny"
[shared]
train.updates = 12
[shared.data]
tasks = ["point_mass-dark"]
episodes = "nowhere"
stores = ["nowhere.h5"]
[runs.AT]
agent.kind = "agentic_transformer"
"""


@pytest.fixture
def swept(tmp_path, monkeypatch) -> SweepConfig:
    monkeypatch.chdir(tmp_path)
    Path("sweep.toml").write_text(SWEEP)
    return load(SweepConfig, "sweep.toml")


def test_without_its_config_a_run_goes_on_with_its_own_settings_alone(tiny, trained):
    folder = trained()
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"runs/tiny already holds checkpoints of a run, without its config.json"):
        train(tiny("seed=9"), progress=False)
    with pytest.raises(ConfigError, match=r"runs/tiny was trained with other settings: seed=9 \(was 0\)"):
        train(tiny("seed=9"), resume=True, progress=False)
    assert not (folder / "config.json").exists()
    train(tiny("train.updates=13"), resume=True, progress=False)
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.latest() == 13


def test_an_edited_config_changes_no_run(tiny, trained):
    folder = trained()
    other = tiny("optimizer.learning_rate=0.01", "train.updates=13")
    (folder / "config.json").write_text(dump(other))
    with pytest.raises(ConfigError, match=r"trained with other settings: optimizer.learning_rate=0.01 \(was "):
        train(other, resume=True, progress=False)


def test_a_sweep_and_a_run_never_share_a_folder(tiny, trained, swept):
    folder = trained()
    results = (folder / "results.jsonl").write_text("of the run")
    for gone in ("", "config.json"):
        if gone:
            (folder / gone).unlink()
        with pytest.raises(ConfigError, match=r"runs/tiny holds a run, whose results the sweep would write over"):
            sweep.sweep(swept, Path("sweep.toml"))
    assert len((folder / "results.jsonl").read_text()) == results

    Path("runs/other").mkdir()
    Path("runs/other/sweep.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"runs/other holds the results of a sweep. Choose another name"):
        train(tiny("name=other"), progress=False)


@pytest.mark.parametrize("damaged", ["", "{", "[]", "null", "{}", '{"stores": 1}', "\x00"])
def test_a_damaged_note_of_a_sweep_is_none(swept, damaged):
    folder = Path("runs/tiny")
    folder.mkdir(parents=True)
    for name in (sweep.DONE, sweep.SUMMARY, sweep.PLOT, sweep.REPORT, sweep.RESULTS):
        (folder / name).write_text(damaged)
    assert not sweep.is_done(folder, swept)
    (folder / sweep.DONE).write_text(json.dumps({"config": dump(swept), "stores": {}}))
    assert sweep.is_done(folder, swept)


def test_a_store_that_is_replaced_during_an_evaluation_is_refused(trained, dataset, tmp_path, monkeypatch):
    """Its results would be said to be of the store before."""
    used, other = tmp_path / "used.h5", tmp_path / "other.h5"
    used.write_bytes(dataset[1].read_bytes())
    build(dataset[0], "point_mass-dark", other, workers=1, limit_steps=120 * 16, progress=False)
    folder = trained()

    def replaced_after(path, results):
        append_results(path, results)
        if other.exists():
            os.replace(other, used)

    monkeypatch.setattr("agents.evaluate.append_results", replaced_after)
    with pytest.raises(ConfigError, match=r"learnt point_mass-dark from another store: .*; data.stores now means"):
        evaluate(folder, [f'data.stores=["{used}"]'], progress=False)
    assert len((folder / "results.jsonl").read_text().splitlines()) == 3  # of the first context


@pytest.mark.parametrize("override", ["name=other", "series=other"])
def test_results_of_a_run_have_one_name(trained, override, capsys):
    folder = trained()
    assert main([str(folder), override]) == 2
    assert f"{override} cannot be changed to evaluate runs/tiny" in capsys.readouterr().err
    assert not (folder / "results.jsonl").exists()
