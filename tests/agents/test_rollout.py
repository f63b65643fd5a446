"""Evaluations that are interrupted, and agents that cannot act."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from agents import evaluate as evaluation
from agents import evaluation_state
from agents.cli import ConfigError
from agents.evaluate import evaluate, main
from agents.results import read_results
from data.build import build
from data.collect import collect

SELF = ['evaluate.modes=["self"]', "evaluate.self_episodes=4"]


def returns(folder: Path) -> dict:
    return {result.key: result.return_ for result in read_results(folder)}


def interrupted_after(monkeypatch, episodes: int) -> list[int]:
    """Makes evaluation raise KeyboardInterrupt in the next episode; returns the list of those that are played."""
    played, real = [], evaluation.play

    def play(*arguments, episode, **more):
        if len(played) == episodes:
            raise KeyboardInterrupt
        played.append(episode)
        return real(*arguments, episode=episode, **more)

    monkeypatch.setattr(evaluation, "play", play)
    return played


@pytest.mark.parametrize(
    "settings",
    [
        (),
        pytest.param(("evaluate.mesh.ring=4",), marks=pytest.mark.slow),
        pytest.param(("agent.kind=bc",), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_an_interrupted_evaluation_goes_on_with_its_episode(trained, monkeypatch, settings):
    folder = trained(*[one for one in settings if one.startswith("agent.")])
    asked = [*SELF, *[one for one in settings if one.startswith("evaluate.")]]
    assert evaluate(folder, asked, progress=False) == 12
    whole = returns(folder)
    (folder / "results.jsonl").unlink()
    with monkeypatch.context() as patch:
        interrupted_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            evaluate(folder, asked, progress=False)
    assert {result.episode_index for result in read_results(folder)} == {0, 1}
    with monkeypatch.context() as patch:
        played = interrupted_after(patch, 99)
        assert evaluate(folder, asked, progress=False) == 6
        assert played == [2, 3]
    assert returns(folder) == whole
    assert not (folder / evaluation_state.FILE).exists()


@pytest.mark.parametrize("damage", ["missing", "cut off", "of something else", "of other settings"])
def test_without_a_good_file_the_episodes_before_are_played_again(trained, monkeypatch, damage):
    folder = trained("agent.kind=bc")
    assert evaluate(folder, SELF, progress=False) == 12
    whole = returns(folder)
    (folder / "results.jsonl").unlink()
    with monkeypatch.context() as patch:
        interrupted_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            evaluate(folder, SELF, progress=False)
    kept = folder / evaluation_state.FILE
    if damage == "missing":
        kept.unlink()
    elif damage == "cut off":
        kept.write_bytes(kept.read_bytes()[:100])
    elif damage == "of something else":
        kept.write_bytes(b"no archive")
    else:
        np.savez(kept, label=np.array("another"), episode=np.array(2))
    assert evaluate(folder, SELF, progress=False) == 6
    assert returns(folder) == whole


@pytest.mark.slow
def test_a_killed_evaluation_goes_on(trained):
    """A real process, killed between two of its episodes."""
    folder, path = trained(), Path("runs/tiny/results.jsonl")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "JAX_PLATFORMS": "cpu"}
    asked = ['evaluate.modes=["self"]', "evaluate.self_episodes=40"]
    words = [sys.executable, "-m", "agents.evaluate", str(folder), *asked]
    process = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (path.exists() and len(path.read_text().splitlines()) >= 12):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(read_results(folder)) < 120
    evaluate(folder, asked, progress=False)
    got = returns(folder)
    path.unlink()
    assert evaluate(folder, asked, progress=False) == 120
    assert returns(folder) == got


@pytest.mark.parametrize("kind", ["agentic_transformer", "bc"])
def test_an_agent_that_acts_nan_says_so(trained, monkeypatch, capsys, kind):
    folder, real = trained(f"agent.kind={kind}"), evaluation.load_agent

    def broken(*arguments):
        loaded = real(*arguments)
        return loaded._replace(params=jax.tree.map(lambda leaf: leaf * np.nan, loaded.params))

    monkeypatch.setattr(evaluation, "load_agent", broken)
    assert main([str(folder)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.match(r"error: run\d+, checkpoint of update 12, acts NaN in step 0 of an episode: its weights", error)
    assert not (folder / "results.jsonl").exists()


@pytest.mark.slow
def test_episodes_longer_than_any_that_was_learnt_from_are_refused(tiny, tmp_path):
    from agents.train import train

    collect("point_mass-dark", "waypoints", 40, 0, tmp_path / "short", progress=False, episode_steps=8)
    build(tmp_path / "short", "point_mass-dark", tmp_path / "short.h5", workers=1, progress=False)
    stores = f'data.stores=["{tmp_path / "short.h5"}"]'
    folder = train(tiny(stores, "train.updates=2", "data.held_out=0.5"), progress=False)
    with pytest.raises(
        ConfigError, match=r"learnt from episodes of up to 8 steps, and those of point_mass-dark here have"
    ):
        evaluate(folder, progress=False)
    with pytest.raises(ConfigError, match=r"have 9: of the later ones it knows nothing.*evaluate.episode_steps=8"):
        evaluate(folder, ["evaluate.episode_steps=9"], progress=False)
    assert evaluate(folder, ["evaluate.episode_steps=8"], progress=False) == 6
    assert {result.steps for result in read_results(folder)} == {8}
    other = train(tiny(stores, "name=bc", "agent.kind=bc", "train.updates=2", "data.held_out=0.5"), progress=False)
    assert evaluate(other, progress=False) == 6
    assert json.loads((folder / "results.jsonl").read_text().splitlines()[0])["steps"] == 8
