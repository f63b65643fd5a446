"""Training: the same losses on every mesh, after every interruption; and every way in which a run can be refused."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import jax
import numpy as np
import pytest

from agents.agent import Scales
from agents.checkpoint import Checkpoints, read_metrics, versions
from agents.cli import ConfigError
from agents.config import dump
from agents.continuation import newest
from agents.evaluate import load_agent
from agents.optimizer import make_optimizer
from agents.processes import training_lock
from agents.registry import make_agent
from agents.train import main, train
from agents.update import make_update
from data import ChainBatch, DataError
from data.build import build
from data.store_file import seal
from rlring import make_mesh
from rlring.language_model import TrainState


def losses(folder: Path) -> dict[int, tuple[float, float]]:
    lines = read_metrics(folder / "metrics.jsonl")
    return {line["step"]: (line["loss/action"], line["gradient/global_norm"]) for line in lines}


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture
def golden(tiny):
    """30 losses on one device."""

    def make(*overrides: str):
        return losses(train(tiny("train.updates=30", "name=golden", *overrides), progress=False))

    return make


@pytest.mark.parametrize(
    ("tokens", "how", "rings"),
    [
        ("fused", "model.log_scaling=true model.qk_norm=true", "4"),
        slow("fused", "model.log_scaling=true model.qk_norm=true", "28"),
        slow("fused", "", "248"),
        slow("fused", "model.layers=2 model.dense_every=2 model.local_window=6 model.log_scaling=true", "248"),
        slow("rsar", "", "4"),
    ],
    ids=str,
)
def test_losses_are_the_same_on_every_mesh(golden, tiny, tokens, how, rings):
    settings = [f"agent.tokens={tokens}", *how.split()]
    want = golden(*settings)
    assert len(want) == 30
    assert want[30][0] < want[1][0]
    for ring in rings:
        config = tiny("train.updates=30", f"name=ring{ring}", *settings, f"mesh.ring={ring}")
        got = losses(train(config, progress=False))
        np.testing.assert_allclose([got[s][0] for s in want], [want[s][0] for s in want], atol=1e-5, err_msg=ring)


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [
        "",
        "model.fsdp=true",
        "model.fsdp=true model.remat=attention train.accumulate=4",
        "model.fsdp=true model.remat=all",
        "model.remat=all train.accumulate=4",
    ],
)
def test_how_it_is_computed_changes_no_loss(tiny, how):
    """data x ring x ulysses against one device without any of it."""
    same = ["train.updates=20", "train.batch=8", "model.heads=4", "attention.scheme=hybrid"]
    want = losses(train(tiny("name=want", *same), progress=False))
    for data, ring, ulysses in ((1, 1, 1), (2, 1, 1), (1, 4, 1), (1, 1, 4), (2, 2, 2)):
        mesh = [f"mesh.data={data}", f"mesh.ring={ring}", f"mesh.ulysses={ulysses}"]
        got = losses(train(tiny(f"name=m{data}{ring}{ulysses}", *same, *mesh, *how.split()), progress=False))
        np.testing.assert_allclose(list(got.values()), list(want.values()), rtol=1e-5, atol=1e-5, err_msg=str(mesh))


@pytest.mark.parametrize(
    ("ring", "remat"), [slow(2, "attention"), slow(4, "attention"), slow(1, "none"), slow(4, "all")]
)
def test_memory_of_a_train_step_is_linear_in_length(tiny, ring, remat):
    """The trap: what depends on positions alone must not be kept for every layer and every pair of blocks."""
    config = tiny("agent.tokens=rsar", f"mesh.ring={ring}", f"model.remat={remat}", "train.batch=1")
    mesh = make_mesh(ring=ring) if ring > 1 else None
    scales = Scales(np.zeros(4), np.ones(4), 1.0)

    def temporary_bytes(timesteps: int) -> int:
        agent = make_agent(config, scales, 2, 1000, mesh)
        optimizer = make_optimizer(config)
        params = jax.eval_shape(agent.init, jax.random.key(0))
        state = TrainState(params, jax.eval_shape(optimizer.init, params))
        sizes = {"observation": (4,), "action": (2,), "previous_action": (2,)}
        whole = {"step", "trajectory", "position", "segment"}
        batch = ChainBatch(
            *(
                jax.ShapeDtypeStruct((1, timesteps, *sizes.get(name, ())), np.int32 if name in whole else np.float32)
                for name in ChainBatch._fields
            )
        )
        return make_update(agent, optimizer).lower(state, batch).compile().memory_analysis().temp_size_in_bytes

    lengths = np.array([4096, 8192, 16384, 32768, 65536] if ring == 1 else [4096, 16384, 65536])
    sizes = np.array([temporary_bytes(tokens // 4) for tokens in lengths])
    growth = (sizes[1:] / sizes[:-1]) / (lengths[1:] / lengths[:-1])
    assert growth.max() < 1.05, f"temporary bytes from 4K to 64K tokens: {sizes.tolist()}"


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        ("decision_transformer", ""),
        ("bc", ""),
        slow("decision_transformer", "agent.mixture=3"),
        ("bc", "agent.mixture=3"),
    ],
)
def test_the_baselines_learn(tiny, kind, how):
    config = tiny(f"agent.kind={kind}", "train.updates=60", "optimizer.learning_rate=1e-2", *how.split())
    got = losses(train(config, progress=False))
    assert np.mean([got[s][0] for s in range(50, 61)]) < np.mean([got[s][0] for s in range(1, 11)]) - 0.1


@pytest.mark.parametrize("ring", [1, slow(4)])
def test_a_stopped_and_resumed_run_logs_the_same_bits(tiny, ring):
    mesh = f"mesh.ring={ring}"
    whole = losses(train(tiny("name=whole", mesh), progress=False))
    # Stop after update 7 of 12: two past the checkpoint of update 5, which the run continues from.
    folder = train(tiny("name=part", mesh), progress=False)
    with Checkpoints(folder) as checkpoints:
        for step in checkpoints.manager.all_steps():
            if step > 5:
                checkpoints.manager.delete(step)
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:7]) + lines[7][:20])  # and a line torn in the middle
    train(tiny("name=part", mesh), resume=True, progress=False)
    assert losses(folder) == whole


def test_a_finished_run_has_nothing_to_resume(trained, tiny):
    folder = trained()
    before = losses(folder)
    config = tiny(f"name={folder.name}")
    (folder / "config.json").write_text(dump(config))
    assert train(config, resume=True, progress=False) == folder
    assert losses(folder) == before


@pytest.mark.parametrize(("updates", "kills"), [(60, 1), slow(300, 2)])
def test_kill_minus_nine_at_any_moment_changes_no_bit(write_config, tmp_path, updates, kills):
    """Real processes, killed in the middle of training and then resumed to the end."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "JAX_PLATFORMS": "cpu"}

    def command(name: str, *more: str) -> list[str]:
        overrides = [f"train.updates={updates}", "train.checkpoint_every=20", "mesh.ring=2"]
        return [sys.executable, "-m", "agents.train", str(write_config), f"name={name}", *overrides, *more]

    subprocess.run(command("whole"), check=True, capture_output=True, env=environment)
    want = losses(tmp_path / "runs/whole")
    assert len(want) == updates
    metrics = tmp_path / "runs/killed/metrics.jsonl"
    wait = np.random.default_rng().uniform(0.0, 1.0)
    for attempt in range(kills):
        process = subprocess.Popen(
            command("killed", *["--resume"] * attempt),
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        begun = len(read_metrics(metrics))
        while process.poll() is None and len(read_metrics(metrics)) <= begun + 25:
            time.sleep(0.02)
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(command("killed", "--resume"), check=True, capture_output=True, env=environment)
    assert losses(tmp_path / "runs/killed") == want, f"waited {wait} s before each kill"


def test_a_second_training_of_one_run_answers_in_one_line(write_config, capsys):
    with training_lock(Path("runs/tiny")):
        for more in ([], ["--resume"]):
            assert main([str(write_config), *more]) == 2
            error = capsys.readouterr().err
            assert error.startswith("error: another process trains runs/tiny right now; wait for it")
            assert error.count("\n") == 1
        assert not Path("runs/tiny").exists()
        with training_lock(Path("runs/other")):
            pass
    assert not Path("runs").exists()  # no lock is left
    with training_lock(Path("runs/tiny")):
        pass


def test_a_folder_of_more_episodes_than_asked_for_is_refused(tiny, dataset):
    collect = 'data.collect={policy="waypoints", episodes=10}'
    with pytest.raises(ConfigError, match=r"episodes holds 240 episodes, and data.collect.episodes asks for 10. Write"):
        train(tiny(collect, 'data.stores=["new.h5"]'), progress=False)
    assert not Path("new.h5").exists()


def test_sigterm_checkpoints_and_ends(write_config, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "agents.train", str(write_config), "train.updates=100000", "train.log_every=5"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while len(read_metrics(tmp_path / "runs/tiny/metrics.jsonl")) < 2 and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in error
    assert "Traceback" not in error
    last = read_metrics(tmp_path / "runs/tiny/metrics.jsonl")[-1]["step"]
    with Checkpoints(tmp_path / "runs/tiny") as checkpoints:
        assert checkpoints.latest() == last


def test_the_best_checkpoint_is_kept_and_acts(tiny):
    folder = train(tiny("train.checkpoint_every=2", "train.keep_checkpoints=1", "train.keep_best=1"), progress=False)
    mean = {step: np.mean([losses(folder)[s][0] for s in (step - 1, step)]) for step in range(2, 13, 2)}
    best = min(mean, key=lambda step: (mean[step], -step))
    with Checkpoints(folder, keep=1, keep_best=1) as checkpoints:
        assert set(checkpoints.manager.all_steps()) == {best, 12}
        assert checkpoints.best() == best
        assert checkpoints.meta(best).config["train"]["keep_best"] == 1
    assert load_agent(folder, ["evaluate.checkpoint=best"]).step == best
    assert load_agent(folder).step == 12


@pytest.mark.slow
def test_a_checkpoint_goes_onto_any_mesh(trained):
    folder = trained("mesh.ring=4")
    one = load_agent(folder)
    four = load_agent(folder, ["evaluate.mesh.ring=4"])
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(four.params), strict=True):
        assert len(b.sharding.device_set) == 4
        np.testing.assert_array_equal(a, b)


def test_metrics_say_what_a_person_asks(trained):
    folder = trained()
    last = read_metrics(folder / "metrics.jsonl")[-1]
    assert last["step"] == 12
    assert last["throughput/tokens_per_second"] > 0
    assert last["memory/peak_bytes"] > 1e7
    assert {"loss/action", "action/mean_squared_error", "gradient/global_norm", "learning_rate"} <= last.keys()
    assert json.loads((folder / "config.json").read_text())["agent"]["kind"] == "agentic_transformer"


def test_refusals(tiny, trained, tmp_path):
    trained()
    with pytest.raises(ConfigError, match=r"runs/tiny already holds a run. Add --resume"):
        train(tiny(), progress=False)
    with pytest.raises(
        ConfigError, match=r"trained with other settings: model.width=32 \(was 16\). Resume with the same config"
    ):
        train(tiny("model.width=32"), resume=True, progress=False)
    with pytest.raises(DataError, match=r"no store at nowhere.h5. Make it with: python -m data.build"):
        train(tiny("name=b", 'data.stores=["nowhere.h5"]'), progress=False)
    with pytest.raises(DataError, match=r"is a store of task 'point_mass-dark'; asked for 'reacher-dark'"):
        train(tiny("name=c", 'data.tasks=["reacher-dark"]'), progress=False)
    assert not (tmp_path / "runs/b").exists()


def test_a_checkpoint_of_another_model_is_refused(trained):
    with pytest.raises(ConfigError, match=r"a checkpoint of another model .*in the checkpoint.*in the config"):
        load_agent(trained(), ["model.width=32"])


def test_a_full_disk_ends_with_one_line(write_config, tiny_disk, monkeypatch, capsys):
    monkeypatch.chdir(tiny_disk)
    assert main([str(write_config)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: the disk is full: could not write")
    assert "runs/tiny/checkpoints" in error
    with Checkpoints(tiny_disk / "runs/tiny") as checkpoints:
        assert checkpoints.latest() is None


def test_a_loss_that_is_no_number_stops_the_run(tiny, dataset, tmp_path):
    broken = tmp_path / "nan.h5"
    broken.write_bytes(dataset[1].read_bytes())
    with h5py.File(broken, "r+") as file:
        file["action"][:] = np.nan
    with broken.open("r+b") as file:
        seal(file)
    with pytest.raises(FloatingPointError, match=r"loss/action.* is not a number after update 1 of runs/tiny. Lower"):
        train(tiny(f'data.stores=["{broken}"]'), progress=False)


@pytest.mark.slow
def test_what_is_advised_after_a_run_diverged_works(write_config, capsys):
    """Weights that are no numbers are never kept as a checkpoint, and other settings start the run over."""
    wild = [str(write_config), "optimizer.learning_rate=1e30", "optimizer.warmup=0", "train.checkpoint_every=1"]
    assert main(wild) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: weights/global_norm is not a number after update 1 of runs/tiny. Lower optimizer.")
    with Checkpoints(Path("runs/tiny")) as checkpoints:
        assert checkpoints.latest() is None
    assert main(wild) == 2
    assert "runs/tiny holds a run with these settings, which diverged. Lower" in capsys.readouterr().err
    assert main([*wild, "--resume"]) == 2
    assert "is not a number after update 1" in capsys.readouterr().err
    assert main([*wild, "optimizer.learning_rate=1e-3"]) == 0
    assert "runs/tiny had diverged; it is kept as runs/tiny.diverged-1" in capsys.readouterr().err
    assert not Path("runs/tiny/diverged.json").exists()
    assert Path("runs/tiny.diverged-1/diverged.json").exists()
    assert main([*wild, "--resume"]) == 2  # a run that is whole is not touched
    assert "runs/tiny was trained with other settings: optimizer.learning_rate" in capsys.readouterr().err


def test_the_command_line_answers_with_one_line(write_config, capsys):
    assert main([str(write_config), "train.updats=1"]) == 2
    error = capsys.readouterr().err
    assert error == f"error: {write_config}: unknown key 'train.updats'; did you mean 'updates'?\n"
    assert main([str(write_config), "train.updates=3"]) == 0
    assert "3 updates, loss" in capsys.readouterr().out
    assert main([str(write_config), "train.updates=3"]) == 2


ELSEWHERE = [
    "train.prefetch=2",
    "train.log_every=2",
    "train.checkpoint_every=7",
    "wandb.mode=disabled",
    "evaluate.seed=3",
]


def test_a_run_goes_on_with_more_updates_on_another_mesh_and_learns_the_same(tiny):
    constant, how = "optimizer.schedule=constant", ["mesh.data=2", "mesh.ring=2", "model.remat=attention"]
    want = losses(train(tiny("name=whole", "train.updates=24", constant), progress=False))
    train(tiny(constant), progress=False)
    folder = train(tiny(constant, "train.updates=24", *how, *ELSEWHERE), resume=True, progress=False)
    got = losses(folder)
    assert list(got) == [*range(1, 13), *range(14, 25, 2)]
    np.testing.assert_allclose(list(got.values()), [want[step] for step in got], rtol=1e-5, atol=1e-5)
    assert newest(folder)[1].updates == [24]  # of a constant rate nothing is left of where it was once to end


@pytest.mark.slow
def test_a_longer_cosine_goes_on_and_is_remembered(tiny):
    folder = train(tiny(), progress=False)
    train(tiny("train.updates=24"), resume=True, progress=False)
    rates = [line["learning_rate"] for line in read_metrics(folder / "metrics.jsonl")]
    assert rates[11] < rates[12]  # where the longer cosine stands
    step, meta = newest(folder)
    assert (step, meta.updates) == (24, [12, 24])
    with pytest.raises(
        ConfigError, match=r"runs/tiny has 24 updates already, more than train.updates=12. Ask for more"
    ):
        train(tiny(), resume=True, progress=False)


def test_other_versions_are_noted_and_block_nothing(tiny, monkeypatch, capsys):
    folder = train(tiny("train.updates=5"), progress=False)
    was = versions()
    monkeypatch.setattr("agents.train.versions", lambda: was | {"numpy": "9.9"})
    train(tiny("train.updates=10"), resume=True, progress=False)
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note:")]
    assert len(notes) == 1
    assert f"runs/tiny was begun with numpy {was['numpy']}" in notes[0]
    assert newest(folder)[1].versions == was | {"numpy": f"{was['numpy']}, 9.9"}


def test_another_store_is_refused(tiny, dataset, tmp_path):
    episodes, store = dataset
    train(tiny("train.updates=5"), progress=False)
    moved = tmp_path / "moved.h5"
    moved.write_bytes(store.read_bytes())
    train(tiny("train.updates=6", f'data.stores=["{moved}"]'), resume=True, progress=False)  # the same, elsewhere
    grown = tmp_path / "grown.h5"
    build(episodes, "point_mass-dark", grown, workers=1, limit_steps=60 * 16, progress=False)
    before = grown.read_bytes()
    collect = 'data.collect={policy="waypoints", episodes=240}'
    with pytest.raises(
        ConfigError,
        match=r"learnt point_mass-dark from another store: .*moved.h5 \(content [0-9a-f]+, 240 "
        r"episodes\); data.stores now means .*grown.h5 \(content [0-9a-f]+, 60 episodes\)",
    ):
        train(tiny("train.updates=7", f'data.stores=["{grown}"]', collect), resume=True, progress=False)
    assert grown.read_bytes() == before  # nor is it made anew
    with pytest.raises(
        DataError, match=r"no store at gone.h5. .*\(looked at /.*/gone.h5; runs/tiny learnt from /.*moved.h5"
    ):
        train(tiny("train.updates=7", 'data.stores=["gone.h5"]'), resume=True, progress=False)
