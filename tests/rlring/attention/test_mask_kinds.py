"""FunctionMask and BlockMask: every scheme equals the definition in float64, and what nobody sees is not computed."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from rlring.attention import (
    AttentionConfig,
    BlockMask,
    FunctionMask,
    Mask,
    MeshAxes,
    SparsePattern,
    attention,
    decode_attention,
    sharded_attention,
    zigzag_order,
)
from rlring.attention.blocks import BlockSchedule
from rlring.attention.kernels import features, make_kernel
from rlring.attention.score_mod import ScoreMod
from rlring.errors import UsageError
from rlring.mesh import make_mesh

ROWS, LENGTH, HEADS, KV_HEADS, SIZE = 2, 80, 4, 2, 8
BLOCKS = {"block_q": 6, "block_k": 5, "scores": 130}  # divide no length; two sequences do not fit at once
CONFIG = AttentionConfig("blockwise", **BLOCKS)
random = np.random.default_rng(0)
POSITION = np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1))
SEGMENT = np.stack([POSITION[0] // 33, np.where(POSITION[1] < 70, 0, -1)])
LENGTHS = np.array([11, 37], np.int32)
TABLE = random.random((ROWS, 11, 9)) < 0.4  # blocks of 8: keys after 72 are outside


def prefix(q, k, q_segment, k_segment, length):
    return (k <= q) | (k < length)


def document(q, k, q_segment, k_segment):
    """Two tokens are global."""
    return ((q_segment == k_segment) | (k < 2)) & (k <= q)


def dilated(q, k, q_segment, k_segment):
    return (q_segment == k_segment) & (abs(q - k) % 3 == 0) & (abs(q - k) < 30)


MASKS = {  # of positions and segments; and the whole of each by itself
    "prefix": lambda p, s: FunctionMask.of(prefix, p, s, (jnp.asarray(LENGTHS),)),
    "document": lambda p, s: FunctionMask.of(document, p, s),
    "dilated": lambda p, s: FunctionMask.of(dilated, p, s),
    "dilated, within 10": lambda p, s: FunctionMask.of(dilated, p, s).within(10),
    "blocks": lambda p, s: BlockMask.of(Mask.causal(p, s, window=40), TABLE, block_size=8),
    "blocks, full": lambda p, s: BlockMask.of(Mask.full(p, s), TABLE[1], block_size=8),
}


def whole(kind: str) -> np.ndarray:
    seen = np.zeros((ROWS, LENGTH, LENGTH), bool)
    for b, q, k in np.ndindex(*seen.shape):
        same, there = SEGMENT[b, q] == SEGMENT[b, k], min(SEGMENT[b, q], SEGMENT[b, k]) >= 0
        table = k // 8 < 9 and TABLE[b if kind == "blocks" else 1, q // 8, k // 8]
        seen[b, q, k] = (
            there
            and {
                "prefix": k <= q or k < LENGTHS[b],
                "document": k <= q and (same or k < 2),
                "dilated": same and q % 3 == k % 3 and abs(q - k) < 30,
                "dilated, within 10": same and q % 3 == k % 3 and -30 < q - k < 10,
                "blocks": same and q - 40 < k <= q and table,
                "blocks, full": same and table,
            }[kind]
        )
    return seen


def normal(*shape: int) -> np.ndarray:
    return random.normal(size=shape).astype(np.float32)


def arrays() -> tuple[np.ndarray, ...]:
    return normal(ROWS, LENGTH, HEADS, SIZE), *(normal(ROWS, LENGTH, KV_HEADS, SIZE) for _ in range(2))


def reference(q, k, v, seen):
    k, v = (jnp.repeat(x, HEADS // KV_HEADS, 2) for x in (k, v))
    weights = jnp.where(seen[:, None], jnp.exp(jnp.einsum("btnh,bsnh->bnts", q, k) * SIZE**-0.5), 0)
    total = weights.sum(-1, keepdims=True)
    return jnp.einsum("bnts,bsnh->btnh", weights / jnp.where(total == 0, 1, total), v)


def results(attend, inputs, d_out):
    out, pull = jax.vjp(attend, *inputs)
    return out, *pull(d_out)


def check(kind: str, attend, order=slice(None)):
    """Positions and segments are traced; the mask is made inside of the program."""
    inputs, d_out = arrays(), normal(ROWS, LENGTH, HEADS, SIZE)
    with jax.enable_x64(True):
        exact = [jnp.asarray(x, jnp.float64) for x in (*inputs, d_out)]
        expected = jax.jit(partial(results, partial(reference, seen=whole(kind))))(exact[:3], exact[3])

    @jax.jit
    def run(inputs, d_out, position, segment):
        mask = MASKS[kind](position, segment)
        return results(lambda q, k, v: attend(q, k, v, mask), inputs, d_out)

    inputs, d_out, position, segment = jax.tree.map(lambda x: x[:, order], (inputs, d_out, POSITION, SEGMENT))
    for part, a, b in zip(("out", "dq", "dk", "dv"), run(inputs, d_out, position, segment), expected, strict=True):
        assert np.isfinite(a).all(), part
        np.testing.assert_allclose(a, b[:, order], rtol=0, atol=1e-5 * np.abs(b).max(), err_msg=part)


SCHEMES = {
    "dense": ("dense", {}),
    "blockwise": ("blockwise", {}),
    "ring of 8": ("ring", {"ring": 8}),
    "all_gather": ("all_gather", {"ring": 2, "ulysses": 2}),
    "ulysses": ("ulysses", {"ulysses": 4}),
    "hybrid": ("hybrid", {"data": 2, "ring": 2, "ulysses": 2}),
}
QUICK = [("document", "hybrid"), ("prefix", "ulysses"), ("dilated", "blockwise"), ("blocks", "hybrid")]


@pytest.mark.parametrize(
    ("kind", "scheme"),
    [
        pytest.param(kind, scheme, marks=[] if (kind, scheme) in QUICK else pytest.mark.slow)
        for kind in MASKS
        for scheme in SCHEMES
    ],
)
def test_every_scheme(kind, scheme):
    name, mesh = SCHEMES[scheme]
    order = zigzag_order(LENGTH, 8) if scheme in ("ring of 8", "hybrid") else slice(None)
    settings = {"config": AttentionConfig(name, **BLOCKS), "mesh": make_mesh(**mesh)}
    check(kind, partial(attention, **settings), order)


@pytest.mark.slow
@pytest.mark.parametrize("kind", MASKS)
def test_inside_shard_map(kind):
    """What belongs to a sequence is split as the batch is."""
    mesh = jax.make_mesh((2, 4), ("dp", "seq"), axis_types=(AxisType.Auto,) * 2)
    config, axes, tokens = AttentionConfig("ring", **BLOCKS), MeshAxes(("dp",), ring="seq"), P("dp", "seq")

    def attend(q, k, v, mask):
        specs = tokens, tokens, tokens, mask.specs(tokens)
        on_shards = partial(sharded_attention, config=config, axes=axes)
        return jax.shard_map(on_shards, mesh=mesh, in_specs=specs, out_specs=tokens)(q, k, v, mask)

    check(kind, attend)


@pytest.mark.parametrize("kind", ["prefix", "blocks"])
def test_decode(kind):
    """Three queries against keys that are split over a mesh, by the mask of the whole."""
    inputs, mask = arrays(), MASKS[kind](POSITION, SEGMENT)
    few = slice(60, 63)
    now = replace(mask, q_position=mask.q_position[:, few], q_segment=mask.q_segment[:, few])
    decode = jax.jit(partial(decode_attention, mesh=make_mesh(data=2, ring=2, ulysses=2)))
    expected = reference(*inputs, whole(kind))[:, few]
    np.testing.assert_allclose(decode(inputs[0][:, few], *inputs[1:], now), expected, atol=1e-5)


@pytest.mark.parametrize("kind", MASKS)
def test_what_is_known_of_blocks(kind):
    """In zigzag order: no block that is seen is skipped; a FunctionMask skips all others."""
    order, (q_size, k_size) = zigzag_order(LENGTH, 4), (10, 8)
    mask = MASKS[kind](*(jnp.asarray(x[:, order]) for x in (POSITION, SEGMENT)))
    seen = whole(kind)[:, order][:, :, order]
    np.testing.assert_array_equal(mask.visible(), seen)
    blocks = seen.reshape(ROWS, LENGTH // q_size, q_size, LENGTH // k_size, k_size)
    any_seen, all_seen = blocks.any((0, 2, 4)), blocks.all((0, 2, 4))
    view = mask.view(q_size, k_size)
    by_queries = [view.of_queries(i) for i in range(LENGTH // q_size)]
    by_keys = [view.of_keys(j) for j in range(LENGTH // k_size)]
    for side, lines in ((0, by_queries), (1, by_keys)):
        maybe, surely = (np.stack(x, side) for x in zip(*lines, strict=True))
        assert not (any_seen & ~maybe).any()
        assert not (surely & ~all_seen).any()
        if mask.kind == "mask of a function":
            np.testing.assert_array_equal(maybe, any_seen)
            np.testing.assert_array_equal(surely, all_seen)


def test_a_table_skips_its_blocks():
    """1,024 tokens in blocks of 64, as many of the table to one of the kernel: those that are set, and no others."""
    table = random.random((16, 16)) < 0.3
    mask = BlockMask.of(Mask.full(jnp.arange(1024, dtype=jnp.int32)[None]), table, block_size=64)
    view = mask.view(64, 64)
    for i in range(16):
        plan = BlockSchedule.of(*view.of_queries(i))
        assert plan.seen == plan.whole == table[i].sum()
    view, wide = mask.view(128, 256), table.reshape(8, 2, 4, 4)
    seen, full = (np.stack(x) for x in zip(*(view.of_queries(i) for i in range(8)), strict=True))
    np.testing.assert_array_equal(seen, wide.any((1, 3)))
    np.testing.assert_array_equal(full, wide.all((1, 3)))


def test_the_same_rule_for_other_tokens():
    mask = MASKS["document"](POSITION, SEGMENT).at(POSITION[:, :7], SEGMENT[:, :7])
    np.testing.assert_array_equal(mask.visible(), whole("document")[:, :7, :7])


@pytest.mark.parametrize("length", [1, 1000])
def test_sizes(length):
    q, position = jnp.asarray(normal(1, length, 2, 8)), jnp.arange(length, dtype=jnp.int32)[None]
    mask = FunctionMask.of(lambda q, k, *_: k <= q, position)
    expected = attention(q, q, q, Mask.causal(position), config=CONFIG)
    np.testing.assert_allclose(attention(q, q, q, mask, config=CONFIG), expected, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["blockwise", "ring"])
def test_memory_is_linear(scheme):
    mesh, config = make_mesh(ring=4 if scheme == "ring" else 1), AttentionConfig(scheme, scores=2**16)

    def loss(x, position):
        mask = FunctionMask.of(document, position, position // 100)
        layer = jax.checkpoint(lambda x: x + attention(x, x, x, mask, config=config, mesh=mesh))
        return jax.lax.scan(lambda x, _: (layer(x), None), x, length=2)[0].sum()

    def temporary_bytes(length: int) -> int:
        x, position = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32), jax.ShapeDtypeStruct((1, length), jnp.int32)
        return jax.jit(jax.grad(loss)).lower(x, position).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(2**16) <= 4.2 * temporary_bytes(2**14)


@pytest.mark.parametrize("kind", ["prefix", "blocks"])
def test_kernels_and_schemes_that_lack_it_refuse_it_by_name(kind):
    q, _, v = arrays()
    mask = MASKS[kind](POSITION, SEGMENT)
    name = mask.kind
    with pytest.raises(UsageError, match=f"'sparse' needs a causal mask without a window; got a {name}"):
        attention(q, q, q, mask, config=AttentionConfig("sparse", sparse=SparsePattern()))
    wanted = features(q, v, mask, ScoreMod.plain(SIZE), needs_lse=False)
    of = {"dtype": jnp.dtype(jnp.float32), "head_size": SIZE, "wanted": wanted}
    with pytest.raises(UsageError, match=f"'splash' cannot run: it knows no {name}; got {name}=.*Mask"):
        make_kernel("splash", CONFIG, platform="tpu", **of)
    assert type(make_kernel("auto", CONFIG, platform="tpu", **of)).__name__ == "BlockwiseKernel"


@pytest.mark.parametrize(
    ("function", "operands", "message"),
    [
        (True, (), r"needs one of \(q_position, .*\); got True. Where"),
        (lambda q, k, *_: q - k, (), r"returns booleans .*; got int32\[2, 3\] where T=2 and S=3. Compare"),
        (lambda q, k, *_: None, (), r"returns booleans .*; got None. Compare"),
        (lambda q, k, *_: (q < k)[0, 0, None, None, None], (), r"returns booleans .*; got bool\[1, 1, 1\]"),
        (prefix, (jnp.zeros(3),), r"a row for each of the 2 sequences; got \(3,\). Broadcast"),
        (prefix, jnp.zeros(2), r"a row for each of the 2 sequences; got a ArrayImpl. Broadcast"),
    ],
)
def test_functions_that_are_no_mask(function, operands, message):
    with pytest.raises(UsageError, match=message):
        FunctionMask.of(function, POSITION, operands=operands)


def test_arrays_of_a_function():
    few = MASKS["prefix"](POSITION, SEGMENT).at(POSITION[:1, :4])
    with pytest.raises(UsageError, match=r"of its own for each sequence; got 2 of them for B=1. Make one mask"):
        attention(*[jnp.zeros((1, 4, 2, 8))] * 3, few, config=CONFIG)
    with pytest.raises(UsageError, match=r"closes over a traced array.* operands=\(array,\)"):
        jax.jit(lambda n: FunctionMask.of(lambda q, k, *_: k < n, POSITION))(3)


@pytest.mark.parametrize(
    ("mask", "table", "block", "message"),
    [
        (MASKS["dilated"](POSITION, SEGMENT), TABLE, 8, r"made of a causal or full Mask; got mask of a function. The"),
        (None, TABLE, 8, r"made of a causal or full Mask; got None"),
        (Mask.full(POSITION), TABLE[:1], 8, r"bool\[B, Q, K\] with B=2 sequences, .*; got bool\[1, 11, 9\]"),
        (Mask.full(POSITION), TABLE.astype(int), 8, r"the table of a block mask is bool\[Q, K\], .*; got int64"),
        (Mask.full(POSITION), TABLE, 0, r"has at least one position; got block_size=0"),
    ],
)
def test_tables_that_are_no_mask(mask, table, block, message):
    with pytest.raises(UsageError, match=message):
        BlockMask.of(mask, table, block_size=block)
