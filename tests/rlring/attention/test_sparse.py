"""sparse.py: exact against a softmax over the pattern written out entry by entry, on one device and over ulysses."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlring.attention import AttentionConfig, Mask, SparsePattern, attention, inverse_order, zigzag_order
from rlring.attention.band import _Band
from rlring.attention.blocks import Blocks, BlockSchedule
from rlring.attention.sparse import SparseKernel, _Far, _NearMask
from rlring.errors import UsageError
from rlring.mesh import make_mesh

LENGTH, SIZE = 90, 8
PARTS = ("out", "dq", "dk", "dv")
PATTERNS = {
    "plain": SparsePattern(4, 2, 4),
    "one_local_block": SparsePattern(4, 1, 5, offset=2),
    "more_heads_than_stride": SparsePattern(3, 3, 3),
    "odd": SparsePattern(7, 2, 6, offset=-1),
    "all_near": SparsePattern(4, 40, 8),
    "all_strided": SparsePattern(4, 1, 1),
    "nothing_far": SparsePattern(4, 2, 1000, offset=1),
    "one_token_a_block": SparsePattern(1, 1, 2),
}


def arrays(heads: int, kv_heads: int, length: int = LENGTH, batch: int = 2):
    """q, k, v and the gradient of the out."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(batch, length, n, SIZE) for n in (heads, kv_heads, kv_heads, heads)]
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def masks(length: int = LENGTH) -> dict[str, Mask]:
    position = jnp.tile(jnp.arange(length, dtype=jnp.int32), (2, 1))
    packed = jnp.stack([position[0] // 13, jnp.where(position[0] < length // 3, 3, 1)])
    shuffled = jax.random.permutation(jax.random.key(1), position, axis=1, independent=True)
    return {
        "plain": Mask.causal(position),
        "packed": Mask.causal(position, packed),
        "packed_from_zero": Mask.causal(position % 13, position // 13),
        "block_causal": Mask.causal(position // 4),
        "ragged": Mask.causal(position, jnp.where(position < jnp.array([[length - 11], [17]]), 0, -1)),
        "empty": Mask.causal(position, jnp.full_like(position, -1)),
        "first_rows_see_nothing": replace(Mask.causal(position), k_position=position + 20),
        "far_ahead": Mask.causal(position + 1000),
        "zigzag": Mask.causal(position[:, zigzag_order(length, 5)]),
        "shuffled": Mask.causal(shuffled, packed),
    }


def sees(pattern: SparsePattern, i: int, j: int, head: int, kv_heads: int) -> bool:
    """The definition, in Python's integers."""
    step = max(1, pattern.stride // kv_heads)
    return 0 <= i - j < pattern.local_blocks or (j <= i and (j + head * step + pattern.offset) % pattern.stride == 0)


def visible(mask: Mask, pattern: SparsePattern, kv_heads: int) -> np.ndarray:
    """[B, K, T, S], one block of positions at a time."""
    i, j = (np.asarray(x) // pattern.block for x in (mask.q_position, mask.k_position))
    blocks = 1 + max(i.max(), j.max())
    table = np.array(
        [
            [[sees(pattern, i, j, head, kv_heads) for j in range(blocks)] for i in range(blocks)]
            for head in range(kv_heads)
        ]
    )
    pairs = table[:, i[:, :, None], j[:, None, :]]  # [K, B, T, S]
    return np.asarray(mask.visible())[:, None] & np.moveaxis(pairs, 0, 1)


@jax.jit
def reference(q, k, v, visible):
    """Softmax over the visible keys, in float64, differentiated by JAX."""
    group = q.shape[2] // k.shape[2]
    k, v, visible = (jnp.repeat(x, group, axis) for x, axis in ((k, 2), (v, 2), (visible, 1)))
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) / q.shape[3] ** 0.5
    some = visible.any(-1, keepdims=True)
    weights = jnp.where(some, jax.nn.softmax(jnp.where(visible | ~some, scores, -jnp.inf)), 0.0)
    return jnp.einsum("bnts,bsnh->btnh", weights, v)


def expected_of(inputs, mask, pattern):
    """out, dq, dk, dv."""
    seen = visible(mask, pattern, inputs[1].shape[2])
    with jax.enable_x64(True):
        q, k, v, d_out = (jnp.asarray(x, jnp.float64) for x in inputs)
        out, pull = jax.vjp(lambda q, k, v: reference(q, k, v, seen), q, k, v)
        return [np.asarray(x) for x in (out, *pull(d_out))]


@partial(jax.jit, static_argnames=("config", "mesh"))
def run(inputs, mask, config, mesh=None):
    q, k, v, d_out = inputs
    out, pull = jax.vjp(lambda q, k, v: attention(q, k, v, mask, config=config, mesh=mesh), q, k, v)
    return (out, *pull(d_out))


def check(inputs, mask, config, mesh=None):
    results = run(inputs, mask, config, mesh)
    for part, got, expected in zip(PARTS, results, expected_of(inputs, mask, config.sparse), strict=True):
        assert np.isfinite(got).all(), part
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * max(np.abs(expected).max(), 1e-30), err_msg=part)


@pytest.mark.parametrize("chunk", [4, *(pytest.param(chunk, marks=pytest.mark.slow) for chunk in (2, 6))])
@pytest.mark.parametrize("name", masks())
def test_every_mask(name, chunk):
    """The band in chunks of so many of its 6 tiles; of 4, the second goes around to the first tiles."""
    inputs, tile = arrays(4, 2), 16
    scores = 4 * chunk * (2 * 4 * tile**2)  # the band takes a fourth; two sequences, four heads
    band = _Band.of(*inputs[:2], *SparseKernel(PATTERNS["plain"], Blocks(tile, tile, scores), 1).near_cut())
    assert (band.chunk, band.chunks) == (chunk, -(-6 // chunk))
    check(inputs, masks()[name], AttentionConfig("sparse", tile, tile, scores, sparse=PATTERNS["plain"]))


@pytest.mark.parametrize("mesh", [None, pytest.param({"ulysses": 2}, marks=pytest.mark.slow)], ids=str)
def test_the_default_blocks(mesh):
    """Several tiles of keys and chunks of the band, as users have them."""
    length, config = 2000, AttentionConfig("sparse", sparse=SparsePattern(64, 2, 8))
    inputs = arrays(4, 2, length)
    cut = SparseKernel(config.sparse, Blocks(512, 512, config.scores), 1).near_cut()
    assert _Band.of(*inputs[:2], *cut).chunks > 2
    check(inputs, masks(length)["plain"], config, make_mesh(**mesh) if mesh else None)


QUICK = ("one_local_block",)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in PATTERNS]
)
def test_every_pattern(name):
    mask = masks()["packed"]
    check(arrays(4, 4), mask, AttentionConfig("sparse", 16, 12, 2000, sparse=PATTERNS[name]))


@pytest.mark.slow
def test_all_heads_share_one():
    check(arrays(6, 1), masks()["plain"], AttentionConfig("sparse", 32, 16, sparse=PATTERNS["plain"]))


@pytest.mark.parametrize(
    ("length", "name"),
    [pytest.param(610, "packed", marks=pytest.mark.slow), pytest.param(640, "zigzag", marks=pytest.mark.slow)],
)
def test_small_sparsity_blocks_in_large_tiles(length, name):
    """MergeQ: blocks of 16 in tiles of 128 and 256, and a length that none of them divides."""
    config = AttentionConfig("sparse", 256, 256, sparse=SparsePattern(16, 2, 4))
    check(arrays(4, 2, length), masks(length)[name], config)


@pytest.mark.parametrize(
    ("kv_heads", "mesh"),
    [
        pytest.param(4, {"data": 2, "ulysses": 2}, marks=pytest.mark.slow),
        (2, {"ulysses": 4}),
        pytest.param(1, {"ulysses": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_over_ulysses(kv_heads, mesh):
    """Each device takes the patterns of its own heads, also where a key/value head is copied for two of them."""
    config = AttentionConfig("sparse", 16, 16, sparse=SparsePattern(3, 2, 8, offset=1))
    check(arrays(4, kv_heads), masks()["shuffled"], config, make_mesh(**mesh))


def test_queries_and_keys_of_different_lengths():
    (q, *kv, d_out), mask = arrays(4, 2), masks()["packed"]
    mask = replace(mask, q_position=mask.q_position[:, 63:], q_segment=mask.q_segment[:, 63:])
    check([q[:, 63:], *kv, d_out[:, 63:]], mask, AttentionConfig("sparse", 16, 16, sparse=PATTERNS["plain"]))


def test_bfloat16():
    inputs, mask = arrays(4, 2), masks()["packed"]
    config = AttentionConfig("sparse", 16, 16, sparse=PATTERNS["plain"])
    got = run([x.astype(jnp.bfloat16) for x in inputs], mask, config)
    for a, b in zip(got, expected_of(inputs, mask, config.sparse), strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=0, atol=0.02 * np.abs(b).max())


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_density_is_the_share_of_causal_blocks(pattern, kv_heads):
    for length in (1, 50, 90):
        blocks = -(-length // pattern.block)
        seen = [
            sees(pattern, i, j, head, kv_heads) for head in range(kv_heads) for i in range(blocks) for j in range(i + 1)
        ]
        assert pattern.density(length, kv_heads=kv_heads) == pytest.approx(np.mean(seen))


def test_density_of_known_patterns():
    assert SparsePattern(stride=1).density(2**15, kv_heads=4) == 1.0
    # Phi-3-small's pattern at 128K tokens: 1/8 + 7/8 * 1024 / 64K.
    assert SparsePattern(64, 16, 8).density(2**17, kv_heads=8) == pytest.approx(0.139, abs=0.001)


def test_every_head_has_its_own_shard_of_the_context():
    pattern, blocks = SparsePattern(stride=8), np.arange(80)
    shards = np.stack([pattern.is_strided(blocks, head, kv_heads=8) for head in range(8)])
    assert (shards.sum(0) == 1).all()  # together the heads see everything, and nothing twice


def visited(mask: Mask, length: int, k_length: int, tile: Blocks) -> int:
    """How many scores are computed for each row."""
    mask = mask.padded(-(-length // tile.q) * tile.q, -(-k_length // tile.k) * tile.k)
    view = mask.view(tile.q, tile.k)
    plans = [BlockSchedule.of(*view.of_queries(i)) for i in range(mask.q_position.shape[1] // tile.q)]
    return sum(int(plan.seen) for plan in plans) * tile.q * tile.k


@pytest.mark.parametrize("layout", ["plain", "zigzag", "packed"])
@pytest.mark.parametrize("pattern", [SparsePattern(64, 4, 8), SparsePattern(16, 16, 32)], ids=str)
def test_what_is_not_seen_is_not_computed(pattern, layout):
    length, kv_heads = 2**14, 4
    position = jnp.arange(length, dtype=jnp.int32)[None]
    order = zigzag_order(length, 4) if layout == "zigzag" else np.arange(length)
    mask = Mask.causal(position[:, order], position[:, order] // (length // 8) if layout == "packed" else None)
    blocks, heads = Blocks(512, 512, 2**20), jnp.arange(kv_heads, dtype=jnp.int32)
    near_tile, _ = SparseKernel(pattern, blocks, 1).near_cut()
    near = visited(_NearMask.of(mask, pattern), length, length, Blocks(near_tile, near_tile, 2**20))
    far = _Far.of(mask, heads, kv_heads, pattern)
    assert int(far.chunks) == 1
    seen, tile = far.mask(mask, far.keys(jnp.int32(0)), pattern), SparseKernel(pattern, blocks, 1).far_blocks(length)
    computed = (near + visited(seen, length, far.size, tile)) / (length**2 / 2)
    kept = pattern.density(length, kv_heads=kv_heads)
    assert computed < (1.0 if layout == "packed" else 1.6) * kept


@pytest.mark.slow
def test_many_short_sequences_need_more_chunks():
    position = jnp.arange(256, dtype=jnp.int32)[None]
    pattern = SparsePattern(4, 1, 8)
    far = _Far.of(Mask.causal(position % 4, position // 4), jnp.arange(2, dtype=jnp.int32), 2, pattern)
    assert int(far.chunks) == 8  # every sequence is a first block, which head 0 calls strided
    mask = Mask.causal(jnp.tile(position % 8, (2, 1)), jnp.tile(position // 8, (2, 1)))
    check(arrays(4, 2, 256), mask, AttentionConfig("sparse", 16, 16, sparse=pattern))


def temporary_bytes(length: int) -> int:
    """Of a scan over layers of checkpointed attention under grad, asked of the compiler."""
    config = AttentionConfig("sparse", scores=2**16, sparse=SparsePattern(64, 4, 8))

    @jax.checkpoint
    def layer(x, mask):
        return x + attention(x, x, x, mask, config=config)

    def loss(x, mask):
        return jax.lax.scan(lambda x, _: (layer(x, mask), None), x, length=2)[0].sum()

    x = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)
    mask = jax.eval_shape(Mask.causal, jax.ShapeDtypeStruct((1, length), jnp.int32))
    return jax.jit(jax.grad(loss)).lower(x, mask).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_memory_is_linear_in_the_length():
    assert temporary_bytes(2**16) <= 4.2 * temporary_bytes(2**14)


def test_the_layout_does_not_matter():
    inputs, config = arrays(4, 2), AttentionConfig("sparse", 16, 16, sparse=PATTERNS["plain"])
    order = zigzag_order(LENGTH, 5)
    plain = run(inputs, masks()["plain"], config)
    zigzag = run([x[:, order] for x in inputs], masks()["zigzag"], config)
    for a, b in zip(plain, zigzag, strict=True):
        np.testing.assert_allclose(b[:, inverse_order(order)], a, atol=1e-5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"block": 0}, r"sparse.block is at least 1; got 0. Leave it out for the default"),
        ({"local_blocks": 0}, r"sparse.local_blocks is at least 1: a token sees itself; got 0"),
        ({"stride": -3}, r"sparse.stride is at least 1; got -3"),
    ],
)
def test_pattern_is_checked(values, message):
    with pytest.raises(UsageError, match=message):
        SparsePattern(**values)


def test_pattern_and_scheme_go_together():
    with pytest.raises(UsageError, match=r"got scheme 'sparse' with sparse=None. Use scheme='sparse' with sparse=Sp"):
        AttentionConfig("sparse")
    with pytest.raises(UsageError, match=r"got scheme 'ring' with sparse=SparsePattern\(block=64"):
        AttentionConfig("ring", sparse=SparsePattern())
    one, same = (AttentionConfig("sparse", sparse=SparsePattern(32)) for _ in range(2))
    assert hash(one) == hash(same)


def test_what_sparse_cannot_do():
    (q, k, v, _), mask, config = arrays(4, 2), masks()["plain"], AttentionConfig("sparse", sparse=SparsePattern())
    with pytest.raises(UsageError, match=r"'sparse' needs mesh.ring=1; got mesh.ring=2. .* 'ring', 'all_gather'"):
        attention(q, k, v, mask, config=config, mesh=make_mesh(ring=2))
    with pytest.raises(UsageError, match=r"'sparse' splits the heads over mesh.ulysses=8 devices; got 4 query heads"):
        attention(q, k, v, mask, config=config, mesh=make_mesh(ulysses=8))
    with pytest.raises(UsageError, match=r"causal mask without a window; got is_causal=True, window=3"):
        attention(q, k, v, replace(mask, window=3), config=config)
    with pytest.raises(UsageError, match=r"causal mask without a window; got is_causal=False, window=None"):
        attention(q, k, v, replace(mask, is_causal=False), config=config)
