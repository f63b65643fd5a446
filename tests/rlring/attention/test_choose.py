"""choose.py: the rule, and that what it chooses runs on every mesh."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlring.attention import AttentionConfig, Mask, attention
from rlring.attention.choose import GATHERED_BYTES, choose_scheme
from rlring.mesh import make_mesh

SMALL = {"length": 4096, "heads": 8, "kv_heads": 2, "head_size": 64, "itemsize": 2, "batch": 1}
TOO_LONG = GATHERED_BYTES // (2 * 2 * 64 * 6) + 1


@pytest.mark.parametrize(
    ("scheme", "changed", "ring", "ulysses"),
    [
        ("blockwise", {}, 1, 1),
        ("blockwise", {"length": 2**24}, 1, 1),
        ("all_gather", {}, 8, 1),
        ("all_gather", {"length": TOO_LONG - 1}, 8, 1),
        ("ring", {"length": TOO_LONG}, 8, 1),
        ("ring", {"batch": 2, "length": TOO_LONG // 2 + 1}, 8, 1),
        ("ulysses", {"length": 2**24}, 1, 8),
        ("hybrid", {"length": 2**24}, 4, 8),
        ("all_gather", {"heads": 6}, 1, 4),
        ("all_gather", {"heads": 6, "length": 2**24}, 2, 4),
        ("all_gather", {"heads": 12, "kv_heads": 3}, 1, 2),
    ],
)
def test_the_rule(scheme, changed, ring, ulysses):
    assert choose_scheme(**SMALL | changed, ring=ring, ulysses=ulysses) == scheme


@pytest.mark.parametrize(
    "mesh", [{}, {"ring": 4}, {"ulysses": 2}, {"ring": 2, "ulysses": 2}, {"data": 2, "ulysses": 4}]
)
def test_auto_is_exact_on_every_mesh(mesh):
    q, k, v = (jax.random.normal(key, (2, 32, 6, 8)) for key in jax.random.split(jax.random.key(0), 3))
    mask = Mask.causal(jnp.tile(jnp.arange(32, dtype=jnp.int32), (2, 1)))
    mesh = make_mesh(**mesh) if mesh else None  # six heads do not divide over four devices

    def gradients(config, mesh=None):
        run = partial(attention, mask=mask, config=config, mesh=mesh)
        return jax.jit(jax.grad(lambda q, k, v: (run(q, k, v) ** 2).sum(), (0, 1, 2)))(q, k, v)

    for got, expected in zip(
        gradients(AttentionConfig("auto"), mesh), gradients(AttentionConfig("dense")), strict=True
    ):
        np.testing.assert_allclose(got, expected, atol=2e-5)
