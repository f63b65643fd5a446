"""The hops of a ring on one device are the ring: against dense attention, and what they compute against the ring."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlring import AttentionConfig, Mask, attention, zigzag_order
from rlring.attention.blocks import Blocks
from rlring.attention.blockwise import BlockwiseKernel
from rlring.attention.simulated_ring import simulated_ring_attention


@pytest.mark.parametrize("ring", [1, 4])
def test_out_and_gradients(ring):
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, d_out = (jax.random.normal(key, (2, 32, n, 8)) for key, n in zip(keys, (4, 2, 2, 4), strict=True))
    kernel = BlockwiseKernel(Blocks(6, 5, 130))

    @jax.jit
    def in_hops(mask):
        out, pull = jax.vjp(lambda q, k, v: simulated_ring_attention(q, k, v, mask, ring, kernel), q, k, v)
        return out, *pull(d_out)

    @jax.jit
    def dense(mask):
        out, pull = jax.vjp(lambda q, k, v: attention(q, k, v, mask, config=AttentionConfig("dense")), q, k, v)
        return out, *pull(d_out)

    for places in (np.arange(32), zigzag_order(32, 4)):
        mask = Mask.causal(jnp.tile(jnp.asarray(places, jnp.int32), (2, 1)))
        for got, want in zip(in_hops(mask), dense(mask), strict=True):
            assert jnp.abs(got - want).max() <= 1e-5 * jnp.abs(want).max()
