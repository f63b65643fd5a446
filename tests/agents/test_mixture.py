"""The action head that keeps several modes: its density, what it learns where one Gaussian stands in the middle."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from scipy.special import logsumexp
from scipy.stats import norm

from agents.cli import ConfigError
from agents.gaussian import action_loss
from agents.mixture import Mixture, action_head
from rlring.language_model import TrainState


def reference(weight, means, log_stds, action):
    """- log p(a) / A, averaged, in float64."""
    of_each = norm.logpdf(action[:, None], means, np.exp(log_stds)).sum(-1)
    log_weight = weight - logsumexp(weight, axis=-1, keepdims=True)
    return -logsumexp(log_weight + of_each, axis=-1).mean() / action.shape[-1]


def test_loss_and_gradients_against_float64():
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=shape) for shape in ((7, 5), (7, 5, 2), (7, 5, 2), (7, 2))]

    def loss(weight, means, log_stds, action):
        return action_loss(Mixture(jax.nn.log_softmax(weight), means, log_stds), action, jnp.ones(7))[0]

    with jax.enable_x64(True):
        got, gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))(*map(jnp.asarray, arrays))
    np.testing.assert_allclose(got, reference(*arrays), rtol=1e-12)
    for index, gradient in enumerate(gradients):
        direction = rng.normal(size=arrays[index].shape)
        ends = [
            reference(*(x + s * 1e-6 * direction if i == index else x for i, x in enumerate(arrays))) for s in (1, -1)
        ]
        np.testing.assert_allclose((np.asarray(gradient) * direction).sum(), (ends[0] - ends[1]) / 2e-6, rtol=1e-6)


@pytest.mark.parametrize("modes", [None, 1, 4])
def test_two_ways_to_act_stay_apart(modes):
    """Half of the data goes to (0.8, -0.8) and half to (-0.8, 0.8)."""
    features = jnp.ones((512, 8))
    side = np.where(np.arange(512) % 2, 0.8, -0.8)
    action = jnp.asarray(np.stack([side, -side], -1))
    graph, weights = nnx.split(action_head(8, 2, modes, rngs=nnx.Rngs(0)))
    optimizer = optax.adam(0.02)

    def loss(weights):
        return action_loss(nnx.merge(graph, weights)(features), action, jnp.ones(512))[0]

    def step(state, _):
        return state.updated(optimizer, jax.grad(loss)(state.weights)), None

    state, _ = jax.jit(lambda state: jax.lax.scan(step, state, length=300))(
        TrainState(weights, optimizer.init(weights))
    )
    policy = nnx.merge(graph, state.weights)(features)
    drawn, mean = np.asarray(policy.act(jax.random.key(1))), np.asarray(policy.act(None))
    assert np.abs(drawn).max() <= 1
    near = [np.abs(drawn - np.array([s, -s]) * 0.8).max(-1) < 0.6 for s in (1, -1)]
    if modes == 4:
        assert 0.4 < near[0].mean() < 0.6
        assert 0.4 < near[1].mean() < 0.6
        np.testing.assert_allclose(np.abs(mean), 0.8, atol=0.05)
    else:  # one Gaussian, whatever it is called
        assert (near[0] | near[1]).mean() < 0.6
        np.testing.assert_allclose(mean, 0.0, atol=0.05)


def test_agents_with_a_policy_of_their_own_refuse_it(tiny):
    with pytest.raises(ConfigError, match=r"mixture=3 goes with agents that predict actions; got kind 'td3'; leave"):
        tiny("agent.kind=td3", "agent.mixture=3", 'data.tasks=["walker-walk"]')
