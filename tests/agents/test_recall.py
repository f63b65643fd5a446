"""The recall task: questions that the text answers, and runs that go on where they were stopped."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from agents import recall
from agents.config import load
from agents.processes import training_lock
from agents.recall import RecallConfig, main
from agents.recall_texts import TOKENS, texts
from rlring.language_model import NO_TARGET

CONFIG = Path(__file__).parents[2] / "configs" / "recall.toml"
TINY = """
name = "tiny"
lines = 8
[model]
width = 16
layers = 2
heads = 2
[optimizer]
warmup = 2
[train]
updates = 6
batch = 4
log_every = 1
checkpoint_every = 2
"""


SMALL = """
name = "r"
lines = 1
[model]
width = 8
layers = 1
heads = 1
[train]
updates = 2
batch = 64
checkpoint_every = 1
"""


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(recall, "TESTED", 8)
    (tmp_path / "tiny.toml").write_text(TINY)
    return tmp_path / "tiny.toml"


def losses(folder) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_every_question_is_answered_by_an_earlier_line(path):
    made = texts(0, 3, 5, 8)
    assert made.bytes.shape == (5, 8 * TOKENS + 1)
    for text, answers in zip(made.bytes, made.answers, strict=True):
        lines = bytes(text.astype(np.uint8)).decode("latin-1").split("\n")[:16]
        said, asked = {}, []
        for line, question in zip(lines[0::2], lines[1::2], strict=True):
            key, value = re.fullmatch(r"([\x80-\xff]{2})([a-z0-9])", line).groups()
            assert key not in said
            said[key] = value
            key, answer = re.fullmatch(r"\?([\x80-\xff]{2})([a-z0-9])", question).groups()
            assert said[key] == answer
            asked.append(answer)
        assert len(said) == 8
        assert "".join(map(chr, answers[answers != NO_TARGET])) == "".join(asked)
        np.testing.assert_array_equal(answers[answers != NO_TARGET], text[1:][answers != NO_TARGET])
    assert len({answers.tobytes() for answers in made.answers}) == 5
    np.testing.assert_array_equal(texts(0, 3, 5, 8).bytes, made.bytes)
    assert (texts(0, 4, 5, 8).bytes != made.bytes).any()


def test_texts_grow_at_equal_bytes_an_update(path):
    config = load(RecallConfig, path, ["grow=[2,4]", "grow_until=0.5", "train.updates=8"])
    assert [config.texts(update).bytes.shape for update in (0, 1, 2, 3, 4, 7)] == [
        *[(16, 2 * TOKENS + 1)] * 2,
        *[(8, 4 * TOKENS + 1)] * 2,
        *[(4, 8 * TOKENS + 1)] * 2,
    ]


@pytest.mark.slow
def test_longer_texts_are_tested_after_the_training_as_well(path, capsys):
    assert main([str(path)]) == 0
    assert main([str(path), "evaluate.lines=[4,8,300]"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert re.match(
        r"  300 lines \(2,700 bytes\): \d.*% of 300 questions answered right, .*% in the second half", out[-1]
    )
    assert re.match(r"  4 lines \(36 bytes\)", out[-3])
    written = json.loads(Path("runs/tiny/accuracy.json").read_text())
    assert [(one["lines"], one["bytes"]) for one in written] == [(4, 36), (8, 72), (300, 2700)]


@pytest.mark.slow
def test_the_mesh_changes_no_loss_and_a_run_goes_on(path, tmp_path, capsys):
    assert main([str(path)]) == 0
    whole = losses(tmp_path / "runs" / "tiny")
    assert len(whole) == 6
    assert re.fullmatch(r"runs/tiny: 6 updates; by chance 2.8%\n  8 lines \(72 bytes\): .*\n", capsys.readouterr().out)
    assert main([str(path), "name=ring", "mesh.ring=4", "attention.block_q=8"]) == 0
    np.testing.assert_allclose(losses(tmp_path / "runs" / "ring"), whole, rtol=1e-5)
    # As if it had been killed after the checkpoint of update 4.
    shutil.rmtree(tmp_path / "runs" / "tiny" / "checkpoints" / "6")
    assert main([str(path)]) == 0
    assert losses(tmp_path / "runs" / "tiny") == whole


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lines=20000", "lines=20000: there are 16,384 keys"),
        ("evaluate.lines=[20000]", "evaluate.lines=20000: there are 16,384 keys"),
        ("grow=[3]", "texts of 8 lines grow through divisors of that"),
        ("mesh.ring=5", "lines=8 are 72 bytes, which mesh.ring * mesh.ulysses=5 devices cannot share"),
        ("train.batch=3 mesh.data=2", "train.batch=3 does not divide over mesh.data=2"),
    ],
)
def test_errors_are_one_line(path, capsys, override, message):
    assert main([str(path), *override.split()]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert "Traceback" not in printed


def test_another_config_does_not_touch_the_run(path, capsys):
    assert main([str(path)]) == 0
    assert main([str(path), "model.width=32"]) == 2
    assert "runs/tiny holds a run with other settings: model.width=32 (was " in capsys.readouterr().err
    assert main([str(path), "train.log_every=1", "train.updates=1"]) == 2
    assert "updates already, more than train.updates=1" in capsys.readouterr().err


def test_checkpoints_without_their_config_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("r.toml").write_text(SMALL)
    Path("runs/r/checkpoints/2").mkdir(parents=True)
    assert main(["r.toml", "seed=9"]) == 2
    assert "runs/r has checkpoints, but no config.json" in capsys.readouterr().err
    assert not Path("runs/r/config.json").exists()


def test_a_run_whose_files_changed_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("r.toml").write_text(SMALL)
    with training_lock(Path("runs/r")):
        assert main(["r.toml"]) == 2
    assert "error: another process trains runs/r right now; wait for it" in capsys.readouterr().err
    assert main(["r.toml"]) == 0
    more, run = ["r.toml", "train.updates=3"], Path("runs/r")

    def answer(*arguments: str) -> str:
        assert main([*more, *arguments]) == 2
        return capsys.readouterr().err.splitlines()[-1]

    written = (run / "config.json").read_text()
    edited = json.loads(written)
    edited["optimizer"]["learning_rate"] = 0.5
    (run / "config.json").write_text(json.dumps(edited))
    assert re.match(
        r"error: runs/r/config.json does not say what .*: optimizer.learning_rate=0.5 \(was 0.001\). Put that back",
        answer("optimizer.learning_rate=0.5"),
    )
    (run / "config.json").write_text('{"name": "r", "agent": {"kind": "bc"}}')
    assert (
        answer() == "error: runs/r is a run of agents.train, not of agents.recall. Choose another run, or another name."
    )
    (run / "config.json").write_text(written)
    newest = run / "checkpoints/2"
    file = max(newest.glob("*/ocdbt.process_0/d/*"), key=lambda path: path.stat().st_size)
    whole, stop = file.read_bytes(), 2 * file.stat().st_size // 3
    start = stop // 2  # not a single byte: one that decompression does not read changes nothing
    file.write_bytes(whole[:start] + bytes(byte ^ 0x55 for byte in whole[start:stop]) + whole[stop:])
    assert re.match(r"error: .*/runs/r/checkpoints(/2)? is damaged \(.*\). Delete", answer())
    shutil.rmtree(newest)
    newest.mkdir()
    assert re.match(r"error: the checkpoint .*/runs/r/checkpoints/2 is damaged \(its .*\). Delete the folder", answer())
    (newest / "state").mkdir()
    assert re.match(r"error: .*/runs/r/checkpoints/2 is a checkpoint of agents.train, not of agents.recall", answer())
    shutil.rmtree(newest)  # as advised
    assert main(more) == 0


@pytest.mark.slow
@pytest.mark.timeout(3600)  # twenty minutes on a core of its own
def test_it_learns(path):
    """On texts eight times as long as any that it learnt from as well. A process of its own computes as a user's does:
    what tests ask of the compiler makes this one take twice as long."""
    command = [sys.executable, "-m", "agents.recall", str(CONFIG), "mesh.ring=1", "evaluate.lines=[224,1820]"]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment["PYTHONPATH"] = str(CONFIG.parents[1])
    subprocess.run(command, check=True, capture_output=True, env=environment)
    tested = json.loads(Path("runs/recall/accuracy.json").read_text())
    assert [one["lines"] for one in tested] == [224, 1820]
    assert all(one["right"] > 0.99 for one in tested)


@pytest.mark.slow
def test_what_is_advised_after_a_run_diverged_works(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = "[model]\nwidth = 8\nlayers = 1\nheads = 1\n[optimizer]\nwarmup = 0\n[train]\nupdates = 4\nbatch = 64\n"
    Path("r.toml").write_text(f'name = "r"\nlines = 1\n{small}checkpoint_every = 1\n')
    assert main(["r.toml", "optimizer.learning_rate=1e30"]) == 2
    assert "is not a number after update 1 of runs/r. Lower optimizer.learning_rate" in capsys.readouterr().err
    assert main(["r.toml"]) == 0
    assert "runs/r had diverged; it is kept as runs/r.diverged-1" in capsys.readouterr().err
