"""rectangles.py: a mask is given to the tile exactly where it has one of the tile's shapes."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from rlring.attention import Mask, striped_order, zigzag_order
from rlring.attention.all_gather import all_gather_attention
from rlring.attention.blocks import Blocks
from rlring.attention.blockwise import BlockwiseKernel
from rlring.attention.dense import dense_attention
from rlring.attention.kernel import BackwardInputs, Gradients, local_attention
from rlring.attention.kernels import rectangles
from rlring.attention.kernels.rectangles import RectangleKernel, shape_of
from rlring.attention.ring import ring_attention
from rlring.attention.score_mod import ScoreMod
from rlring.attention.softmax import PartialAttention
from rlring.mesh import make_mesh

SHARDS, LENGTH, KV_HEADS = 4, 256, 2
SHARD = P("data", ("ring", "ulysses"))
SIGNS = dict(zip(range(6), ".#\\<_?", strict=True))  # nothing, whole, triangle, first keys, last queries, fallback


class DenseTile(NamedTuple):
    """By the definition, in plain JAX."""

    def forward(self, q, k, v, *, scale, is_causal):
        scores = _scores(q, k, scale, is_causal)
        out = jnp.einsum("bkgts,bskh->btkgh", jax.nn.softmax(scores), v)
        return out.reshape(q.shape), jax.nn.logsumexp(scores, -1).reshape(_numbers(q))

    def backward(self, q, k, v, out, lse, d_out, *, scale, is_causal):
        scores = _scores(q, k, scale, is_causal)
        weights = jnp.exp(scores - lse.reshape(*scores.shape[:4], 1))
        delta = jnp.moveaxis((out * d_out).sum(-1), 1, 2).reshape(*scores.shape[:4], 1)
        q, d_out = (_grouped(x, k) for x in (q, d_out))
        d_scores = weights * (jnp.einsum("btkgh,bskh->bkgts", d_out, v) - delta) * scale
        dq = jnp.einsum("bkgts,bskh->btkgh", d_scores, k).reshape(out.shape)
        return dq, jnp.einsum("bkgts,btkgh->bskh", d_scores, q), jnp.einsum("bkgts,btkgh->bskh", weights, d_out)


def _grouped(q, k):
    return q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[3])


def _numbers(q):
    return q.shape[0], q.shape[2], q.shape[1]


def _scores(q, k, scale, is_causal):
    scores = jnp.einsum("btkgh,bskh->bkgts", _grouped(q, k), k) * scale
    return jnp.where(jnp.tri(*scores.shape[3:], dtype=bool), scores, -jnp.inf) if is_causal else scores


class Poison(NamedTuple):
    """A tile and a kernel that nobody is to call: all it returns is NaN."""

    def forward(self, q, k, v, mask=None, *rest, **settings):
        found = PartialAttention(*(jnp.full(shape, jnp.nan) for shape in (q.shape, _numbers(q), _numbers(q))))
        return found[:2] if mask is None else found

    def backward(self, q, k, v, *rest, **settings):
        found = Gradients(*(jnp.full(x.shape, jnp.nan, jnp.float32) for x in (q, k, v)))
        return found[:3] if settings else found


BLOCKWISE = BlockwiseKernel(Blocks(24, 20, 2**12))
PROVEN, ANY, NEVER = (
    RectangleKernel(*x) for x in ((DenseTile(), Poison()), (DenseTile(), BLOCKWISE), (Poison(), BLOCKWISE))
)


def positions(order=None, length=LENGTH, rows=2):
    order = np.arange(length) if order is None else order
    return jnp.tile(jnp.asarray(order, jnp.int32), (rows, 1))


def shapes(mask: Mask, shards: int = SHARDS) -> str:
    """The shape of each shard of queries, a line, under each shard of keys."""
    size = mask.q_position.shape[1] // shards
    return " ".join(
        "".join(SIGNS[int(shape_of(mask.block(i * size, size, j * size, size)))] for j in range(shards))
        for i in range(shards)
    )


def masks() -> dict[str, tuple[Mask, str]]:
    zigzag, time = zigzag_order(LENGTH, SHARDS), np.arange(LENGTH)
    ragged = jnp.where(positions() < jnp.array([[200], [240]]), 0, -1)
    return {
        "causal": (Mask.causal(positions()), "\\... #\\.. ##\\. ###\\"),
        "zigzag": (Mask.causal(positions(zigzag)), "\\___ <\\__ <<\\_ <<<\\"),
        # A triangle without its diagonal is none of the shapes, and the diagonal one has neighbours that are.
        "striped": (Mask.causal(positions(striped_order(LENGTH, SHARDS))), "\\??? ?\\?? ??\\? ???\\"),
        "full": (Mask.full(positions()), "#### #### #### ####"),
        "block_causal": (Mask.causal(positions() // 4), "?... #?.. ##?. ###?"),
        "window": (Mask.causal(positions(), window=70), "\\... ?\\.. ??\\. .??\\"),
        "wide_window": (Mask.causal(positions(), window=LENGTH), "\\... #\\.. ##\\. ###\\"),
        "window_of_128": (Mask.causal(positions(), window=128), "\\... #\\.. ?#\\. .?#\\"),
        "padded": (Mask.causal(positions(), ragged), "\\... #\\.. ##\\. ###\\"),
        "zigzag_padded": (Mask.causal(positions(zigzag), ragged[:, zigzag]), "\\___ <\\__ <<\\_ <<<\\"),
        "full_padded": (Mask.full(positions(), ragged), "###? ###? ###? ###?"),
        "packed": (Mask.causal(positions(time % 64), positions(time // 64)), "\\... .\\.. ..\\. ...\\"),
        "packed_on": (Mask.causal(positions(), positions(time // 100)), "\\... ??.. .?\\. .???"),
        "packed_within": (Mask.causal(positions(time % 60), positions(time // 60)), "??.. ???. .??? ..??"),
        "rows_disagree": (Mask.causal(jnp.stack([time, 300 - time]).astype(jnp.int32)), "???? ???? ???? ????"),
        "empty": (Mask.causal(positions(), jnp.full_like(positions(), -1)), ".... .... .... ...."),
    }


@pytest.mark.parametrize("name", masks())
def test_shapes(name):
    mask, expected = masks()[name]
    assert shapes(mask) == expected


def test_a_shape_is_what_the_mask_shows():
    """For every hop of every mask: the shape, drawn, is the mask at all queries that are somewhere."""
    for name, (mask, _) in masks().items():
        size = LENGTH // SHARDS
        for i in range(SHARDS):
            for j in range(SHARDS):
                block = mask.block(i * size, size, j * size, size)
                which = int(shape_of(block))
                if which == len(rectangles.SHAPES):
                    continue
                shape, drawn = rectangles.SHAPES[which], np.zeros((size, size), bool)
                (a, b), (c, d) = ([half * size // 2 for half in part] for part in (shape.q, shape.k))
                drawn[a:b, c:d] = np.tri(size, dtype=bool)[a:b, c:d] if shape.is_causal else True
                there = np.asarray(block.q_segment >= 0)[:, :, None]
                np.testing.assert_array_equal(block.visible(), drawn & there, err_msg=f"{name} {i} {j}")


def test_a_half_that_is_seen_in_part():
    """Every query sees the first half of the keys, the last half of the queries every key; that is not all there is."""
    position = positions(length=64)
    mask = Mask(position + 40, position, 0 * position, 0 * position)
    assert int(shape_of(mask)) == len(rectangles.SHAPES)
    first, last = (rectangles.SHAPES.index(shape) for shape in (rectangles.FIRST_KEYS, rectangles.LAST_QUERIES))
    earlier, later = position[:, :32], position[:, 32:] + 100
    keys = jnp.concatenate([earlier, later], 1)
    assert int(shape_of(Mask(position + 40, keys, 0 * position, 0 * position))) == first
    assert int(shape_of(Mask(jnp.concatenate([earlier - 50, later], 1), position, 0 * position, 0 * position))) == last


def test_odd_lengths_have_no_halves():
    mask = Mask.causal(positions(length=15))
    assert int(shape_of(mask)) == rectangles.SHAPES.index(rectangles.TRIANGLE)
    assert int(shape_of(mask.block(5, 3, 0, 5))) == rectangles.SHAPES.index(rectangles.WHOLE)
    assert int(shape_of(mask.block(0, 3, 3, 5))) == rectangles.SHAPES.index(rectangles.NOTHING)
    assert int(shape_of(mask.block(0, 3, 0, 5))) == len(rectangles.SHAPES)


def arrays(length=LENGTH, heads=4, size=8):
    keys = jax.random.split(jax.random.key(0), 4)
    every = (heads, KV_HEADS, KV_HEADS, heads)
    return [jax.random.normal(key, (2, length, n, size)) for key, n in zip(keys, every, strict=True)]


def on_mesh(scheme, axes, kernel):
    return jax.shard_map(
        lambda q, k, v, mask: scheme(q, k, v, mask, axes, kernel),
        mesh=make_mesh(ring=SHARDS),
        in_specs=(SHARD,) * 4,
        out_specs=SHARD,
        check_vma=False,
    )


SCHEMES = {
    "one_device": lambda kernel: lambda q, k, v, mask: local_attention(q, k, v, mask, kernel),
    "ring": lambda kernel: on_mesh(ring_attention, "ring", kernel),
    "all_gather": lambda kernel: on_mesh(all_gather_attention, ("ring", "ulysses"), kernel),
}


@partial(jax.jit, static_argnums=(0, 1))
def run(scheme, kernel, inputs, mask):
    """out, dq, dk, dv."""
    q, k, v, d_out = inputs
    attend = dense_attention if scheme == "dense" else SCHEMES[scheme](kernel)
    out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, mask), q, k, v)
    return (out, *pull(d_out))


def check(scheme, kernel, mask):
    inputs = arrays()
    for name, a, b in zip(
        ("out", "dq", "dk", "dv"), run(scheme, kernel, inputs, mask), run("dense", None, inputs, mask), strict=True
    ):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(np.abs(b).max(), 1e-30), err_msg=name)


@pytest.mark.parametrize("scheme", ["ring", pytest.param("all_gather", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name",
    ["zigzag_padded", "packed", "empty"]
    + [pytest.param(name, marks=pytest.mark.slow) for name in ("causal", "padded", "zigzag")],
)
def test_the_tile_does_what_has_a_shape(scheme, name):
    check(scheme, PROVEN, masks()[name][0])


def test_the_tile_does_what_is_not_causal():
    check("all_gather", PROVEN, masks()["full"][0])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["causal", "padded", "wide_window"])
def test_the_tile_does_a_whole_sequence(name):
    check("one_device", PROVEN, masks()[name][0])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zigzag", "striped", "block_causal", "packed_within", "rows_disagree", "window"])
def test_the_fallback_does_the_rest(name):
    check("one_device", NEVER, masks()[name][0])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["striped", "block_causal", "packed_within", "rows_disagree"])
def test_both_in_one_ring(name):
    check("ring", ANY, masks()[name][0])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full_padded", "window_of_128"])
def test_both_in_one_gathered_context(name):
    check("all_gather", ANY, masks()[name][0])


def test_a_query_that_sees_nothing():
    """out 0 and lse -inf, and no gradient whatever its d_out: the tile's triangle knows nothing of padding."""
    q, k, v, d_out = arrays(8)
    mask = Mask.causal(positions(length=8), jnp.where(positions(length=8) < 5, 0, -1))
    whole = PROVEN.forward(q, k, v, mask, ScoreMod.plain(8)).whole()
    out, lse = whole.out, whole.lse
    assert np.isneginf(lse[:, :, 5:]).all()
    assert (np.asarray(out[:, 5:]) == 0).all()
    assert np.isfinite(lse[:, :, :5]).all()
    gradients = PROVEN.backward(q, k, v, mask, ScoreMod.plain(8), BackwardInputs.of(whole, 1e3 * d_out))
    for x in gradients[:3]:
        assert (np.asarray(x[:, 5:]) == 0).all()
        assert np.isfinite(x).all()


@pytest.mark.slow
def test_no_collective_is_in_a_branch():
    """All permutes of a ring with the kernel are in one computation, the program's own, as many as without it."""

    def permutes(kernel) -> list[int]:
        text = run.lower("ring", kernel, arrays(), masks()["zigzag"][0]).compile().as_text()
        return [n for n in (part.count(" collective-permute(") for part in text.split("\n\n")) if n]

    assert permutes(PROVEN) == permutes(BLOCKWISE)
    assert len(permutes(PROVEN)) == 1


def test_pieces_are_shards():
    q, k = jnp.zeros((1, 64, 1, 8)), jnp.zeros((1, 256, 1, 8))
    assert rectangles._piece(q, k) == 64
    assert rectangles._piece(q, k[:, :200]) == 200
    assert rectangles._piece(q[:, :1], k) == 256
