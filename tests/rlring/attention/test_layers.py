"""Layers of attention as users write them: in their jax.jit, under jax.checkpoint and in lax.scan.

The mask is closed over. All three know it before they run, and may treat what follows from it alone otherwise than q.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlring import AttentionConfig, Mask, SparsePattern, attention, make_mesh
from tests.rlring.attention.test_contract import UNLISTED

SCHEMES = {
    "dense": {},
    "blockwise": {},
    "sparse": {"ulysses": 2},
    "ring of 2": {"ring": 2},
    "ring": {"ring": 4},  # compiles for half a minute
    "all_gather": {"ring": 4},
    "ulysses": {"ulysses": 4},
    "hybrid": {"ring": 2, "ulysses": 2},
    **UNLISTED,
}
KEPT = jax.checkpoint_policies.save_only_these_names("attention_out", "attention_lse")
REMAT = {"none": lambda layer: layer, "all": jax.checkpoint, "attention": partial(jax.checkpoint, policy=KEPT)}
LENGTH, HEADS, SIZE = 21, 4, 8
PATTERN = SparsePattern(8, 1, 2)


def packed() -> Mask:
    """Two sequences in a row, one and padding in the other, and a window."""
    position = jnp.tile(jnp.arange(LENGTH, dtype=jnp.int32), (2, 1))
    return Mask.causal(position, jnp.where(position < jnp.array([[13], [17]]), 0, jnp.array([[1], [-1]])), 9)


def value_and_gradients(attend, *, remat: str = "none", in_scan: bool = False):
    """Returns the loss of two layers and its gradients, as a function of x and the weights of both."""

    def layer(x, w):
        q, k, v = jnp.split(jnp.einsum("btnh,hg->btng", x, w), [SIZE, 2 * SIZE], -1)
        return x + attend(q, k[:, :, :2], v[:, :, 2:])

    def loss(x, weights):
        step = REMAT[remat](layer)
        if in_scan:
            return (jax.lax.scan(lambda x, w: (step(x, w), None), x, weights)[0] ** 2).mean()
        return (step(step(x, weights[0]), weights[1]) ** 2).mean()

    return jax.value_and_grad(loss, argnums=(0, 1))


def softmax_attention(mask: np.ndarray, q, k, v):
    """Attention from its definition."""
    k, v = (jnp.repeat(x, HEADS // x.shape[2], axis=2) for x in (k, v))
    scores = jnp.where(mask[:, None], jnp.einsum("btnh,bsnh->bnts", q, k) / SIZE**0.5, -jnp.inf)
    top = jnp.where(mask.any(-1)[:, None, :, None], scores.max(-1, keepdims=True), 0.0)
    weights = jnp.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    return jnp.einsum("bnts,bsnh->btnh", weights / jnp.where(total == 0.0, 1.0, total), v)


def quick(scheme: str, remat: str, in_scan: bool) -> bool:
    return in_scan and (scheme, remat) in [("blockwise", "attention"), ("ring of 2", "all"), ("ulysses", "attention")]


@pytest.mark.parametrize(
    ("scheme", "remat", "in_scan"),
    [
        pytest.param(*case, marks=() if quick(*case) else pytest.mark.slow)
        for case in [(scheme, remat, in_scan) for scheme in SCHEMES for remat in REMAT for in_scan in (False, True)]
    ],
)
def test_any_program_of_layers(scheme, remat, in_scan):
    """Against float64, from the definition; sparse attention is judged elsewhere, here against itself alone."""
    keys = jax.random.split(jax.random.key(0))
    x = jax.random.normal(keys[0], (2, LENGTH, HEADS, SIZE))
    weights = jax.random.normal(keys[1], (2, SIZE, 3 * SIZE)) / SIZE**0.5
    mask, mesh = packed(), make_mesh(**SCHEMES[scheme]) if SCHEMES[scheme] else None
    if scheme == "sparse":
        mask = Mask.causal(mask.q_position, mask.q_segment)
        config = AttentionConfig(scheme, 8, 8, sparse=PATTERN)
        attend = partial(attention, mask=mask, config=config)
    else:
        config = AttentionConfig(scheme.split()[0], 6, 5, scores=130)
        attend = partial(softmax_attention, np.asarray(mask.visible()))
    with jax.enable_x64(True):
        expected = value_and_gradients(attend)(*(jnp.asarray(x, jnp.float64) for x in (x, weights)))
    attend = partial(attention, mask=mask, config=config, mesh=mesh)
    got = jax.jit(value_and_gradients(attend, remat=remat, in_scan=in_scan))(x, weights)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())
