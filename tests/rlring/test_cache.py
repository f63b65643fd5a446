"""cache.py, sparse_cache.py: decoding step by step is one full pass, in no more memory than what is still seen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rlring import AttentionConfig, Mask, SparsePattern, Transformer, TransformerConfig, UsageError, make_mesh
from rlring.attention import attention
from rlring.transformer import rms_norm

LENGTH, WIDTH = 64, 32
PATTERN = SparsePattern(block=4, local_blocks=2, stride=4)


def make(pattern=PATTERN, **changes) -> Transformer:
    chosen = AttentionConfig("sparse", 16, 16, sparse=pattern) if pattern else AttentionConfig("blockwise", 16, 16)
    shape = {"width": WIDTH, "layers": 2, "heads": 4, "kv_heads": 2, "attention": chosen} | changes
    return Transformer(TransformerConfig(**shape), rngs=nnx.Rngs(0))


def tokens(length=LENGTH, batch=2):
    x = jax.random.normal(jax.random.key(1), (batch, length, WIDTH))
    return x, jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))


def relative(a, b):
    return float(jnp.abs(a - b).max() / jnp.abs(b).max())


def layouts() -> tuple[jax.Array, jax.Array]:
    """Position and segment of every token, each row another way."""
    _, (position, *_) = tokens()
    zero = jnp.zeros_like(position)
    rows = {
        "plain": (position, zero),
        "from elsewhere": (position + 1001, zero),
        "with holes": (position, zero.at[5:9].set(-1).at[40].set(-1)),
        "begins later": (jnp.maximum(position - 13, 0), jnp.where(position < 13, -1, 3)),
        "packed": (position % 20, position // 20),
        "packed, numbered backwards": (position % 24, 5 - position // 24),
        "with gaps": (position + position // 8, zero),
        "empty": (position, zero - 1),
    }
    return tuple(jnp.stack(x) for x in zip(*rows.values(), strict=True))


def check_decoding(model, position, segment, *, prompt=32, step=4, mesh=None, window=None, capacity=80):
    """Prefill, then decode to the end: the features are those of a full pass. Returns the cache."""
    batch = position.shape[0]
    x, _ = tokens(batch=batch)
    full = jax.jit(lambda x: model(x, Mask.causal(position, segment, window), mesh=mesh))(x)
    if prompt:
        mask = Mask.causal(position[:, :prompt], segment[:, :prompt], window)
        prefill = jax.jit(lambda x: model.prefill(x, mask, capacity=capacity, mesh=mesh))
        features, cache = prefill(x[:, :prompt])
        assert relative(features, full[:, :prompt]) < 1e-5
    else:
        cache = model.empty_cache(batch, capacity=capacity, mesh=mesh)
    decode = jax.jit(lambda x, p, s, c: model.decode(x, p, s, c, window=window, mesh=mesh), donate_argnums=3)
    for start in range(prompt, LENGTH, step):
        new = slice(start, start + step)
        features, cache = decode(x[:, new], position[:, new], segment[:, new], cache)
        assert relative(features, full[:, new]) < 1e-5
    return cache


@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_sparse_decoding_equals_one_full_pass(step):
    check_decoding(make(), *layouts(), step=step)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pattern", "step"),
    [
        (SparsePattern(4, 1, 5, offset=2), 4),
        (SparsePattern(1, 1, 2), 1),
        (SparsePattern(3, 2, 3), 1),
        (SparsePattern(8, 40, 8), 8),  # all near
        (SparsePattern(4, 1, 1), 2),  # all strided
        (SparsePattern(4, 2, 1000, offset=1), 4),  # nothing far
    ],
    ids=str,
)
def test_every_pattern_from_the_first_token(pattern, step):
    _, position = tokens()
    check_decoding(make(pattern, layers=1), position, jnp.zeros_like(position), prompt=0, step=step)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "kv_heads"),
    [(None, 2), ({"data": 2, "ulysses": 2}, 2), ({"ulysses": 4}, 2), ({"data": 2, "ulysses": 2}, 1)],
    ids=str,
)
def test_on_a_mesh_with_dense_layers(mesh, kv_heads):
    """Also where there are more devices than key/value heads."""
    model = make(dense_every=2, kv_heads=kv_heads)
    cache = check_decoding(model, *layouts(), mesh=make_mesh(**mesh) if mesh else None)
    slots = 3 * 4 + 6 * 4  # near, and of the 21 blocks that 80 positions can touch every fourth
    assert [key.shape for key in cache.key] == [(8, kv_heads, slots, 8), (8, kv_heads, 80, 8)]


@pytest.mark.slow
@pytest.mark.parametrize(("remat", "mesh"), [("none", {"ulysses": 2}), ("attention", None), ("all", None)], ids=str)
def test_dense_layers_between_sparse_ones(mesh, remat):
    """The one scan over groups of layers is a loop over layers, features and gradients."""
    model = make(layers=4, dense_every=2, remat=remat)
    mesh = make_mesh(**mesh) if mesh else None
    x, position = tokens()
    graph, params = nnx.split(model)

    def loop(params, x):
        """Layer after layer, every second of scheme dense."""
        model, mask = nnx.merge(graph, params), Mask.causal(position)
        block_graph, blocks = nnx.split(model.blocks)
        for n in range(4):
            block = nnx.merge(block_graph, jax.tree.map(lambda p, n=n: p[n], blocks))
            config = AttentionConfig("dense") if n % 2 else model.config.attention
            attended = attention(*block.project(x, mask), mask, config=config)
            x = block.finish(x, attended, mesh=None)
        return rms_norm(x, model.norm[...])

    def scan(params, x):
        return nnx.merge(graph, params)(x, Mask.causal(position), mesh=mesh)

    def loss(run):
        return jax.jit(jax.value_and_grad(lambda params, x: jnp.sum(jnp.sin(3 * run(params, x))), argnums=(0, 1)))

    want, want_gradients = loss(loop)(params, x)
    got, gradients = loss(scan)(params, x)
    assert abs(got - want) < 1e-5 * abs(want)
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(want_gradients), strict=True):
        assert relative(a, b) < 2e-5
    scans = [equation for equation in jax.make_jaxpr(scan)(params, x).eqns if equation.primitive.name == "scan"]
    assert [equation.params["length"] for equation in scans] == [2]


def test_a_sparse_cache_holds_what_is_still_seen():
    """At 64K tokens: near and a share of 1 / stride, not the capacity, and so the compiler says."""
    capacity, pattern = 2**16, SparsePattern(64, 16, 8)
    model = make(pattern)
    cache = jax.eval_shape(lambda: model.empty_cache(1, capacity=capacity))
    token = 2 * 2 * 2 * 8 * 4  # layers, key and value, heads, head size, bytes
    held = sum(x.size * x.dtype.itemsize for x in (*cache.key, *cache.value))
    assert held <= token * (17 * 64 + capacity // 8 + 64)
    everything = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
    dense = jax.eval_shape(lambda: make(None).empty_cache(1, capacity=capacity))
    assert everything < sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(dense)) / 6


@pytest.mark.parametrize(
    ("pattern", "batch", "mesh"),
    [
        (None, 1, None),
        pytest.param(None, 3, None, marks=pytest.mark.slow),
        pytest.param(None, 1, {"ulysses": 2}, marks=pytest.mark.slow),
        (SparsePattern(64, 16, 8), 1, None),
    ],
    ids=str,
)
def test_a_step_copies_neither_cache_nor_weights(pattern, batch, mesh):
    """With the old cache donated, compiled temporary memory is far below it, and below the weights."""
    model = make(pattern, layers=6, kv_heads=1, width=64, feed_forward=256)
    mesh = make_mesh(**mesh) if mesh else None
    graph, params = nnx.split(model)

    def decode(params, x, position, cache):
        return nnx.merge(graph, params).decode(x, position, jnp.zeros_like(position), cache, mesh=mesh)

    cache = model.empty_cache(batch, capacity=2**14, mesh=mesh)
    x, position = jnp.ones((batch, 1, 64)), jnp.full((batch, 1), 5, jnp.int32)
    compiled = jax.jit(decode, donate_argnums=3).lower(params, x, position, cache).compile()
    memory = compiled.memory_analysis()
    held, weights = (sum(x.nbytes for x in jax.tree.leaves(tree)) for tree in (cache, params))
    devices = 1 if mesh is None else mesh.size
    scores = batch * 4 * 2**14 * 4 // devices  # of one layer's heads, float32, maybe twice, and the mask
    assert memory.temp_size_in_bytes < weights / 2 + 4 * scores
    assert memory.temp_size_in_bytes < held / devices / 2
    shape = ",".join(map(str, cache.key[0].addressable_shards[0].data.shape))
    copies = [line for line in compiled.as_text().splitlines() if f"f32[{shape}]" in line and " copy(" in line]
    assert not copies


def test_what_would_be_wrong_is_seen():
    """Not a number, from then on."""
    model = make(layers=1)
    x, position = tokens()
    zero = jnp.zeros_like(position)
    prefill = jax.jit(lambda x, position: model.prefill(x, Mask.causal(position), capacity=40)[1])
    decode = jax.jit(model.decode)

    def after(cache, positions, segment=zero):
        for n, token in enumerate(positions):
            features, cache = decode(x[:, n : n + 1], zero[:, :1] + token, segment[:, :1], cache)
        return features

    right = prefill(x[:, :32], position[:, :32])
    assert np.isfinite(after(right, range(32, 40))).all()
    assert np.isnan(after(right, range(32, 64))).all()  # beyond the capacity
    assert np.isnan(after(right, [32, 33, 33])).all()  # twice the same
    for wrong in (position // 2, position * 2, position[:, ::-1]):
        assert np.isnan(after(prefill(x[:, :32], wrong[:, :32]), [64])).all()
    # A step whose tokens are of two segments, and the second takes what the first one sees.
    features, _ = decode(x[:, :2], jnp.array([[32, 0]] * 2), jnp.array([[0, 1]] * 2), right)
    assert np.isnan(features).all()


QUICK = ((None, 4, 16), (None, 4, 13), ({"ring": 4}, 4, 14), ({"data": 2, "ulysses": 2}, 1, None))


@pytest.mark.parametrize(
    ("mesh", "step", "window"),
    [
        (mesh, *steps) if (mesh, *steps) in QUICK else pytest.param(mesh, *steps, marks=pytest.mark.slow)
        for mesh in (None, {"ring": 4}, {"data": 2, "ulysses": 2})
        for steps in ((1, None), (4, None), (4, 16), (4, 14), (4, 13))
    ],
    ids=str,
)
def test_a_dense_cache_forgets_nothing_in_silence(step, window, mesh):
    """In 16 slots: every token that does not see what the slots held no longer is right, the others are NaN."""
    model, mesh = make(None, layers=1), make_mesh(**mesh) if mesh else None
    x, position = tokens(32)
    segment = jnp.zeros_like(position)
    full = model(x, Mask.causal(position, segment, window))
    decode = jax.jit(lambda x, p, s, c: model.decode(x, p, s, c, window=window, mesh=mesh))
    cache, found = model.empty_cache(2, capacity=16, mesh=mesh), []
    for start in range(0, 32, step):
        new = slice(start, start + step)
        features, cache = decode(x[:, new], position[:, new], segment[:, new], cache)
        found.append(features)
    got, place = jnp.concatenate(found, 1), jnp.arange(32)
    held = place // step * step + step - 16  # the first token still there
    is_right = held <= jnp.maximum(0, place - (window or 32) + 1)
    np.testing.assert_allclose(got[:, is_right], full[:, is_right], atol=1e-5)
    assert np.isnan(got[:, ~is_right]).all()
    assert is_right.all() == (window == 13)


def test_a_row_that_waits_loses_nothing():
    """While another one goes on past the last slot."""
    model = make(None, layers=1)
    x, position = tokens(24)
    decode = jax.jit(model.decode)
    cache = alone = model.empty_cache(2, capacity=8)
    for t in range(16):
        waits = 4 <= t < 14
        segment = jnp.array([[t // 8], [-1 if waits else 0]])
        features, cache = decode(x[:, t : t + 1], position[:, t : t + 1] % 8, segment, cache)
        assert np.isfinite(features).all()
        if not waits:
            expected, alone = decode(
                x[:, t : t + 1], position[:, t : t + 1] % 8, segment[1:] * jnp.ones((2, 1), int), alone
            )
            np.testing.assert_allclose(features[1], expected[1], atol=1e-6)


def test_dense_steps_may_cross_the_end():
    """Three tokens at a time in a cache of 16 slots, of which a window of 7 sees some."""
    _, position = tokens()
    check_decoding(make(None), position, jnp.zeros_like(position), prompt=4, step=3, window=7, capacity=16)


def test_refusals():
    model = make()
    x, position = tokens()
    with pytest.raises(UsageError, match=r"a cache of 32 slots cannot hold a prompt of 64 tokens; raise its capacity"):
        model.prefill(x, Mask.causal(position), capacity=32)
    cache = model.empty_cache(2, capacity=64)
    with pytest.raises(UsageError, match=r"have blocks of 4 cannot take 5 tokens at a time; decode fewer"):
        model.decode(x[:, :5], position[:, :5], position[:, :5], cache)
    with pytest.raises(UsageError, match=r"causal mask without a window; got is_causal=True, window=3"):
        model.decode(x[:, :1], position[:, :1], position[:, :1], cache, window=3)
    dense = make(None)
    with pytest.raises(UsageError, match=r"a cache of 10 slots cannot take 11 tokens at a time; decode fewer"):
        dense.decode(x[:, :11], position[:, :11], position[:, :11], dense.empty_cache(2, capacity=10))
    with pytest.raises(UsageError, match=r"split over 4 devices; got capacity=10. Use a multiple of 4"):
        dense.empty_cache(2, capacity=10, mesh=make_mesh(ring=4))
