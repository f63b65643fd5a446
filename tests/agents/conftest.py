"""A small real dataset and runs trained on it, each made once, by the stack itself: 240 episodes of point_mass-dark."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from agents.agent import Timesteps
from agents.config import Config, dump, load
from agents.results import Result
from agents.train import train
from data import ChainBatch
from data.build import build
from data.collect import collect

TASK = "point_mass-dark"


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> tuple[Path, Path]:
    """Folder of episodes, and the store built from it."""
    folder = tmp_path_factory.mktemp("dataset")
    collect(TASK, "waypoints", 240, 0, folder / "episodes", workers=1, progress=False)
    build(folder / "episodes", TASK, folder / "store.h5", workers=1, progress=False)
    return folder / "episodes", folder / "store.h5"


def tiny_config(dataset) -> str:
    episodes, store = dataset
    return f"""
name = "tiny"
[data]
tasks = ["{TASK}"]
episodes = "{episodes}"
stores = ["{store}"]
held_out = 0.2
[agent]
kind = "agentic_transformer"
[chain]
trajectories = 4
[model]
width = 16
layers = 2
heads = 2
[train]
updates = 12
batch = 4
log_every = 1
checkpoint_every = 5
[evaluate]
contexts = [0, 2]
groups = 3
"""


@pytest.fixture
def write_config(dataset, tmp_path, monkeypatch):
    """The path of a tiny AT config; runs land in the test's own folder."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tiny.toml"
    path.write_text(tiny_config(dataset))
    return path


@pytest.fixture
def tiny(write_config):
    """Gives a function `(*overrides) -> Config`."""

    def make(*overrides: str) -> Config:
        config = load(Config, write_config, overrides)
        assert load(Config, write_config, overrides) == config
        assert dump(config)
        return config

    return make


@pytest.fixture(scope="session")
def trained_once(dataset, tmp_path_factory):
    """Gives a function `(*overrides) -> folder` of a run that is trained once for the whole session."""
    home, made = tmp_path_factory.mktemp("trained"), {}
    (home / "tiny.toml").write_text(tiny_config(dataset))

    def make(*overrides: str) -> Path:
        if overrides not in made:
            before = Path.cwd()
            os.chdir(home)
            try:
                config = load(Config, home / "tiny.toml", [f"name=run{len(made)}", *overrides])
                made[overrides] = home / train(config, progress=False)
            finally:
                os.chdir(before)
        return made[overrides]

    return make


@pytest.fixture
def trained(trained_once, tmp_path, monkeypatch):
    """Gives a function `(*overrides) -> folder` of a finished run, a copy of the test's own at runs/tiny."""
    monkeypatch.chdir(tmp_path)

    def make(*overrides: str) -> Path:
        shutil.copytree(trained_once(*overrides), "runs/tiny")
        return Path("runs/tiny")

    return make


@pytest.fixture
def now_at():
    """Gives a function `(batch, m) -> Timesteps`: what an agent knows before timestep `m` of a batch."""

    def make(batch: ChainBatch, m: int) -> Timesteps:
        return Timesteps(*(getattr(batch, name)[:, m] for name in Timesteps._fields[:-2]))

    return make


@pytest.fixture(scope="session")
def episodes():
    """Gives a function `(returns, **what) -> [Result]` of results of returns[group], or of returns[group][episode].

    An agent without a `series` is a seed of "x/<agent>". `queries` of a map share a world.
    """

    def make(returns, *, agent="at", seed=0, trajectories=0, context=None, places=0, queries=1, **what) -> list[Result]:
        values = {
            "experiment": what.get("series") or f"x/{agent}-{seed}",
            "series": f"x/{agent}",
            "task": "a-b",
            "mode": "prompted",
            "steps": 16,
            "checkpoint_step": 1,
            "versions": {},
        }
        return [
            Result(
                agent=agent,
                seed=seed,
                context_trajectories=trajectories,
                context_tokens=16 * trajectories,
                context=context or ("own" if trajectories else "none"),
                places=places,
                world=group // queries if places else None,
                group=group,
                episode_index=index,
                return_=float(value),
                **values | what,
            )
            for group, of_group in enumerate(returns)
            for index, value in enumerate(np.atleast_1d(of_group))
        ]

    return make
