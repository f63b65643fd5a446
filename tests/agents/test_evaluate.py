"""Evaluation: deterministic, never done twice, and acting step by step is what training saw."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agents.agent import Now
from agents.cli import ConfigError
from agents.evaluate import evaluate, evaluate_oracle, held_out_goals, last_of, load_agent, main
from agents.results import read_results
from data import ChainSampler, TrajectoryStore


def returns(folder):
    return {result.key: result.return_ for result in read_results(folder)}


SPARSE = ["attention.scheme=sparse", "attention.sparse={block=8, local_blocks=2, stride=2}", "model.dense_every=2"]


@pytest.mark.parametrize(
    ("settings", "mesh", "tokens"),
    [
        pytest.param([], "ring=1", "fused", marks=pytest.mark.slow),
        pytest.param([], "ring=2", "rsar", marks=pytest.mark.slow),
        (SPARSE, "ulysses=2", "fused"),
        ([], "ring=1", "rsar"),
        ([], "ring=2", "fused"),
        pytest.param(["model.rope_fraction=0.5"], "ring=2", "fused", marks=pytest.mark.slow),
        pytest.param(SPARSE, "ulysses=2", "rsar", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_acting_step_by_step_equals_one_full_pass(trained, dataset, tokens, settings, mesh):
    """The action distribution that a cached rollout acts on is the one that training computes, to 1e-5."""
    folder = trained(f"agent.tokens={tokens}", *settings)
    _, agent, params, *_ = load_agent(folder, [f"evaluate.mesh.{mesh}"])
    store = TrajectoryStore.open(dataset[1])
    batch = ChainSampler(store, trajectories=4, seed=7).sample(0, 2)
    full = jax.jit(agent.features)(params, batch).mean

    prompt = batch.take(np.r_[np.arange(48), np.full(16, -1)])  # three trajectories, and some padding
    memory = jax.jit(agent.start, static_argnums=2)(params, prompt, 16)
    act = jax.jit(agent.act)
    for m in range(48, 64):
        now = Now(
            batch.observation[:, m],
            batch.previous_action[:, m],
            batch.previous_reward[:, m],
            batch.return_to_go[:, m],
            batch.step[:, m],
        )
        action, memory = act(params, memory, now, None)
        np.testing.assert_allclose(action, jnp.clip(full[:, m], -1, 1), atol=1e-5)


@pytest.mark.parametrize(("settings", "moves"), [((), False), (("agent.tokens=rsar",), True)], ids=str)
def test_fused_tokens_stand_anywhere(trained, dataset, settings, moves):
    """Without positions an action is the same however far from the start of the context it is taken."""
    _, agent, params, *_ = load_agent(trained(*settings))
    batch = ChainSampler(TrajectoryStore.open(dataset[1]), trajectories=4, seed=7).sample(0, 2)
    stretched = batch._replace(position=batch.position * 1000)  # the same order
    here, there = (jax.jit(agent.features)(params, b).mean for b in (batch, stretched))
    assert (np.abs(here - there).max() > 1e-3) == moves


@pytest.mark.parametrize("kind", ["agentic_transformer", "decision_transformer", "bc"])
def test_evaluation_is_a_function_of_its_seeds_and_never_done_twice(trained, kind):
    folder = trained(f"agent.kind={kind}")
    assert evaluate(folder, progress=False) == 6
    assert evaluate(folder, progress=False) == 0
    first = returns(folder)
    assert len(first) == 6
    (folder / "results.jsonl").unlink()
    evaluate(folder, progress=False)
    assert returns(folder) == first
    # More of the same: only what is missing is run.
    assert evaluate(folder, ["evaluate.contexts=[0, 1, 2]"], progress=False) == 3


def test_a_half_written_condition_is_run_again(trained):
    folder = trained()
    evaluate(folder, progress=False)
    whole = returns(folder)
    path = folder / "results.jsonl"
    text = path.read_text()
    path.write_text(text[: len(text) - len(text.splitlines()[-1]) // 2])
    assert evaluate(folder, progress=False) == 3
    assert returns(folder) == whole


def test_the_cache_of_a_window_is_bounded_and_self_mode_carries_on(trained):
    folder = trained("agent.window=5")
    assert evaluate(folder, ['evaluate.modes=["self"]', "evaluate.self_episodes=3"], progress=False) == 9
    results = read_results(folder)
    assert {result.episode_index for result in results} == {0, 1, 2}
    assert {result.mode for result in results} == {"self"}
    config, agent, params, *_ = load_agent(folder)
    empty = ChainSampler(TrajectoryStore.open(config.data.stores[0]), trajectories=1, seed=0)
    goals = held_out_goals(config.data.tasks[0], 0, 3)
    memory = agent.start(params, empty.prompt(0, 3, 0, goals, 1.0), 48)
    assert memory.cache.capacity == 6


def test_foreign_contexts_and_the_oracle(tiny, trained):
    folder = trained()
    evaluate(folder, ["evaluate.foreign=true"], progress=False)
    assert {(r.context_trajectories, r.context) for r in read_results(folder)} == {
        (0, "none"),
        (2, "own"),
        (2, "foreign"),
    }
    oracle = evaluate_oracle(tiny("evaluate.groups=40"))
    assert len(oracle) == 40
    assert np.mean([result.return_ for result in oracle]) > 6


def test_last_of_a_prompt_is_that_of_the_last_real_moment(dataset):
    batch = ChainSampler(TrajectoryStore.open(dataset[1]), trajectories=2, seed=0).sample(0, 3)
    order = np.random.default_rng(0).permutation(40)  # 32 moments and 8 paddings in any order
    np.testing.assert_array_equal(last_of(batch.take(order).action, batch.take(order)), batch.action[:, -1])
    nothing = batch.take(np.full(4, -1))
    assert not last_of(nothing.reward, nothing).any()


def test_refusals(trained, tmp_path, capsys):
    with pytest.raises(ConfigError, match=r"runs/nowhere is no run: it has no config.json"):
        load_agent(tmp_path / "runs/nowhere")
    folder = trained()
    assert main([str(folder), "evaluate.grops=3"]) == 2
    assert "unknown key 'evaluate.grops'; did you mean 'groups'?" in capsys.readouterr().err
    assert main([str(folder)]) == 0
    assert "2 trajectories (32 tokens): interquartile mean" in capsys.readouterr().out
    assert main([str(folder)]) == 0
    assert "nothing to do" in capsys.readouterr().out
