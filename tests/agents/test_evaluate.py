"""Evaluation: deterministic, never done twice, and acting step by step is what training saw."""

import copy
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agents.checkpoint import versions
from agents.cli import ConfigError
from agents.episodes import Condition
from agents.evaluate import evaluate, load_agent, main, make_prompt
from agents.goals import foreign_goals, held_out_goals
from agents.oracle import evaluate_oracle
from agents.prompts import held_out
from agents.results import read_results
from agents.rollout import last_of
from agents.statistics import summarize
from agents.train import main as train
from data import ChainSampler, DataError, TrajectoryStore
from data.build import build
from data.tasks import foreign_goal, goal_task
from data.tasks.dark import PointMassDark


def returns(folder):
    return {result.key: result.return_ for result in read_results(folder)}


LOCAL = ["model.layers=2", "model.dense_every=2", "model.local_window=6"]
SPARSE = ["attention.scheme=sparse", "attention.sparse={block=8, local_blocks=2, stride=2}", "model.dense_every=2"]


@pytest.mark.parametrize(
    ("settings", "mesh", "tokens"),
    [
        pytest.param([], "ring=1", "fused", marks=pytest.mark.slow),
        pytest.param([], "ring=2", "rsar", marks=pytest.mark.slow),
        pytest.param(["agent.mixture=3"], "ring=2", "fused", marks=pytest.mark.slow),
        pytest.param(SPARSE, "ulysses=2", "fused", marks=pytest.mark.slow),
        pytest.param([], "ring=1", "rsar", marks=pytest.mark.slow),
        (["model.log_scaling=true", "model.qk_norm=true"], "ring=2", "fused"),
        pytest.param(["model.rope_fraction=0.5"], "ring=2", "fused", marks=pytest.mark.slow),
        pytest.param(SPARSE, "ulysses=2", "rsar", marks=pytest.mark.slow),
        pytest.param(LOCAL, "ring=2", "fused", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_acting_step_by_step_equals_one_full_pass(trained, dataset, now_at, tokens, settings, mesh):
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
        now = now_at(batch, m)
        action, memory = act(params, memory, now, None)
        np.testing.assert_allclose(action, jnp.clip(full[:, m], -1, 1), atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "moves"), [((), False), pytest.param(("agent.tokens=rsar",), True, marks=pytest.mark.slow)], ids=str
)
def test_fused_tokens_stand_anywhere(trained, dataset, settings, moves):
    """Without positions an action is the same however far from the start of the context it is taken."""
    _, agent, params, *_ = load_agent(trained(*settings))
    batch = ChainSampler(TrajectoryStore.open(dataset[1]), trajectories=4, seed=7).sample(0, 2)
    stretched = batch._replace(position=batch.position * 1000)  # the same order
    here, there = (jax.jit(agent.features)(params, b).mean for b in (batch, stretched))
    assert (np.abs(here - there).max() > 1e-3) == moves


@pytest.mark.parametrize(
    "kind",
    ["agentic_transformer", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("decision_transformer", "bc"))],
)
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


def test_a_torn_result_alone_is_made_again(trained):
    folder = trained()
    evaluate(folder, progress=False)
    whole = returns(folder)
    path = folder / "results.jsonl"
    text = path.read_text()
    path.write_text(text[: len(text) - len(text.splitlines()[-1]) // 2])
    assert evaluate(folder, progress=False) == 1  # the others are there
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


def test_last_of_a_prompt_is_that_of_the_last_real_timestep(dataset):
    batch = ChainSampler(TrajectoryStore.open(dataset[1]), trajectories=2, seed=0).sample(0, 3)
    order = np.random.default_rng(0).permutation(40)  # 32 timesteps and 8 paddings in any order
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


ONE = ["evaluate.contexts=[2]"]


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("evaluate.target=3.0", "evaluate.target=3.0"),
        *(
            pytest.param(setting, setting, marks=pytest.mark.slow)
            for setting in ("evaluate.sample=false", "evaluate.seed=1", "chain.sort=descending")
        ),
    ],
)
def test_other_settings_are_evaluated_anew_and_never_pooled(trained, setting, told):
    folder = trained()
    assert evaluate(folder, ONE, progress=False) == 3
    assert evaluate(folder, [*ONE, setting], progress=False) == 3
    assert evaluate(folder, [*ONE, setting], progress=False) == 0
    assert (
        evaluate(folder, [*ONE, "evaluate.mesh.ring=2", "attention.kernel=auto", "train.workers=1"], progress=False)
        == 0
    )
    results = read_results(folder)
    assert len(results) == 6
    assert len({result.settings_id for result in results}) == 2
    key, value = told.split("=")
    assert str(results[3].settings[key]).lower() == value
    rows = summarize(results, statistics=["mean"], resamples=10)
    assert [row.episodes for row in rows] == [3, 3]
    assert f"agentic_transformer [{told}]" in {row.agent for row in rows}


@pytest.mark.slow
def test_the_best_checkpoint_is_reported_where_it_is_asked_for(trained, capsys):
    folder = trained(
        "train.checkpoint_every=2", "train.keep_checkpoints=1", "train.keep_best=1", "optimizer.learning_rate=3.0"
    )
    evaluate(folder, ONE, progress=False)
    best = [*ONE, "evaluate.checkpoint=best"]
    step = load_agent(folder, best).step
    assert main([str(folder), *best]) == 0
    assert "3 episodes appended" in capsys.readouterr().out
    asked = [result for result in read_results(folder) if result.settings.get("evaluate.checkpoint") == "best"]
    assert {result.checkpoint_step for result in asked} == {step}
    line = (folder / "summary.csv").read_text().splitlines()[1].split(",")
    assert float(line[11]) == pytest.approx(np.mean([result.return_ for result in asked]), rel=1e-5)
    assert main([str(folder), *best]) == 0
    assert f"nothing to do: runs/tiny/results.jsonl holds every episode of checkpoint {step}" in capsys.readouterr().out


def test_results_say_who_played_and_with_which_versions(trained, monkeypatch):
    folder = trained()
    now = versions()
    monkeypatch.setattr("agents.evaluate.versions", lambda: now | {"numpy": "9.9"})
    assert evaluate(folder, ONE, progress=False) == 3
    first = read_results(folder)[0]
    assert first.versions["numpy"] == "9.9"
    assert first.trained_with == now
    assert (first.run, first.agent, first.seed) == (first.series, "agentic_transformer", 0)
    monkeypatch.setattr("agents.evaluate.versions", lambda: now)
    assert evaluate(folder, ONE, progress=False) == 0  # other versions block nothing


def test_another_store_and_another_split_are_refused(trained, dataset, tmp_path, capsys):
    folder = trained()
    grown = tmp_path / "grown.h5"
    build(dataset[0], "point_mass-dark", grown, workers=1, limit_steps=120 * 16, progress=False)
    with pytest.raises(
        ConfigError, match=r"runs/tiny learnt point_mass-dark from another store: .*; data.stores now means"
    ):
        evaluate(folder, [f'data.stores=["{grown}"]'], progress=False)
    with pytest.raises(ConfigError, match=r"trained with other settings: data.held_out=0.5 \(was 0.2\). Leave"):
        evaluate(folder, ["data.held_out=0.5"], progress=False)
    with pytest.raises(ConfigError, match=r"runs/tiny learnt point_mass-dark, not reacher-dark. Change data.tasks"):
        evaluate(folder, ['data.tasks=["reacher-dark"]'], progress=False)
    with pytest.raises(ConfigError, match=r"trained with other settings: seed=4 \(was 0\). Leave them"):
        evaluate(folder, ["seed=4"], progress=False)
    assert not (folder / "results.jsonl").exists()


@pytest.mark.slow
def test_contexts_of_more_than_is_held_out_are_refused_before_anything_is_played(trained):
    folder = trained()
    loaded = load_agent(folder)
    held = len(held_out(loaded.config, loaded.store("point_mass-dark")).pool)
    few = ["evaluate.groups=1"]
    told = rf"evaluate.contexts asks for {held + 1} trajectories, and .*store.h5 holds out {held} of its 240 episodes"
    with pytest.raises(ConfigError, match=told):
        evaluate(folder, [*few, f"evaluate.contexts=[0, {held + 1}]"], progress=False)
    assert not (folder / "results.jsonl").exists()
    assert evaluate(folder, [*few, f"evaluate.contexts=[{held}]"], progress=False) == 1
    assert evaluate(folder, [*few, f"evaluate.contexts=[{held + 1}]", "evaluate.met=[0.5]"], progress=False) == 1


def test_a_config_that_was_edited_is_refused(trained, capsys):
    folder = trained()
    written = json.loads((folder / "config.json").read_text())
    for key, value in {
        "optimizer.learning_rate": 0.5,
        "model.width": 32,
        "agent.window": 5,
        "chain.sort": "time",
    }.items():
        edited = copy.deepcopy(written)
        section, name = key.split(".")
        edited[section][name] = value
        (folder / "config.json").write_text(json.dumps(edited))
        with pytest.raises(ConfigError, match=rf"tiny/config.json does not say what .*: {key}=.* \(was .*Put that"):
            evaluate(folder, ONE, progress=False)
    (folder / "config.json").write_text(json.dumps(written))
    for change in ("optimizer.learning_rate=0.5", "train.batch=8", "chain.trajectories=2", "agent.loss_on=all"):
        with pytest.raises(ConfigError, match=rf"trained with other settings: {change} \(was .*Leave them"):
            evaluate(folder, [*ONE, change], progress=False)
    assert not (folder / "results.jsonl").exists()
    (folder / "config.json").write_text('{"name": "tiny", "lines": 8}')
    Path("own.json").write_text(json.dumps(written | {"name": "tiny"}))
    for command, words in ((main, [str(folder)]), (train, ["own.json", "--resume"])):
        assert command(words) == 2
        assert "error: runs/tiny is a run of agents.recall, not of agents.train. Choose" in capsys.readouterr().err


@pytest.mark.parametrize("task", ["point_mass-dark", "reacher-dark"])
@pytest.mark.parametrize("groups", [1, 256])
def test_foreign_goals_are_apart_whatever_the_groups(task, groups):
    own = held_out_goals(task, 0, groups)
    foreign = foreign_goals(task, 0, own)
    assert (np.linalg.norm(foreign - own, axis=1) > 2 * goal_task(task).radius).all()
    np.testing.assert_array_equal(foreign[0], foreign_goals(task, 0, own[:1])[0])


def test_foreign_goals_that_cannot_be_are_refused(tiny):
    with pytest.raises(DataError, match=r"has no goal more than 2 radii \(20 m\) from .*leave evaluate.foreign out"):
        foreign_goal(PointMassDark(radius=10.0), np.zeros(2), np.random.default_rng(0))
    with pytest.raises(
        ConfigError, match=r"evaluate.foreign takes contexts of another goal, and walker-walk hides none"
    ):
        tiny('data.tasks=["walker-walk"]', "evaluate.foreign=true")


def test_contexts_that_have_met_the_goal_as_rarely_as_asked(trained):
    folder = trained()
    rare = ["evaluate.met=[0.5, 0.0625]", "evaluate.contexts=[0, 64]", "evaluate.groups=4"]
    assert evaluate(folder, rare, progress=False) == 16
    assert evaluate(folder, rare, progress=False) == 0
    results = read_results(folder)
    assert {(r.met, r.context_trajectories, r.context_tokens) for r in results} == {
        (met, count, 16 * count) for met in (0.5, 0.0625) for count in (0, 64)
    }
    assert main([str(folder), *rare]) == 0
    assert "agentic_transformer, p = 1/16" in (folder / "summary.csv").read_text()
    loaded, goals = load_agent(folder, rare), held_out_goals("point_mass-dark", 0, 4)
    condition = Condition("point_mass-dark", "prompted", 64, "own", 1)
    often, rarely = (
        (make_prompt(loaded, condition._replace(met=met), goals, 1.0).reward.reshape(4, -1, 16).sum(-1) > 0).mean()
        for met in (0.5, 0.0625)
    )
    assert often > 0.3 > 2 * rarely
