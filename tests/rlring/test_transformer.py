"""The Transformer: sharding changes nothing, and decoding step by step equals one full pass."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rlring import (
    AttentionConfig,
    Mask,
    SparsePattern,
    Transformer,
    TransformerConfig,
    UsageError,
    make_mesh,
    zigzag_order,
)
from rlring.attention import attention
from rlring.feed_forward import rms_norm
from rlring.transformer import Block


def make(scheme="blockwise", **changes):
    attention = AttentionConfig(scheme=scheme, block_q=16, block_k=16)
    config = TransformerConfig(
        **{"width": 32, "layers": 3, "heads": 4, "kv_heads": 2, "attention": attention} | changes
    )
    return Transformer(config, rngs=nnx.Rngs(0))


def tokens(batch=2, length=64, width=32):
    x = jax.random.normal(jax.random.key(1), (batch, length, width))
    position = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    return x, position


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def relative(a, b):
    return float(jnp.abs(a - b).max() / jnp.abs(b).max())


@pytest.mark.parametrize(
    ("ring", "window", "log_scaling"),
    [
        (1, None, False),
        (4, 7, True),
        *(slow(*case) for case in [(1, None, True), (1, 7, True), (4, None, False), (4, None, True)]),
    ],
)
def test_prefill_then_decode_equals_one_full_pass(window, ring, log_scaling):
    mesh = make_mesh(ring=ring) if ring > 1 else None
    model = make("ring" if ring > 1 else "blockwise", log_scaling=log_scaling, qk_norm=log_scaling)
    x, position = tokens()
    segment = jnp.zeros_like(position).at[1, 5:9].set(-1)  # a row with a hole in it
    full = jax.jit(lambda x: model(x, Mask.causal(position, segment, window=window), mesh=mesh))(x)

    prompt = 32
    mask = Mask.causal(position[:, :prompt], segment[:, :prompt], window=window)
    features, cache = jax.jit(lambda x: model.prefill(x, mask, capacity=64, mesh=mesh))(x[:, :prompt])
    assert relative(features, full[:, :prompt]) < 1e-5
    decode = jax.jit(lambda x, p, s, c: model.decode(x, p, s, c, window=window, mesh=mesh))
    for start in range(prompt, 64, 4):
        new = slice(start, start + 4)
        features, cache = decode(x[:, new], position[:, new], segment[:, new], cache)
        assert relative(features, full[:, new]) < 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_takes_the_weights_out_of_the_stack_layer_by_layer(dtype):
    model = make(width=128, layers=8, compute_type=dtype)
    graph, params = nnx.split(model)

    def decode(params, x, position, cache):
        return nnx.merge(graph, params).decode(x, position, jnp.zeros_like(position), cache)

    arrays = params, jnp.ones((1, 1, 128)), jnp.zeros((1, 1), jnp.int32), model.empty_cache(1, capacity=8)
    memory = jax.jit(decode, donate_argnums=3).lower(*arrays).compile().memory_analysis()
    assert memory.temp_size_in_bytes < sum(x.nbytes for x in jax.tree.leaves(params)) / 4


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_row_that_is_not_a_number_spoils_no_other(bad):
    model, (x, position) = make(), tokens(length=6)
    decode = jax.jit(model.decode)
    for row in (0, 1):
        cache = spoiled = model.empty_cache(2, capacity=6)
        for t in range(3):
            new = slice(t, t + 1)
            arrays = position[:, new], jnp.zeros((2, 1), jnp.int32)
            features, cache = decode(x[:, new], *arrays, cache)
            got, spoiled = decode(x[:, new].at[row].set(bad), *arrays, spoiled)
            np.testing.assert_array_equal(got[1 - row], features[1 - row])
            assert np.isnan(got[row]).all()


def test_a_window_bounds_the_cache():
    """A cache little longer than the window, written round and round, gives what the full pass gives."""
    model, window = make(), 7
    x, position = tokens()
    segment = jnp.zeros_like(position)
    full = model(x, Mask.causal(position, segment, window=window))
    cache = model.empty_cache(2, capacity=window + 1)
    decode = jax.jit(lambda x, p, s, c: model.decode(x, p, s, c, window=window))
    for t in range(64):
        features, cache = decode(x[:, t : t + 1], position[:, t : t + 1], segment[:, t : t + 1], cache)
        assert relative(features, full[:, t : t + 1]) < 1e-5


@pytest.mark.parametrize(
    "remat", ["none", *(pytest.param(remat, marks=pytest.mark.slow) for remat in ("attention", "all"))]
)
@pytest.mark.slow
@pytest.mark.parametrize("log_scaling", [True, False])
def test_any_order_of_tokens_on_any_ring_gives_the_same_loss_and_gradients(remat, log_scaling):
    x, position = tokens()
    reference = make(log_scaling=log_scaling, qk_norm=log_scaling)

    def loss(model, x, position, mesh):
        y = model(x, Mask.causal(position), mesh=mesh)
        return jnp.sum(jnp.sin(3 * y) * (1 + position[..., None] % 5).astype(y.dtype)) / y.size

    want, want_gradient = nnx.value_and_grad(loss)(reference, x, position, None)
    for ring in (2, 8):
        model = make("ring", remat=remat, feed_forward_tile=4, log_scaling=log_scaling, qk_norm=log_scaling)
        order = zigzag_order(64, ring)
        mesh = make_mesh(ring=ring)
        got, gradient = nnx.jit(nnx.value_and_grad(loss), static_argnums=3)(
            model, x[:, order], position[:, order], mesh
        )
        assert abs(got - want) < 1e-6
        for leaf, want_leaf in zip(jax.tree.leaves(gradient), jax.tree.leaves(want_gradient), strict=True):
            assert relative(leaf, want_leaf) < 2e-5


@pytest.mark.parametrize("window", [None, 10])
def test_queries_grow_with_the_logarithm_of_what_they_may_see(window):
    """Against the definition: attention that weighs as exp(s * log(n) * q . k / sqrt(H)) of n keys, s of each head."""
    block = Block(
        TransformerConfig(width=32, heads=4, kv_heads=2, log_scaling=True, rope_fraction=0.0), rngs=nnx.Rngs(0)
    )
    block.sharpness[...] = jnp.array([0.1, 0.2, 0.4, 0.8])
    x, position = tokens()
    got, key, _ = block.project(x, Mask.causal(position[:, ::-1], window=window))
    normal = np.asarray(rms_norm(x, block.attention_norm[...]), np.float64)
    plain = np.einsum("btd,dnh->btnh", normal, np.asarray(block.query[...], np.float64))
    seen = np.arange(64, 0, -1) if window is None else np.minimum(np.arange(64, 0, -1), window)
    want = plain * np.outer(np.log(seen), [0.1, 0.2, 0.4, 0.8])[None, :, :, None]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(key, np.einsum("btd,dkh->btkh", normal, np.asarray(block.key[...])), atol=1e-5)


@pytest.mark.parametrize("rope_fraction", [0.0, 0.5])
def test_queries_and_keys_of_one_length(rope_fraction):
    """qk_norm against the definition, in float64, gains included; a rotation changes no length."""
    shape = TransformerConfig(width=32, heads=4, kv_heads=2, qk_norm=True, rope_fraction=rope_fraction)
    block = Block(shape, rngs=nnx.Rngs(0))
    gains = np.random.default_rng(0).uniform(0.5, 2, size=(2, 8))
    block.query_norm[...], block.key_norm[...] = gains.astype(np.float32)
    x, position = tokens()
    got = block.project(x, Mask.causal(position))
    normal = np.asarray(rms_norm(x, block.attention_norm[...]), np.float64)
    for one, weights, gain in zip(got, (block.query, block.key), gains, strict=False):
        plain = np.einsum("btd,dnh->btnh", normal, np.asarray(weights[...], np.float64))
        want = plain / np.sqrt(np.square(plain).mean(-1, keepdims=True) + 1e-6) * gain
        np.testing.assert_allclose(np.linalg.norm(one, axis=-1), np.linalg.norm(want, axis=-1), rtol=1e-5)
        if not rope_fraction:
            np.testing.assert_allclose(one, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("ring", "window"), [(1, 3), slow(4, None), slow(4, (5, 2)), slow(1, None)])
def test_layers_with_a_window_of_their_own(ring, window):
    """As the blocks one by one, each with its mask written out; and prefill and decode as one full pass."""
    mesh = make_mesh(ring=ring) if ring > 1 else None
    how = {"layers": 4, "dense_every": 2, "local_window": 5, "rope_fraction": 0.0, "log_scaling": True}
    model = make("ring" if ring > 1 else "blockwise", **how)
    x, position = tokens()
    mask = Mask.causal(position, window=window)
    local = mask.within(5)
    assert local.window == (3 if window == 3 else (4, 2) if window == (5, 2) else 5)
    graph, blocks = nnx.split(model.blocks)
    want = x
    for n in range(4):
        block, seen = nnx.merge(graph, jax.tree.map(lambda leaf, n=n: leaf[n], blocks)), mask if n % 2 else local
        q, k, v = block.project(want, seen, 0.0 if n % 2 else 1.0)
        want = block.finish(want, attention(q, k, v, seen, config=AttentionConfig("dense")), None)
    want = rms_norm(want, model.norm[...])
    got = jax.jit(lambda x: model(x, mask, mesh=mesh))(x)
    assert relative(got, want) < 1e-5

    @jax.jit
    def last_four(x, position):
        _, cache = model.prefill(x[:, :60], mask.at(position[:, :60]), capacity=64, mesh=mesh)
        now, segment = position[:, 60:], jnp.zeros_like(position[:, 60:])
        return model.decode(x[:, 60:], now, segment, cache, window=window, mesh=mesh)[0]

    assert relative(last_four(x, position), want[:, 60:]) < 1e-5


@pytest.mark.parametrize("length", [slow(0), 13])
def test_lengths_that_a_mesh_does_not_divide(length):
    """Features, gradients, and the cache that begins with such a prompt."""
    model, x, position = make("hybrid", layers=1), *tokens(length=length)
    mesh = make_mesh(ring=2, ulysses=2)

    def run(x, mesh):
        features = model(x, Mask.causal(position), mesh=mesh)
        _, cache = model.prefill(x, Mask.causal(position), capacity=16, mesh=mesh)
        new = jnp.full_like(position, length, shape=(2, 1))
        decoded, _ = model.decode(jnp.ones((2, 1, 32)), new, jnp.zeros_like(new), cache, mesh=mesh)
        return jnp.sum(jnp.sin(features)) + jnp.sum(jnp.sin(decoded)), (features, decoded)

    one, many = (jax.jit(jax.grad(partial(run, mesh=m), has_aux=True))(x) for m in (None, mesh))
    for got, want in zip(jax.tree.leaves(many), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5)


def test_what_does_not_fit_is_refused():
    model, x, position = make(), *tokens(length=4)
    for run in (model, partial(model.prefill, capacity=8)):
        with pytest.raises(UsageError, match=r"needs an rlring.Mask; got None. Where every token sees .* Mask.full"):
            run(x, None)
        with pytest.raises(UsageError, match=r"the mask needs q_position and q_segment \(2, 4\)"):
            run(x, Mask.causal(position[:, :3]))
        with pytest.raises(UsageError, match=r"the batch is split over mesh.data=4 devices; got B=2"):
            run(x, Mask.causal(position), mesh=make_mesh(data=4))
    cache = model.empty_cache(2, capacity=8)
    assert model.decode(x[:, :0], position[:, :0], position[:, :0], cache)[1] is cache
    with pytest.raises(UsageError, match=r"the mask's q_position is an array .* int32 holds; got float32"):
        model.decode(x, position.astype(jnp.float32), position, cache)
    with pytest.raises(UsageError, match=r"the batch is split over mesh.data=4 devices; got B=2"):
        model.empty_cache(2, capacity=8, mesh=make_mesh(data=4))
    with pytest.raises(UsageError, match=r"a cache holds at least one token; got capacity=0"):
        model.empty_cache(2, capacity=0)


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(UsageError, match=r"width 30 does not divide by 4 heads; change one"):
        TransformerConfig(width=30, heads=4)
    with pytest.raises(UsageError, match=r"4 heads do not divide by 3 kv_heads; choose"):
        TransformerConfig(width=32, heads=4, kv_heads=3)

    for every in (1, 2):
        attention = AttentionConfig("sparse", sparse=SparsePattern())
        with pytest.raises(UsageError, match=rf"every dense_every-th of 3 layers is dense; got dense_every={every}"):
            TransformerConfig(layers=3, attention=attention, dense_every=every)
    with pytest.raises(UsageError, match=r"dense_every=3 goes with attention scheme 'sparse' or .* got 'ring' without"):
        TransformerConfig(layers=3, dense_every=3)
    for wrong in ({"dense_every": None}, {"local_window": 0}, {"attention": attention}):
        with pytest.raises(
            UsageError, match=r"local_window, at least 1, goes with dense_every and without .* got local_w"
        ):
            TransformerConfig(**{"layers": 2, "dense_every": 2, "local_window": 4} | wrong)
