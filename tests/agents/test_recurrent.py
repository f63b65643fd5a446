"""The recurrent agent: a step at a time is the whole at once, and what it may not see it does not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agents.cli import ConfigError
from agents.evaluate import evaluate, load_agent
from agents.results import read_results
from data import ChainSampler, TrajectoryStore

RECURRENT = "agent.kind=recurrent"


@pytest.fixture
def loaded(trained, dataset):
    """The agent, its weights, and two chains of four trajectories."""
    _, agent, params, *_ = load_agent(trained(RECURRENT))
    return agent, params, ChainSampler(TrajectoryStore.open(dataset[1]), trajectories=4, seed=7).sample(0, 2)


def test_acting_step_by_step_equals_one_full_pass(loaded, now_at):
    agent, params, batch = loaded
    full = jax.jit(agent.features)(params, batch).mean
    for length in (0, 48):
        prompt = batch.take(np.r_[np.arange(length), np.full(16, -1)])  # some trajectories, and padding
        memory = jax.jit(agent.start, static_argnums=2)(params, prompt, 16)
        act = jax.jit(agent.act)
        for m in range(length, length + 16):
            now = now_at(batch, m)
            action, memory = act(params, memory, now, None)
            np.testing.assert_allclose(action, jnp.clip(full[:, m], -1, 1), atol=1e-5)


def test_chains_side_by_side_and_padding_change_nothing(loaded):
    agent, params, batch = loaded
    features = jax.jit(agent.features)
    want = features(params, batch).mean
    twice = batch.take(np.r_[np.arange(64), np.full(8, -1), np.arange(64)])
    got = features(params, twice).mean
    np.testing.assert_allclose(got[:, 72:], want, atol=1e-6)
    changed = batch._replace(observation=batch.observation + 1.0 * (np.arange(64) >= 40)[:, None])
    later = features(params, changed).mean
    np.testing.assert_array_equal(later[:, :40], want[:, :40])
    assert np.abs(later[:, 41:] - want[:, 41:]).max() > 1e-4


def test_it_is_evaluated_like_any_other(trained):
    folder = trained(RECURRENT)
    evaluate(folder, progress=False)
    assert {result.context_trajectories for result in read_results(folder)} == {0, 2}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["mesh.ring=2"], r"got mesh\.ring=2"),
        (["evaluate.mesh.ring=2"], r"got evaluate\.mesh\.ring=2"),
        (["agent.tokens=rsar"], "takes fused tokens"),
        (["agent.window=4"], "has no window"),
    ],
    ids=str,
)
def test_what_it_cannot_do_is_refused(tiny, settings, message):
    with pytest.raises(ConfigError, match=message):
        tiny(RECURRENT, *settings)
