"""Checkpoints that something happened to."""

import json
import re
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agents import evaluate
from agents import train as training
from agents.agent import Scales
from agents.checkpoint import Checkpoints, Meta, versions
from agents.cli import ConfigError
from rlring import make_mesh

STATE = {
    "weights": jnp.asarray(np.random.default_rng(0).normal(size=(64, 32)), jnp.float32),
    "half": jnp.arange(7, dtype=jnp.bfloat16),
    "count": jnp.int32(5),
    "flag": jnp.array([True, False]),
}
META = Meta(Scales(np.zeros(3, np.float32), np.ones(3, np.float32), 1.0), {"t": 1.0}, 2, 16, versions())
PLACE = jax.sharding.SingleDeviceSharding(jax.devices()[0])


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A run of two checkpoints, 5 and 12."""
    run = tmp_path_factory.mktemp("saved") / "run"
    with Checkpoints(run) as checkpoints:
        for step in (5, 12):
            checkpoints.save(step, STATE, META, 1.0)
    return run


@pytest.fixture
def run(saved, tmp_path) -> Path:
    return shutil.copytree(saved, tmp_path / "run")


def read(run: Path) -> dict:
    with Checkpoints(run) as checkpoints:
        step = checkpoints.latest()
        assert checkpoints.meta(step).action_size == 2
        return checkpoints.restore(STATE, PLACE, step=step)


def answer(run: Path) -> str | None:
    """What is told of a damaged checkpoint; None where what was damaged is not needed to read the same numbers."""
    try:
        state = read(run)
    except ConfigError as error:
        return str(error)
    jax.tree.map(np.testing.assert_array_equal, state, STATE)
    return None


def data_of(checkpoint: Path) -> Path:
    """The file that holds the arrays."""
    return max(checkpoint.glob("*/ocdbt.process_0/d/*"), key=lambda path: path.stat().st_size)


def damages(whole: bytes, random: np.random.Generator):
    """Yields contents of a file that something happened to."""
    yield b""
    yield whole[: len(whole) // 2]
    yield bytes(len(whole))
    for place in random.integers(0, len(whole), 2):
        yield whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :]


@pytest.mark.slow
def test_any_damage_is_found_and_named(run):
    newest, random = run / "checkpoints/12", np.random.default_rng(0)
    files = [path for path in newest.rglob("*") if path.is_file() and path.name != "commit_success.txt"]
    assert data_of(newest) in files
    found = 0
    for file in files:
        whole = file.read_bytes()
        for damaged in damages(whole, random):
            file.write_bytes(damaged)
            if (told := answer(run)) is not None:
                assert re.match(f"the checkpoint {newest} is damaged|one of the checkpoints in .* is", told), told
                assert re.search(r"\(.+\). Delete the folder of that one to use the one before it", told), told
                found += 1
        file.write_bytes(whole)
    assert found > 20
    shutil.rmtree(newest)  # as advised
    jax.tree.map(np.testing.assert_array_equal, read(run), STATE)


@pytest.mark.parametrize("part", ["", "state", "meta", "state/_METADATA", "state/manifest.ocdbt"])
def test_what_is_lost_is_named(run, part):
    lost = run / "checkpoints/12" / part
    if lost.is_dir():
        shutil.rmtree(lost)
    else:
        lost.unlink()
    (run / "checkpoints/12").mkdir(exist_ok=True)
    with pytest.raises(ConfigError, match=r"the checkpoint .*/checkpoints/12 is damaged \(.*Delete the folder"):
        read(run)


@pytest.mark.parametrize("digit", ["action_size", "observation_std"])
def test_a_digit_that_changed_is_found(run, digit):
    file = run / "checkpoints/12/meta/metadata"
    values = json.loads(file.read_text())
    (values["scales"] if digit in values["scales"] else values)[digit] = [1.0, 1.0, 3.0]
    file.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=r"12 is damaged \(other numbers than were written, in settings\)"):
        read(run)


def test_checksums_are_the_same_on_every_mesh(run):
    mesh = make_mesh(data=2, ring=2)
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(("data", "ring")))
    like = {"weights": STATE["weights"]}
    with Checkpoints(run) as checkpoints:
        with pytest.raises(ConfigError, match="another model"):
            checkpoints.restore(like, split)
        all_of = {name: split if name == "weights" else jax.sharding.NamedSharding(mesh, jax.P()) for name in STATE}
        jax.tree.map(np.testing.assert_array_equal, checkpoints.restore(STATE, all_of), STATE)


def test_commands_answer_a_damaged_checkpoint_in_one_line(trained, capsys):
    folder = trained()
    for file in (folder / "checkpoints/12").glob("*/ocdbt.process_0/d/*"):  # arrays may stand in any of them
        file.write_bytes(b"")
    assert evaluate.main([str(folder)]) == 2
    assert training.main([str(folder / "config.json"), "name=tiny", "train.updates=13", "--resume"]) == 2
    lines = capsys.readouterr().err.splitlines()
    errors = [line for line in lines if line.startswith("error: the checkpoint ")]
    assert len(errors) == 2
    assert all("runs/tiny/checkpoints/12 is damaged (" in line for line in errors)
    assert not any("Traceback" in line for line in lines)


def test_a_read_that_was_given_up_is_silent_whenever_it_is_collected(run, monkeypatch):
    """A thread may hold it until long after the error."""
    told = []
    monkeypatch.setattr(sys, "unraisablehook", lambda one: told.append(str(one.exc_value)))
    for file in (run / "checkpoints/12").glob("*/ocdbt.process_0/d/*"):
        file.write_bytes(b"")
    with pytest.raises(ConfigError, match="damaged"):
        read(run)

    class Left:
        def __init__(self, words):
            self.words = words

        def __del__(self):
            raise RuntimeError(self.words)

    for words in ("Encountered error while reading array index: ().", "Event loop is closed", "a fault of ours"):
        Left(words)  # collected at once
    assert told == ["a fault of ours"]
