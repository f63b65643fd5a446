"""Evaluation on maps: what an agent remembers is what it has seen, read once for all queries, and never twice."""

import jax
import numpy as np
import pytest

from agents.agent import Timesteps
from agents.evaluate import evaluate, load_agent, main
from agents.prompts import pad_and_order
from agents.results import read_results
from agents.worlds import _shared
from data import TrajectoryStore, WorldSampler
from data.build import build

MAP = ["evaluate.places=[2,4]", "evaluate.groups=4", "evaluate.queries=2", "evaluate.foreign=true"]


@pytest.fixture(scope="session")
def map_settings(dataset) -> tuple[str, ...]:
    """The map of the episodes of the dark task."""
    path = dataset[1].parent / "map.h5"
    build(dataset[0], "point_mass-map", path, workers=1, progress=False)
    settings = ("data.tasks=['point_mass-map']", f"data.stores=['{path}']", "agent.loss_on=last")
    return (*settings, "agent.loss_elsewhere=0.05", "chain.grow=[2]", "chain.trajectories=4")


def returns(folder):
    return {result.key: result.return_ for result in read_results(folder)}


def test_every_history_is_played_once_and_a_killed_evaluation_goes_on(trained, map_settings):
    folder = trained(*map_settings)
    store = load_agent(folder).store("point_mass-map")
    sampler = WorldSampler(store, trajectories=2, seed=0, split="held_out")
    # Of each world: nothing, a quarter, a half and all seen; with a history also the queries of another world.
    counts = {2: {0: 4, 1: 8, 2: 8}, 4: {0: 4, 1: 8, 2: 8, 4: 8}}
    assert evaluate(folder, [*MAP, "evaluate.seen=[0.0, 0.5, 1.0]"], progress=False) == 40
    assert evaluate(folder, MAP, progress=False) == 8
    results = read_results(folder)
    assert {
        places: {n: sum((r.places, r.context_trajectories) == (places, n) for r in results) for n in of}
        for places, of in counts.items()
    } == counts
    assert {r.context_tokens for r in results} == {0, 16, 32, 64}
    assert {r.context for r in results if not r.context_trajectories} == {"none"}
    for r in results:
        assert (r.age is None) == (r.context == "foreign")
        if r.context == "own":
            prompt, asked = sampler.history(r.evaluation_seed, [r.world], r.places, r.context_trajectories, 2)
            seen = (prompt.observation[0, :, 4:] == asked.sign[0, r.group % 2]).all(axis=-1).any()
            assert seen == (r.age < r.context_trajectories), r
    whole = returns(folder)
    path = folder / "results.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:13] + lines[30:]))
    assert 17 <= evaluate(folder, MAP, progress=False) < 24
    assert returns(folder) == whole


def test_a_little_memory_is_enough(trained, map_settings):
    folder = trained(*map_settings)
    few = [*MAP[:3], "evaluate.places=[4]", "evaluate.seen=[0.5]", "evaluate.sample=false"]
    evaluate(folder, few, progress=False)
    want = returns(folder)
    (folder / "results.jsonl").unlink()
    evaluate(folder, [*few, "evaluate.memory_gib=1e-6"], progress=False)
    assert returns(folder) == want


@pytest.mark.parametrize("mesh", [pytest.param("ring=1", marks=pytest.mark.slow), "ring=2"])
def test_queries_that_share_a_history_act_as_one_full_pass(trained, map_settings, now_at, mesh):
    """The actions after a shared history are those that training computes on the whole chain, to 1e-5."""
    config, agent, params, *_ = load_agent(trained(*map_settings), [f"evaluate.mesh.{mesh}"])
    store = TrajectoryStore.open(config.data.stores[0])
    sampler = WorldSampler(store, trajectories=6, seed=1)
    batch = sampler.sample(0, 2)
    full = jax.jit(agent.features)(params, batch).mean
    prompt = batch.take(np.arange(80))
    memory = jax.jit(agent.start, static_argnums=2)(params, pad_and_order(agent, prompt), 16)
    memory = jax.jit(_shared, static_argnums=1)(memory, 3)
    act = jax.jit(agent.act)
    for m in range(80, 96):
        now = now_at(batch, m)
        action, memory = act(params, memory, Timesteps(*(field.repeat(3, axis=0) for field in now[:-2])), None)
        np.testing.assert_allclose(action, np.clip(full[:, m], -1, 1).repeat(3, axis=0), atol=1e-5)


def test_the_command_says_what_it_takes(trained, map_settings, capsys):
    folder = trained(*map_settings)
    assert main([str(folder), *MAP, "evaluate.groups=3"]) == 2
    assert "evaluate.groups=3 are the queries of all worlds, evaluate.queries=2 those of one" in capsys.readouterr().err
    assert main([str(folder), *MAP]) == 0
    out, err = capsys.readouterr()
    assert "14 histories to read, 2 queries each; keys and values take up to 0.00 GiB" in err
    assert "agentic_transformer, 4 places" in (folder / "summary.csv").read_text()
    assert "4 trajectories (64 tokens)" in out


def test_another_world_is_never_the_own(trained, map_settings, capsys):
    folder = trained(*map_settings)
    assert main([str(folder), *MAP, "evaluate.groups=2"]) == 2
    assert "evaluate.foreign asks about another world than the one seen" in capsys.readouterr().err
    assert not (folder / "results.jsonl").exists()  # nor were the worlds of which nothing is seen played before


@pytest.mark.parametrize("kind", [pytest.param("decision_transformer", marks=pytest.mark.slow), "bc"])
def test_who_sees_no_history_is_asked_without_one(trained, map_settings, kind):
    folder = trained(*map_settings, f"agent.kind={kind}")
    assert evaluate(folder, MAP, progress=False) == 8
    assert {(r.places, r.context, r.context_tokens) for r in read_results(folder)} == {(2, "none", 0), (4, "none", 0)}
