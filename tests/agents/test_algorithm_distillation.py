"""Algorithm Distillation: it reads histories, and no return that is asked for."""

import jax
import numpy as np
import pytest
from scipy.stats import norm

from agents.cli import ConfigError
from agents.evaluate import evaluate, load_agent
from agents.results import read_results
from data import ChainSampler, TrajectoryStore

HISTORIES = ("agent.kind=algorithm_distillation", "chain.sort=time", "chain.met=annealed")


def test_it_knows_no_return_that_is_asked_for(trained, dataset, now_at):
    _, agent, params, *_ = load_agent(trained(*HISTORIES))
    batch = ChainSampler(TrajectoryStore.open(dataset[1]), trajectories=3, seed=7).sample(0, 2)
    asked = batch._replace(return_to_go=batch.return_to_go + 3.0)
    features = jax.jit(agent.features)
    want = features(params, batch).mean
    np.testing.assert_array_equal(features(params, asked).mean, want)
    memory = jax.jit(agent.start, static_argnums=2)(params, asked.take(np.r_[np.arange(32), [-1] * 8]), 8)
    action, _ = jax.jit(agent.act)(params, memory, now_at(asked, 32), None)
    np.testing.assert_allclose(action, np.clip(want[:, 32], -1, 1), atol=1e-5)
    # Every action counts alike, those of the first trajectories too.
    loss, _ = jax.jit(agent.loss)(params, batch)
    np.testing.assert_allclose(loss, -log_density(features(params, batch), batch.action).mean() / 2, rtol=1e-5)


def log_density(policy, action):
    mean, log_std, action = (np.asarray(x, np.float64) for x in (policy.mean, policy.log_std, action))
    return norm.logpdf(action, mean, np.exp(log_std)).sum(-1)


def test_it_goes_on_with_its_own_history(trained):
    folder = trained(*HISTORIES)
    evaluate(folder, ['evaluate.modes=["self","prompted"]', "evaluate.self_episodes=3"], progress=False)
    assert {(r.mode, r.context_trajectories, r.episode_index) for r in read_results(folder)} == {
        *(("self", 0, episode) for episode in range(3)),
        *(("prompted", context, 0) for context in (0, 2)),
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([], "set chain.sort='time', chain.met='annealed'; got chain.sort='ascending', chain.met=None"),
        (["chain.sort=time", "chain.met=0.5"], "got chain.sort='time', chain.met=0.5"),
        (['data.tasks=["walker-walk"]'], "learns from histories: set chain.sort='time'; got chain.sort='ascending'"),
        (['data.tasks=["point_mass-map"]'], "of a map .point_mass-map. there are none"),
    ],
)
def test_what_are_no_histories_is_refused(tiny, settings, message):
    with pytest.raises(ConfigError, match=message):
        tiny(HISTORIES[0], *settings)
