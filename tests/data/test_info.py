"""info: one screen that says what is there, and one line where nothing is."""

import json

import numpy as np
import pytest

from data.build import build
from data.collect import collect
from data.exorl import list_episodes, write_episode
from data.info import describe, histogram, main
from data.store_writer import write_store
from tests.data.test_exorl import counting
from tests.data.test_store import episodes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("datasets") / "cartpole"
    collect("cartpole-balance", "uniform", 5, 3, folder, progress=False, episode_steps=20)
    return folder


def test_a_folder_and_its_store(folder, tmp_path, capsys):
    out = tmp_path / "s.h5"
    build(folder, "cartpole-swingup", out, workers=1, limit_steps=60, progress=False)
    capsys.readouterr()
    assert main([str(folder), str(out)]) == 0
    of_folder, of_store = capsys.readouterr().out.split("\n\n")
    assert of_folder.startswith(f"{folder}: a folder of episodes of cartpole-balance, 5 episodes, 100 steps\n")
    assert "policy    uniform, seed 3\n" in of_folder
    assert "numbers   observation 5, action 1, physics 4\n" in of_folder
    assert "steps     20 each\n" in of_folder
    assert "numpy" in of_folder
    assert of_store.startswith(f"{out}: a store of cartpole-swingup, 3 episodes, 60 steps\n")
    assert "the first 3 of 5 episodes" in of_store
    assert "rewards   of cartpole-swingup, control actual\n" in of_store
    assert max(len(text.splitlines()) for text in (of_folder, of_store)) <= 25


def test_the_histogram_counts_every_return(tmp_path):
    rng = np.random.default_rng(0)
    for values in (rng.normal(size=1000), np.arange(11.0), np.array([-1e6, 2e6]), rng.uniform(3, 3.001, 50)):
        lines = histogram(values)
        assert len(lines) == 10
        counts, _ = np.histogram(values, 10)
        assert [int(line.split()[-1]) for line in lines] == counts.tolist()
        assert [line.count("#") for line in lines] == np.ceil(50 * counts / counts.max()).tolist()
        starts = [float(line.split()[0]) for line in lines]
        assert starts == sorted(set(starts)), "as many digits as tell the bins apart"
    assert histogram(np.full(7, 2.5)) == ["  all 2.5"]
    assert histogram(np.array([0.0])) == ["  all 0"]


def test_returns_are_those_of_the_files(tmp_path):
    write_episode(tmp_path, 0, counting(5))
    write_episode(tmp_path, 1, counting(9))
    said = describe(tmp_path)
    assert f"returns   mean {(510 + 936) / 2:g}, median {(510 + 936) / 2:g}" in said
    assert "steps     5 to 9, median 7" in said
    assert "unknown: it has no collect.json" in said
    assert "numbers   observation 1, action 1, physics 1, skill 1" in said


def test_hidden_goals_have_no_returns_yet(tmp_path):
    options = {"task": "point_mass-dark", "source": "a test", "keep_physics": True, "goal": "hindsight"}
    write_store(tmp_path / "s.h5", episodes([3, 4]), **options)
    said = describe(tmp_path / "s.h5")
    assert "returns   none yet: goals are chosen, and rewards computed, when chains are drawn" in said
    assert "physics 4, extras/goal 2" in said


def test_errors_are_one_line(folder, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.h5").write_text("precious")
    damaged = tmp_path / "damaged"
    path = write_episode(damaged, 0, counting())
    path.write_bytes(path.read_bytes()[:-40])
    noted = tmp_path / "noted"
    write_episode(noted, 0, counting())
    (noted / "collect.json").write_text(json.dumps(["walker"]))
    for wrong, message in (
        ("", "PATH is empty; name a path"),
        (tmp_path / "nowhere", "it does not exist"),
        (tmp_path / "empty", "it holds no <name>_<index>_<length>.npz"),
        (tmp_path / "text.h5", "is not a trajectory store"),
        (list_episodes(folder)[0], "is not a trajectory store"),
        (damaged, f"{path}: cut off or damaged"),
        (noted, "not what data.collect writes"),
    ):
        assert main([str(wrong)]) == 2
        said = capsys.readouterr()
        assert message in said.err
        assert said.err.count("\n") == 1, said.err
        assert not said.out
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 2
