"""A sweep of which one run fails: the others go on, and the same command ends it once the reason is mended."""

from pathlib import Path

import pytest

from agents.processes import training_lock
from agents.sweep import main
from data.build import build
from data.collect import collect

SWEEP = """
name = "small"
[shared.data]
tasks = ["point_mass-dark"]
episodes = "datasets/pm"
stores = ["stores/pm.h5"]
[shared.train]
updates = 4
batch = 4
[shared.evaluate]
contexts = [0]
groups = 3
[shared.optimizer]
warmup = 0
[shared.model]
width = 8
layers = 1
[runs.wild]
agent = { kind = "bc" }
optimizer = { learning_rate = 1e30 }
[runs.tame]
agent = { kind = "bc" }
"""


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """Published data: a store, and no word of how its episodes were made."""
    monkeypatch.chdir(tmp_path)
    collect("point_mass-dark", "waypoints", 40, 0, Path("datasets/pm"), progress=False)
    build(Path("datasets/pm"), "point_mass-dark", Path("stores/pm.h5"), workers=1, progress=False)
    Path("small.toml").write_text(SWEEP)
    return "small.toml"


def test_a_run_that_diverges_stops_no_other(sweep, capsys):
    assert main([sweep]) == 2
    printed = capsys.readouterr()
    *_, why, last = printed.err.splitlines()
    assert why.startswith(
        "failed: small/wild-0: weights/global_norm is not a number after update 1 of runs/small/wild-0"
    )
    assert last.startswith(
        "error: 1 of 2 runs failed, for the reasons above. Mend them, and run the same command again"
    )
    assert "Traceback" not in printed.err
    assert "\ntame  " in printed.out
    assert "(without small/wild-0: failed)" in Path("runs/small/report.html").read_text()
    assert not Path("runs/small/sweep.json").exists()

    assert main([sweep]) == 2  # tried again, and nothing else is
    error = capsys.readouterr().err
    assert "train small/wild-0" in error
    assert "train small/tame-0" not in error

    Path(sweep).write_text(SWEEP.replace("1e30", "1e-3"))
    assert main([sweep]) == 0
    printed = capsys.readouterr()
    assert "runs/small/wild-0 had diverged; it is kept as runs/small/wild-0.diverged-1" in printed.err
    assert "wild" in printed.out
    assert "failed" not in Path("runs/small/report.html").read_text()
    assert main([sweep]) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_where_all_fail_nothing_is_drawn(sweep, capsys):
    Path("stores/pm.h5").unlink()
    assert main([sweep]) == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-2].startswith("failed: small/tame-0: no store at stores/pm.h5. Make it with: python -m")
    assert "error: 2 of 2 runs failed" in error
    assert not Path("runs").exists()


def test_what_cannot_be_evaluated_is_not_trained(sweep, capsys):
    Path(sweep).write_text(
        SWEEP + '[runs.long]\nagent = { kind = "agentic_transformer" }\nevaluate = { contexts = [40] }\n'
    )
    assert main([sweep, "runs.wild.optimizer.learning_rate=1e-3"]) == 2
    error = capsys.readouterr().err
    assert "failed: small/long-0: evaluate.contexts asks for 40 trajectories, and stores/pm.h5 holds out" in error
    assert "train small/long-0" not in error
    assert "train small/tame-0" in error


def test_a_dry_run_announces_what_the_sweep_would_refuse(sweep, capsys):
    Path("runs/small/wild-0").mkdir(parents=True)
    refused = {
        "runs/small holds a run, whose results": Path("runs/small/config.json"),
        "runs/small/wild-0 is a run of agents.recall": Path("runs/small/wild-0/config.json"),
    }
    for file in refused.values():
        file.write_text('{"name": "small", "lines": 8}')
    for told, file in refused.items():
        for more in (["--dry-run"], []):
            assert main([sweep, *more]) == 2
            assert f"error: {told}" in capsys.readouterr().err
        file.unlink()
    assert main([sweep, "--dry-run"]) == 0


def test_a_second_sweep_of_one_name_answers_in_one_line(sweep, capsys):
    with training_lock(Path("runs/small")):
        assert main([sweep]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: another process trains runs/small right now; wait for it")
    assert error.count("\n") == 1
    assert not Path("runs").exists()
