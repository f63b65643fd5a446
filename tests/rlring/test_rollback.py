"""Speculative decoding on a sharded cache: several tokens at once, of which each row takes back its own share."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rlring import (
    AttentionConfig,
    BlockMask,
    FunctionMask,
    Mask,
    SparsePattern,
    Transformer,
    TransformerConfig,
    UsageError,
    make_mesh,
)

ROWS, LENGTH, WIDTH, PROPOSED = 4, 40, 32, 4
PROMPTS = np.array([9, 1, 5, 0])  # tokens
MESHES = [None, {"ring": 4}, {"data": 2, "ring": 2, "ulysses": 2}]
POSITION = np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1))
X = np.random.default_rng(0).normal(size=(ROWS, LENGTH, WIDTH)).astype(np.float32)


def make(layers=2, **changes) -> Transformer:
    shape = {"width": WIDTH, "layers": layers, "heads": 4, "kv_heads": 2, "attention": AttentionConfig("all_gather")}
    return Transformer(TransformerConfig(**shape | changes), rngs=nnx.Rngs(0))


def begun(model, *, capacity, mesh=None, window=None):
    """A cache with a prompt of another length in each row, padded on the right."""
    longest = int(PROMPTS.max())
    segment = np.where(POSITION[:, :longest] < PROMPTS[:, None], 0, -1)
    mask = Mask.causal(jnp.asarray(POSITION[:, :longest]), segment, window)
    return jax.jit(lambda x: model.prefill(x, mask, capacity=capacity, mesh=mesh)[1])(X[:, :longest])


def taken(x, start, n=PROPOSED):
    """The next n of each row."""
    place = np.minimum(start[:, None] + np.arange(n), LENGTH - 1)
    return np.take_along_axis(x, place.reshape(*place.shape, *(1,) * (x.ndim - 2)), 1)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("mesh", "window", "capacity"),
    [
        (None, 7, 12),
        slow(None, None, LENGTH + 4),
        ({"ring": 4}, 7, 12),
        slow({"ring": 4}, None, LENGTH + 4),
        slow({"data": 2, "ring": 2, "ulysses": 2}, 7, 12),
        slow({"data": 2, "ring": 2, "ulysses": 2}, None, LENGTH + 4),
    ],
    ids=str,
)
def test_speculative_decoding_is_one_full_pass(mesh, window, capacity):
    """Each step proposes 4 tokens in each row, of which the first few are right. With a
    window the slots, hardly more than are needed, go round."""
    model, mesh, random = make(), make_mesh(**mesh) if mesh else None, np.random.default_rng(1)
    full = np.asarray(jax.jit(lambda x: model(x, Mask.causal(POSITION, window=window), mesh=mesh))(X))
    cache, done = begun(model, capacity=capacity, mesh=mesh, window=window), PROMPTS.copy()

    @partial(jax.jit, donate_argnums=3)
    def step(x, position, segment, cache, rejected):
        features, cache = model.decode(x, position, segment, cache, window=window, mesh=mesh)
        return features, cache.rolled_back(rejected, mesh=mesh)

    while (done < LENGTH).any():
        there = np.clip(LENGTH - done, 0, PROPOSED)
        accepted = random.integers(0, there + 1)
        place = np.arange(PROPOSED)
        proposed = np.where((place < accepted[:, None])[..., None], taken(X, done), 100.0)
        segment = np.where(place < there[:, None], 0, -1).astype(np.int32)
        features, cache = step(proposed, done[:, None] + place.astype(np.int32), segment, cache, there - accepted)
        right, is_accepted = taken(full, done), place < accepted[:, None]
        np.testing.assert_allclose(features[is_accepted], right[is_accepted], atol=1e-5)
        done += accepted


@pytest.mark.parametrize("mesh", [None, slow({"ring": 4}), slow({"data": 2, "ring": 2, "ulysses": 2})], ids=str)
def test_as_if_they_had_never_been_written(mesh):
    """To the last bit: what the slots hold, and all that follows. What is taken back may be NaN."""
    model, mesh = make(layers=1), make_mesh(**mesh) if mesh else None
    never = begun(model, capacity=16, mesh=mesh)
    decode = jax.jit(lambda x, p, s, c: model.decode(x, p, s, c, mesh=mesh))
    back = jax.jit(lambda cache, n: cache.rolled_back(n, mesh=mesh))
    zero = np.zeros((ROWS, PROPOSED), np.int32)
    _, cache = decode(taken(X, PROMPTS + 9) * np.nan, taken(POSITION, PROMPTS), zero, never)
    back_once = back(cache, np.full(ROWS, PROPOSED))
    back_twice = back(back(cache, np.array([1, 4, 0, 3])), np.array([3, 0, 4, 1]))
    for rolled in (back_once, back_twice):
        assert jax.tree.all(jax.tree.map(np.array_equal, rolled, never))
        arguments = taken(X, PROMPTS), taken(POSITION, PROMPTS), zero
        got, want = (decode(*arguments, one)[0] for one in (rolled, never))
        np.testing.assert_array_equal(got, want)
    everything = back(cache, np.full(ROWS, 99))
    first = X[:, :3], POSITION[:, :3], zero[:, :3]
    np.testing.assert_array_equal(
        decode(*first, everything)[0], decode(*first, model.empty_cache(ROWS, capacity=16, mesh=mesh))[0]
    )


def test_what_is_lost_is_seen():
    """Too few slots: 4 tokens took the place of 4 that are in the window again once they are taken back."""
    model, x = make(layers=1), X[:, :20]
    decode = jax.jit(lambda x, p, s, c: model.decode(x, p, s, c, window=7))
    for capacity, is_right in ((9, False), (10, True)):
        cache = model.empty_cache(ROWS, capacity=capacity)
        for start in range(0, 16, 4):
            new = slice(start, start + 4)
            _, cache = decode(x[:, new], POSITION[:, new], POSITION[:, new] * 0, cache)
        features, _ = decode(x[:, 12:13], POSITION[:, 12:13], POSITION[:, :1] * 0, cache.rolled_back(np.full(ROWS, 4)))
        assert np.isfinite(features).all() == is_right
        assert np.isnan(features).all() != is_right


def prefix(q, k, q_segment, k_segment, length):
    return (k <= q) | (k < length)


def dilated(q, k, q_segment, k_segment):
    return (q_segment == k_segment) & (q >= k) & ((q - k) % 3 == 0)


TABLE = np.tril(np.random.default_rng(2).random((10, 10)) < 0.5)
RULES = {
    "prefix": lambda p: FunctionMask.of(prefix, p, operands=(jnp.array([8, 3, 0, 5]),)),
    "dilated": lambda p: FunctionMask.of(dilated, p),
    "blocks": lambda p: BlockMask.of(Mask.causal(p), TABLE, block_size=4),
}


@pytest.mark.parametrize(
    ("rule", "mesh"),
    [
        ("prefix", {"ring": 4}),
        *(slow(rule, mesh) for rule in RULES for mesh in MESHES if (rule, mesh) != ("prefix", {"ring": 4})),
    ],
    ids=str,
)
def test_one_mask_trains_reads_the_prompt_and_decodes(rule, mesh):
    """The rule of one mask object, in the full pass, in prefill and on the sharded cache."""
    model, mesh = make(), make_mesh(**mesh) if mesh else None
    mask, prompt = RULES[rule](jnp.asarray(POSITION)), 12
    full = jax.jit(lambda x, mask: model(x, mask, mesh=mesh))(X, mask)
    prefill = jax.jit(lambda x, mask: model.prefill(x, mask, capacity=LENGTH, mesh=mesh))
    features, cache = prefill(X[:, :prompt], mask.at(POSITION[:, :prompt]))
    np.testing.assert_allclose(features, full[:, :prompt], atol=1e-5)
    decode = jax.jit(lambda x, p, s, c, mask: model.decode(x, p, s, c, mask=mask, mesh=mesh))
    for start in range(prompt, LENGTH, 4):
        new = slice(start, start + 4)
        features, cache = decode(X[:, new], POSITION[:, new], POSITION[:, new] * 0, cache, mask)
        np.testing.assert_allclose(features, full[:, new], atol=1e-5)
    # Beyond the last slot one token takes the place of another that later ones may see: only what does not is right.
    features, _ = decode(X[:, :4], POSITION[:, :4] + LENGTH, POSITION[:, :4] * 0, cache, mask)
    assert np.isnan(features).all()


def test_refusals():
    model = make(layers=1)
    cache = model.empty_cache(ROWS, capacity=16)
    with pytest.raises(UsageError, match=r"for each of its 4 rows, from 0 on; got a list"):
        cache.rolled_back([1, 2, 3, 4])
    wrong = ([1, 2], r"int\d+\[2\]"), ([1.0] * 4, r"float\d+\[4\]"), ([0, 0, -1, 0], r"int\d+\[4\] with -1")
    for tokens, got in wrong:
        with pytest.raises(UsageError, match=rf"number of tokens for each of its 4 rows, from 0 on; got {got}"):
            cache.rolled_back(np.array(tokens))
    one = jnp.asarray(X[:, :1]), POSITION[:, :1], POSITION[:, :1] * 0
    with pytest.raises(UsageError, match=r"window of new tokens is that of their mask; got window=3"):
        model.decode(*one, cache, window=3, mask=Mask.causal(POSITION))
    pattern = AttentionConfig("sparse", sparse=SparsePattern(4, 2, 4))
    for sparse in (make(attention=pattern), make(attention=pattern, dense_every=2)):
        cache = sparse.empty_cache(ROWS, capacity=16)
        with pytest.raises(UsageError, match=r"a cache with sparse layers cannot be rolled back: .* Keep the cache"):
            cache.rolled_back(np.zeros(ROWS, int))
        with pytest.raises(UsageError, match=r"'sparse' needs a causal mask .*; got a mask of a function"):
            sparse.decode(*one, cache, mask=RULES["dilated"](POSITION))
