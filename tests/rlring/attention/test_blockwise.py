"""blockwise.py: going on from attention over other keys. What it computes from nothing is in test_contract.py."""

import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlring.attention.blocks import Blocks
from rlring.attention.blockwise import forward
from rlring.attention.mask import Mask
from rlring.attention.score_mod import ScoreMod

BATCH, HEADS, KV_HEADS, QUERIES, KEYS, SIZE = 2, 4, 2, 40, 96, 16


def by_definition(q, k, v, visible):
    """Returns out and lse in float64; visible[B, T, S]."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, HEADS // KV_HEADS, axis=2) for x in (k, v))
    scores = np.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(SIZE)
    scores = np.where(visible[:, None], scores, -np.inf)
    top = scores.max(-1, keepdims=True)
    top = np.where(np.isfinite(top), top, 0.0)
    weights = np.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = (np.log(total) + top)[..., 0]
    return np.einsum("bnts,bsnh->btnh", weights / np.where(total == 0, 1, total), v), lse


BLOCKS = (Blocks(16, 16, 2**20), Blocks(16, 16, 512), Blocks(12, 20, 2**20), Blocks(64, 64, 1))
QUICK = ((True, BLOCKS[1]), (True, BLOCKS[2]), (False, BLOCKS[0]))


@pytest.mark.parametrize(
    ("is_causal", "blocks"),
    [
        case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow)
        for case in itertools.product((True, False), BLOCKS)
    ],
)
@pytest.mark.parametrize("growth", [1.0, 100.0, 0.01])
def test_going_on_is_attention_over_all(blocks, growth, is_causal):
    """Later scores that are far above, or far below, the lse so far; and queries that saw nothing until then."""
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (BATCH, QUERIES, HEADS, SIZE))
    k, v = (jax.random.normal(key, (BATCH, KEYS, KV_HEADS, SIZE)) for key in keys[1:])
    k = k * jnp.where(jnp.arange(KEYS) < 48, 1.0, growth)[None, :, None, None]
    positions = jnp.tile(jnp.arange(KEYS, dtype=jnp.int32), (BATCH, 1))
    # The queries of the first sequence are in the second half of it, and packed apart from some of its keys.
    segments = jnp.where((positions < 60) & (jnp.arange(BATCH)[:, None] == 0), 0, 1).astype(jnp.int32)
    mask = Mask(
        q_position=positions[:, -QUERIES:], k_position=positions, q_segment=segments[:, -QUERIES:], k_segment=segments,
        is_causal=is_causal,
    )  # fmt: skip
    total, mod = None, ScoreMod.plain(SIZE)
    for start, stop in ((0, 48), (48, 50), (50, 96)):
        here = replace(mask, k_position=positions[:, start:stop], k_segment=segments[:, start:stop])
        total = jax.jit(forward, static_argnums=5)(q, k[:, start:stop], v[:, start:stop], here, mod, blocks, total)
    out, lse = by_definition(q, k, v, np.asarray(mask.visible()))
    whole = total.whole()
    np.testing.assert_allclose(whole.out, out, atol=2e-6 * max(1.0, growth))
    np.testing.assert_allclose(whole.lse, lse, rtol=2e-6, atol=2e-6)


def test_after_everything_comes_nothing():
    q = k = jnp.ones((1, 20, 1, 4))
    seen = Mask.causal(jnp.arange(20, dtype=jnp.int32)[None])
    blocks, mod = Blocks(8, 8, 2**20), ScoreMod.plain(4)
    total = forward(q, k, k, seen, mod, blocks)
    unseen = replace(seen, k_segment=jnp.full((1, 20), -1, jnp.int32))
    again = forward(q, k, k, unseen, mod, blocks, total)
    for a, b in zip(again, total, strict=True):
        np.testing.assert_array_equal(a, b)
    nothing = forward(q, k, k, unseen, mod, blocks).whole()
    np.testing.assert_array_equal(nothing.out, jnp.zeros(q.shape))
    np.testing.assert_array_equal(nothing.lse, jnp.full((1, 1, 20), -jnp.inf))
