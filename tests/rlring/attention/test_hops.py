"""The hops of a ring on one device are the ring: against dense attention, and what they compute against the ring."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlring import AttentionConfig, Mask, attention, zigzag_order
from rlring.attention.blocks import Blocks
from rlring.attention.blockwise import BlockwiseKernel
from rlring.attention.hops import attention_in_hops


@pytest.mark.parametrize("ring", [1, 4])
@pytest.mark.parametrize("order", ["natural", "zigzag"])
def test_out_and_gradients(ring, order):
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, d_out = (jax.random.normal(key, (2, 32, n, 8)) for key, n in zip(keys, (4, 2, 2, 4), strict=True))
    places = np.arange(32) if order == "natural" else zigzag_order(32, 4)
    mask = Mask.causal(jnp.tile(jnp.asarray(places, jnp.int32), (2, 1)))
    kernel = BlockwiseKernel(Blocks(6, 5, 130))

    def in_hops(q, k, v):
        return attention_in_hops(q, k, v, mask, ring, kernel)

    def dense(q, k, v):
        return attention(q, k, v, mask, config=AttentionConfig("dense"))

    def both(function):
        out, pull = jax.vjp(function, q, k, v)
        return out, *pull(d_out)

    for got, want in zip(jax.jit(lambda: both(in_hops))(), jax.jit(lambda: both(dense))(), strict=True):
        assert jnp.abs(got - want).max() <= 1e-5 * jnp.abs(want).max()
