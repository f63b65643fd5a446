"""From nothing to a plot through the command line, interrupted and continued."""

import csv
import shutil
from pathlib import Path

import pytest

from agents.results import read_results
from agents.sweep import main
from data.build import build

SWEEP = """
name = "small"
title = "a small sweep"
[shared.data]
tasks = ["point_mass-dark"]
episodes = "datasets/pm"
stores = ["stores/pm.h5"]
collect = { policy = "waypoints", episodes = 120, workers = 1 }
[shared.train]
updates = 20
batch = 4
[shared.model]
width = 16
layers = 1
heads = 2
[shared.evaluate]
contexts = [0, 2]
groups = 6
[runs.AT]
agent = { kind = "agentic_transformer" }
chain = { trajectories = 3, lengths = "mixed" }
mesh = { ring = 2 }
evaluate = { foreign = true }
[runs.DT]
agent = { kind = "decision_transformer", window = 4 }
[runs."BC-10%"]
agent = { kind = "bc", top_fraction = 0.5 }
"""


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("small.toml").write_text(SWEEP)
    return "small.toml"


def test_from_nothing_to_a_plot(sweep, capsys):
    assert main([sweep, "--dry-run"]) == 0
    assert (
        "train     small/AT-0: agentic_transformer, 20 updates of 4 chains of 3, 2 devices" in capsys.readouterr().out
    )
    assert not Path("runs").exists()

    assert main([sweep]) == 0
    run = Path("runs/small")
    assert (run / "return_vs_context.png").read_bytes().startswith(b"\x89PNG")
    assert "a small sweep" in (run / "report.html").read_text()
    rows = list(csv.DictReader((run / "summary.csv").read_text().splitlines()))
    wanted = "agent,task,mode,context_trajectories,context_tokens,statistic,iqm,ci_low,ci_high,seeds,episodes"
    assert list(rows[0])[:11] == wanted.split(",")
    agents = {row["agent"] for row in rows}
    assert agents == {"AT", "AT (foreign context)", "DT", "BC-10%", "oracle"}
    oracle = next(row for row in rows if row["agent"] == "oracle" and row["statistic"] == "mean")
    assert float(oracle["mean"]) > 5
    capsys.readouterr()

    assert main([sweep]) == 0
    assert "nothing to do: runs/small is complete" in capsys.readouterr().out

    # What is missing is made again, and nothing else.
    before = (run / "results.jsonl").read_bytes()
    shutil.rmtree(run / "DT-0")
    (run / "sweep.json").unlink()
    assert main([sweep]) == 0
    error = capsys.readouterr().err
    assert "train small/DT-0" in error
    assert "train small/AT-0" not in error
    assert (run / "results.jsonl").read_bytes() == before

    # Other goals are evaluated without training again.
    assert main([sweep, "shared.evaluate.seed=1"]) == 0
    assert "train small" not in capsys.readouterr().err
    rows = list(csv.DictReader((run / "summary.csv").read_text().splitlines()))
    assert {row["episodes"] for row in rows} == {"6"}  # those of seed 0 are not counted in


def test_mistakes_are_one_line(sweep, capsys):
    assert main([sweep, "runs.AT.model.widht=3"]) == 2
    assert capsys.readouterr().err == "error: runs.AT: unknown key 'model.widht'; did you mean 'width'?\n"
    assert main(["smal.toml"]) == 2
    assert "Did you mean small.toml?" in capsys.readouterr().err
    assert not Path("runs").exists()


ARMS = (
    SWEEP[: SWEEP.index("[runs.AT]")]
    + """
[runs."wide/bc"]
agent = { kind = "bc" }
model = { width = 32 }
[runs."narrow/bc"]
agent = { kind = "bc" }
"""
)


def test_a_sweep_reports_what_it_asks_for_of_every_arm_and_of_no_other_store(sweep, capsys):
    Path(sweep).write_text(ARMS)
    assert main([sweep, "shared.evaluate.contexts=[0]"]) == 0
    summary, store = Path("runs/small/summary.csv"), Path("stores/pm.h5").read_bytes()
    assert {line.split(",")[0] for line in summary.read_text().splitlines()[1:]} == {"wide/bc", "narrow/bc", "oracle"}
    # Other settings of evaluation, on another mesh and with other logging: nothing is trained, no number is of before.
    other = [
        "shared.evaluate.contexts=[0]",
        "shared.evaluate.sample=false",
        "shared.train.log_every=3",
        "shared.mesh.data=2",
    ]
    capsys.readouterr()
    assert main([sweep, *other]) == 0
    error = capsys.readouterr().err
    assert "train small" not in error
    results = [result for result in read_results(Path("runs/small")) if result.agent != "oracle"]
    assert [result.settings["evaluate.sample"] for result in results] == [False] * 12
    assert {(result.run, result.series) for result in results} == {
        ("small/wide/bc-0", "small"),
        ("small/narrow/bc-0", "small"),
    }
    # More episodes are another store, and the one that the runs learnt from stays as it is.
    assert main([sweep, *other, "shared.data.collect.episodes=140"]) == 2
    assert "was trained with other settings: data.collect.episodes=140 (was 120)" in capsys.readouterr().err
    assert Path("stores/pm.h5").read_bytes() == store
    build(Path("datasets/pm"), "point_mass-dark", Path("stores/pm.h5"), workers=1, limit_steps=60 * 16, progress=False)
    assert main([sweep, *other]) == 2  # though it was finished
    assert "bc-0 learnt point_mass-dark from another store" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("shared.seed=7", "error: small.toml: shared.seed would be that of every run; a sweep has seeds=[...] for it."),
        ("runs.DT.name=x", "error: small.toml: runs.DT.name would be that of every run; a sweep has name for it."),
        ("seeds=[1, 1]", "error: small.toml: seeds=[1, 1] names one twice; it would be trained once and count twice."),
        (
            'runs.oracle.agent.kind="bc"',
            "error: small.toml: runs.oracle: the plot draws its ceiling under this name; choose another.",
        ),
    ],
)
def test_a_sweep_that_would_mix_its_runs_is_refused(sweep, capsys, override, message):
    assert main([sweep, override]) == 2
    assert capsys.readouterr().err == message + "\n"
