"""The plan of a config: what is compiled is what training runs."""

import json

import pytest

from agents.plan import main


def row(printed: str) -> list[str]:
    return next(line for line in printed.splitlines() if line.startswith("| tiny")).strip("| ").split(" | ")


@pytest.mark.parametrize(
    "how",
    [pytest.param([], marks=pytest.mark.slow), ["model.fsdp=true", "model.remat=all", "train.accumulate=2"]],
    ids=str,
)
def test_a_plan_for_virtual_devices(write_config, tmp_path, capsys, how):
    path = tmp_path / "plan.json"
    arguments = [str(write_config), "--topology", "cpu:4", "mesh.ring=2", "mesh.data=2", *how, "--json", str(path)]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    cells = row(printed.out)
    # 4 trajectories of 16 steps, a token each; two of the four rows on each half of the devices.
    assert cells[1:6] == ["cpu:4", "2 x 2 x 1", "all" if how else "none", "64", "64"]
    assert "tiny at 64 tokens on cpu:4: compiling" in printed.err
    (one,) = json.loads(path.read_text())["plans"]
    assert one["temporary_bytes"] > 0
    assert one["gather_bytes"] > 0 if how else one["gather_bytes"] == 0


def test_the_weights_are_those_of_the_run(write_config, tmp_path, capsys):
    """And so are the bytes of all arguments: weights, two moments of each, counters, and the batch."""
    import jax
    import numpy as np

    from agents.config import Config, load
    from agents.datasets import open_stores
    from agents.optimizer import make_optimizer
    from agents.registry import make_agent
    from agents.train import describe
    from agents.update import first_state

    assert main([str(write_config), "--topology", "cpu:1", "--json", str(tmp_path / "plan.json")]) == 0
    (one,) = json.loads((tmp_path / "plan.json").read_text())["plans"]
    config = load(Config, write_config, [])
    stores = open_stores(config.data)
    meta = describe(config, stores)
    agent = make_agent(config, meta.scales, meta.action_size, meta.episode_steps, None)
    state, _ = first_state(config, agent, make_optimizer(config), None)
    sampler = agent.sampler(stores)
    batch = sampler.sample(0, np.arange(4), np.arange(sampler.timesteps))
    assert one["parameters"] == sum(x.size for x in jax.tree.leaves(state[0]))
    read = {"reward"}  # a field that the loss does not read may be left out by the compiler
    most = sum(x.nbytes for x in jax.tree.leaves((state, batch)))
    least = most - sum(getattr(batch, name).nbytes for name in read)
    assert least <= one["argument_bytes"] <= most + 1024


@pytest.mark.libtpu
@pytest.mark.slow
def test_a_plan_for_a_tpu(write_config, capsys):
    import os
    import subprocess
    import sys

    command = [sys.executable, "-m", "agents.plan", str(write_config), "--topology", "v5e:2x4", "mesh.ring=8"]
    ran = subprocess.run(command, env=os.environ, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert row(ran.stdout)[9] == "yes"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology", "cpu:8"], "= 1 devices; cpu:8 has 8. Add mesh.ring=8"),
        (["--topology", "v9:2x2"], "the TPU compiler"),
        (["--topology", "cpu:1", "agent.kind=bc"], "agent.kind 'bc' has no context"),
        (["--topology", "cpu:1", "agent.kind=recurrent"], "agent.kind 'recurrent' has no attention to plan for"),
        (["--topology", "cpu:1", "--json", "nowhere/plan.json"], "there is no folder nowhere"),
    ],
)
def test_errors_are_one_line(write_config, capsys, arguments, message):
    assert main([str(write_config), *arguments]) == 2
    printed = capsys.readouterr()
    assert not printed.out
    assert message in printed.err
    assert "Traceback" not in printed.err
