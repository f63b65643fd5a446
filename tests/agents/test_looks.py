"""What a person looks at: episodes played once more, their paths, films and training in a report; and wandb."""

import importlib.util
import json
import os
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from agents.cli import ConfigError
from agents.config import Config, load
from agents.evaluate import evaluation, load_agent, main
from agents.film import check_video
from agents.metrics import log_evaluation
from agents.paths_figure import draw_paths
from agents.scenes import played_scenes
from agents.statistics import summarize
from agents.train import main as train
from agents.training_figure import draw_training
from data.tasks import goal_task

RENDERS = "from data.dmc import make; e = make('reacher-dark', render_mode='rgb_array'); e.reset(seed=0); e.render()"


def test_scenes_are_episodes_and_paths_are_drawn_over_their_goals(trained, tmp_path):
    folder = trained()
    scenes = played_scenes(load_agent(folder))
    assert [scene.label for scene in scenes] == ["no context", "2 trajectories"]
    task = goal_task("point_mass-dark")
    for scene in scenes:
        assert len(scene.takes) == 3
        for take in scene.takes:
            assert take.states.shape == (17, 4)
            assert task.reward(take.states[1:], take.extras["goal"]).sum() == take.total
            np.testing.assert_allclose(take.states[0, :2], -0.18, atol=0.02)
    goals = [[take.extras["goal"].tolist() for take in scene.takes] for scene in scenes]
    assert goals[0] == goals[1]
    (paths,) = draw_paths(scenes, tmp_path)
    assert paths.path.name == "paths_point_mass-dark.png"
    assert "paths (metres) of 3 episodes" in paths.caption
    training = draw_training({"tiny": [folder]}, tmp_path / "training.png")
    assert training.path.read_bytes().startswith(b"\x89PNG")
    (folder / "metrics.jsonl").write_text("")
    assert draw_training({"tiny": [folder]}, tmp_path / "none.png") is None


def test_in_mode_self_the_first_and_the_last_episode(trained):
    folder = trained()
    scenes = played_scenes(load_agent(folder, ["evaluate.modes=['self']", "evaluate.self_episodes=3"]))
    assert [scene.label for scene in scenes] == ["episode 1 of its own", "episode 3 of its own"]


def test_video_where_it_cannot_be_is_one_line(trained, monkeypatch, capsys):
    folder = trained()
    assert main([str(folder), "--video"]) == 2
    assert "MUJOCO_GL is 'disabled': put MUJOCO_GL=egl before the command" in capsys.readouterr().err
    assert not (folder / "results.jsonl").exists(), "said before anything is played"
    monkeypatch.setenv("MUJOCO_GL", "egl")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = load(Config, folder / "config.json")
    with pytest.raises(ConfigError, match=r"pip install \"imageio\[ffmpeg\]\""):
        check_video(config)
    with pytest.raises(ConfigError, match="knows no maps, and point_mass-map is all that is evaluated"):
        check_video(config.model_copy(update={"data": config.data.model_copy(update={"tasks": ["point_mass-map"]})}))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("imageio_ffmpeg") is None, reason="imageio[ffmpeg] is not installed")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # imageio leaves its pipes open
def test_video(trained):
    """In a process that draws: this one has MUJOCO_GL=disabled."""
    folder, environment = trained(), {**os.environ, "MUJOCO_GL": "egl"}
    if subprocess.run([sys.executable, "-c", RENDERS], env=environment, capture_output=True).returncode:
        pytest.skip("no EGL here")
    command = [sys.executable, "-m", "agents.evaluate", str(folder), "--video"]
    paths = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, env={**environment, "PYTHONPATH": paths}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"wrote {folder / 'report.html'}" in done.stdout
    page = (folder / "report.html").read_text()
    assert page.count("<video") == 2
    assert page.count("<img") == 4  # return against context, paths, film strip, training
    import imageio.v3 as iio

    frames = iio.imread(folder / "looks" / "film_point_mass-dark_no_context.mp4", plugin="FFMPEG")
    assert frames.shape == (17, 240, 960, 3)
    assert np.ptp(frames[0].astype(int) - frames[-1]) > 50, "something moved"


@pytest.mark.slow
def test_training_and_evaluation_in_wandb_offline(write_config, monkeypatch):
    """Config, metrics, table, figure and film, read back from what wandb wrote; all belong to one run."""
    monkeypatch.delenv("WANDB_MODE")
    folder = Path("runs/tiny")
    assert train([str(write_config), "wandb.mode=offline", "train.updates=3", "evaluate.contexts=[0,1]"]) == 0
    rows = summarize(evaluation(folder, progress=False).results)
    draw_training({"tiny": [folder]}, Path("training.png"))
    Path("film.mp4").write_bytes(b"wandb does not look into it")
    config = load(Config, folder / "config.json")
    log_evaluation(folder, config, rows, [Path("training.png"), Path("film.mp4")])

    pieces = sorted((folder / "wandb").glob("offline-run-*"), key=lambda path: path.stat().st_mtime)
    assert [piece.name.rsplit("-", 1)[1] for piece in pieces] == [(folder / "wandb_id").read_text()] * len(pieces)
    of_training, of_evaluation = [read_back(next(piece.glob("*.wandb"))) for piece in pieces]
    items = [item for record in of_training if record.HasField("history") for item in record.history.item]
    assert len([item for item in items if "loss/action" in (item.key, *item.nested_key)]) == 3
    kept = {item.key: item.value_json for r in of_training if r.HasField("run") for item in r.run.config.update}
    assert json.loads(kept["train"])["updates"] == 3
    logged = {key for r in of_evaluation if r.HasField("history") for item in r.history.item
              for key in (item.key, *item.nested_key)}  # fmt: skip
    assert {"evaluation/summary", "figures/training", "films/film"} <= logged
    media = pieces[1] / "files" / "media"
    (table,) = media.glob("table/evaluation/*.json")
    content = json.loads(table.read_text())
    means = [row for row in content["data"] if row[content["columns"].index("statistic")] == "mean"]
    assert sorted(row[content["columns"].index("context_trajectories")] for row in means) == [0, 1]
    (figure,) = media.glob("images/figures/training*.png")
    assert figure.read_bytes() == Path("training.png").read_bytes()
    assert len([*media.glob("videos/films/film*.mp4")]) == 1


def read_back(path: Path) -> list:
    """Returns the records of an offline run, once its end is there: wandb may write on after finish()."""
    for _ in range(600):
        records = records_of(path)
        if records and records[-1].HasField("exit"):
            break
        time.sleep(0.1)
    return records


def records_of(path: Path) -> list:
    """Returns the records so far: LevelDB's log format, behind 7 bytes, of protobuf messages."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, records, message, at = path.read_bytes(), [], b"", 7
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        message += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            records.append(Record.FromString(message))
            message = b""
    return records
