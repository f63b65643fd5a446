"""The recurrent agent: a step at a time is the whole at once, and what it may not see it does not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from agents.agent import Scales
from agents.cli import ConfigError
from agents.evaluate import evaluate, load_agent
from agents.gated_delta import CHUNK, GatedDelta
from agents.registry import make_agent
from agents.results import read_results
from data import ChainSampler, TrajectoryStore

RECURRENT = "agent.kind=recurrent"


def recurrent(cell: str) -> tuple[str, ...]:
    return (RECURRENT,) if cell == "gru" else (RECURRENT, f"agent.cell={cell}")


@pytest.fixture(params=["gru", "delta"])
def loaded(request, trained, dataset):
    """The agent, its weights, and two chains of four trajectories."""
    _, agent, params, *_ = load_agent(trained(*recurrent(request.param)))
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


def token_by_token(weights, x, begins, is_real, state):
    """What the gated delta rule reads [B, T, N H], and its last state: the paper's recurrence, literally."""
    B, N, H, _ = state.shape

    def heads(name, x):
        return jax.nn.silu(x @ weights[name]["kernel"]).reshape(B, N, H)

    def gate(name, x):
        return jax.nn.sigmoid(x @ weights[name]["kernel"] + weights[name]["bias"])[..., None, None]

    def step(S, token):
        x, begins, is_real = token
        q, k = (y / jnp.sqrt(jnp.sum(y * y, -1, keepdims=True) + 1e-6) for y in (heads("query", x), heads("key", x)))
        v, a, b = heads("value", x), gate("keep", x), gate("write", x)
        before = jnp.where(begins[:, None, None, None], 0.0, S)
        k_k, k_v = k[..., None] * k[..., None, :], k[..., None] * v[..., None, :]
        after = a * (jnp.eye(H) - b * k_k) @ before + b * k_v
        o = jnp.einsum("bnkv,bnk->bnv", after, q)
        y = o / jnp.sqrt(jnp.mean(o * o, -1, keepdims=True) + 1e-6) * weights["norm"]["scale"] * heads("gate", x)
        return jnp.where(is_real[:, None, None, None], after, S), y.reshape(B, N * H)

    S, y = jax.lax.scan(step, state, (x.swapaxes(0, 1), begins.T, is_real.T))
    return y.swapaxes(0, 1), S


def weighed(y, state, toward):
    """A number that depends on every output."""
    return jnp.sum(y * toward[0]) + jnp.sum(state * toward[1]), (y, state)


@jax.jit
def exact(weights, x, state, begins, is_real, toward):
    """Gradients and outputs of the recurrence; called with float64."""

    def loss(weights, x, state):
        return weighed(*token_by_token(weights, x, begins, is_real, state), toward)

    return jax.grad(loss, (0, 1, 2), has_aux=True)(weights, x, state)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 1000])
def test_gated_delta_in_chunks_is_the_rule_token_by_token(length):
    """Outputs and gradients in float32 against float64; chains that begin anywhere, tokens that are not there."""
    rng = np.random.default_rng(length)
    graph, params = nnx.split(GatedDelta(6, 2, rngs=nnx.Rngs(0)))
    params = jax.tree.map(lambda w: w + 0.1 * rng.standard_normal(w.shape, np.float32), params)
    params.keep.bias[...] = params.keep.bias[...] - 6.0  # a state forgets 5 % a token
    x = rng.standard_normal((2, length, 6), np.float32)
    begins, is_real = rng.random((2, length)) < 0.02, rng.random((2, length)) < 0.9
    state = rng.standard_normal((2, 2, 12, 12), np.float32)
    real = is_real[..., None].astype(np.float32)
    toward = rng.standard_normal((2, length, 24), np.float32) * real, rng.standard_normal(state.shape, np.float32)

    def loss(params, x, state):
        return weighed(*nnx.merge(graph, params).read(x, begins, is_real, state), toward)

    got, (y, after) = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(params, x, state)
    weights = jax.tree.map(np.asarray, nnx.to_pure_dict(params))

    def longest(array):  # one program for all lengths
        return np.pad(array, [(0, 0), (0, 1000 - length)] + [(0, 0)] * (array.ndim - 2))

    inputs = weights, longest(x), state, longest(begins), longest(is_real), (longest(toward[0]), toward[1])
    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
        inputs = jax.tree.map(lambda a: a.astype(np.float64) if a.dtype == np.float32 else a, inputs)
        (of_weights, of_x, of_state), (y_exact, after_exact) = jax.tree.map(np.asarray, exact(*inputs))
    np.testing.assert_allclose(np.asarray(y) * real, y_exact[:, :length] * real, atol=1e-4)
    np.testing.assert_allclose(after, after_exact, atol=1e-5)
    own = jax.tree.leaves((nnx.to_pure_dict(got[0]), *got[1:]))
    for one, want in zip(own, jax.tree.leaves((of_weights, of_x[:, :length], of_state)), strict=True):
        np.testing.assert_allclose(one, want, atol=2e-5 * max(1.0, np.abs(want).max()))


def test_the_state_of_the_map_is_the_keys_and_values_of_64_trajectories(tiny):
    config = tiny(*recurrent("delta"), "model.width=128", "model.heads=4")
    agent = make_agent(config, Scales(np.zeros(4), np.ones(4), 1.0), 2, 16, None)
    state = jax.eval_shape(lambda key: agent.network(key).initial_state(1), jax.random.key(0))
    assert sum(leaf.size for leaf in state) == 64 * 16 * 2 * (2 * 128) == 524_288


def test_the_backward_keeps_states_between_chunks_alone():
    """16,384 tokens of the map's width, forward and backward, in 1.5 times the states."""
    graph, params = nnx.split(nnx.eval_shape(lambda: GatedDelta(128, 4, rngs=nnx.Rngs(0))))
    tokens = jax.ShapeDtypeStruct((4, 4096, 128), np.float32)

    def loss(params, x):
        everywhere = jnp.ones(x.shape[:2], bool)
        cell = nnx.merge(graph, params)
        return jnp.sum(cell.read(x, ~everywhere, everywhere, cell.initial_state(len(x)))[0])

    compiled = jax.jit(jax.grad(loss)).lower(params, tokens).compile()
    states = 4096 // CHUNK * 4 * 4 * 256 * 256 * 4
    assert compiled.memory_analysis().temp_size_in_bytes < 1.5 * states


@pytest.mark.parametrize("cell", ["gru", "delta"])
def test_it_is_evaluated_like_any_other(trained, cell):
    folder = trained(*recurrent(cell))
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


def test_a_cell_is_of_the_recurrent_agent_alone(tiny):
    with pytest.raises(ConfigError, match=r"cell 'delta' goes with kind 'recurrent'; got kind 'bc'; leave it out"):
        tiny("agent.kind=bc", "agent.cell=delta")
    with pytest.raises(ConfigError, match=r"'agent.cell': Input should be 'delta'; got 'lstm'"):
        tiny(RECURRENT, "agent.cell=lstm")
