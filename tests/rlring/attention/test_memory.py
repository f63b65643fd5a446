"""Memory of a scan over layers of checkpointed attention under grad is linear in the length: asked of the compiler."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from rlring.attention import AttentionConfig, Mask, attention
from rlring.mesh import SEQUENCE_AXES, make_mesh


def temporary_bytes(length: int, config: AttentionConfig, mesh, policy=None) -> int:
    @partial(jax.checkpoint, policy=policy)
    def layer(x, mask):
        return x + attention(x, x, x, mask, config=config, mesh=mesh)

    def loss(x, mask):
        out, _ = jax.lax.scan(lambda x, _: (layer(x, mask), None), x, length=2)
        return out.sum()

    x = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)
    position = jax.ShapeDtypeStruct((1, length), jnp.int32)
    mask = jax.eval_shape(Mask.causal, position)
    return jax.jit(jax.grad(loss)).lower(x, mask).compile().memory_analysis().temp_size_in_bytes


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("scheme", "mesh", "lengths"),
    [
        ("blockwise", {}, (2**14, 2**16)),
        slow("ring", {"ring": 2}, (2**14, 2**16)),
        slow("blockwise", {}, (2**12, 2**14, 2**16)),
        slow("ring", {"ring": 4}, (2**12, 2**14, 2**16)),
        slow("all_gather", {"ring": 4}, (2**12, 2**14, 2**16)),
        slow("ulysses", {"ulysses": 2}, (2**12, 2**14, 2**16)),
    ],
    ids=str,
)
def test_linear_in_the_length(scheme, mesh, lengths):
    config, mesh = AttentionConfig(scheme, scores=2**16), make_mesh(**mesh) if mesh else None
    *short, middle, long = (temporary_bytes(length, config, mesh) for length in lengths)
    # Four times the tokens, at most four times the memory; what does not grow (the scores of a block) only helps.
    assert long <= 4.2 * middle
    assert all(long <= 17 * one for one in short)


def test_a_policy_keeps_the_out():
    """With the two names kept, the backward does not run the forward again."""
    mesh, config = make_mesh(ring=4), AttentionConfig("ring")
    x, mask = jnp.zeros((1, 64, 2, 8)), Mask.causal(jnp.arange(64, dtype=jnp.int32)[None])

    def permutes(policy):
        layer = jax.checkpoint(lambda x: attention(x, x, x, mask, config=config, mesh=mesh), policy=policy)
        # Before compilation: XLA on CPU undoes what jax.checkpoint asks for where it can see both passes.
        text = jax.jit(jax.grad(lambda x: (layer(x) ** 2).sum())).lower(x).as_text()
        return text.count("stablehlo.collective_permute")

    names = jax.checkpoint_policies.save_only_these_names("attention_out", "attention_lse")
    backward = 3 * 3 + 4 * 2  # keys, values, what is known of them; two gradients: on CPU each goes by itself
    assert permutes(names) == 3 + backward
    assert permutes(jax.checkpoint_policies.nothing_saveable) == 2 * 3 + backward


@pytest.mark.parametrize(("scheme", "ring"), [("blockwise", 1), slow("ring", 2), slow("ring", 4), slow("ring", 8)])
def test_little_more_than_what_goes_in_and_out(scheme, ring):
    """Forward and backward: at most 1.5 times the bytes of q, k, v, out, their gradients and lse, up to 1M tokens."""
    mesh = make_mesh(ring=ring) if ring > 1 else None

    def attend(position, q, k, v):
        return attention(q, k, v, Mask.causal(position), config=AttentionConfig(scheme), mesh=mesh)

    def both(q, k, v, position, d_out):
        out, pull = jax.vjp(partial(attend, position), q, k, v)
        return out, pull(d_out)

    per_token = []
    for length in (2**16, 2**20):
        sharding = NamedSharding(mesh, P("data", SEQUENCE_AXES)) if mesh else None
        x = jax.ShapeDtypeStruct((1, length, 4, 64), jnp.float32, sharding=sharding)
        position = jax.ShapeDtypeStruct((1, length), jnp.int32, sharding=sharding)
        memory = jax.jit(both).lower(x, x, x, position, x).compile().memory_analysis().temp_size_in_bytes
        per_token.append(memory / (length // ring))
    arrays = 4 * (7 * 4 * 64 + 4)  # bytes a token
    assert per_token[0] <= 1.5 * arrays
    assert per_token[1] <= 1.01 * per_token[0]
