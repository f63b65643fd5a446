"""The contract: every scheme equals dense attention, forward and all gradients, on every mesh."""

import itertools
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlring.attention import AttentionConfig, Mask, attention, online_softmax, striped_order, zigzag_order
from rlring.attention.kernels import KERNELS
from rlring.attention.ring_transport import Transport
from rlring.attention.schemes import SCHEMES
from rlring.errors import UsageError
from rlring.mesh import make_mesh

CASES = [
    ("blockwise", {}),
    ("ring", {"ring": 2}),
    ("ring", {"ring": 4}),
    ("ring", {"ring": 8}),
    ("ring", {"data": 2, "ring": 2}),
    ("all_gather", {"ring": 8}),
    ("all_gather", {"ring": 2, "ulysses": 2}),
    ("ulysses", {"ulysses": 2}),
    ("ulysses", {"ulysses": 4}),
    ("hybrid", {"ring": 2, "ulysses": 2}),
    ("hybrid", {"ring": 2, "ulysses": 4}),
]
# A scheme that is new in the table is tested from then on. dense is the reference; test_sparse.py tests sparse.
LISTED = {"dense", "sparse", *(scheme for scheme, _ in CASES)}
UNLISTED = {name: dict.fromkeys(row.splits, 2) for name, row in SCHEMES.items() if name not in LISTED}
POWERS = (1, 2, 4, 8)
EVERY_MESH = [{"ring": r, "ulysses": u} for r in POWERS for u in POWERS if r * u <= 8]
EVERY_CASE = [("blockwise", {}), ("ring", {"data": 2, "ring": 4}), ("hybrid", {"data": 2, "ring": 2, "ulysses": 2})]
EVERY_CASE += [("ring", {"ring": r}) for r in POWERS] + [("ulysses", {"ulysses": u}) for u in POWERS]
EVERY_CASE += [(scheme, mesh) for scheme in ("all_gather", "hybrid") for mesh in EVERY_MESH]
EVERY_CASE += UNLISTED.items()
ONE_OF_EACH = [*(CASES[n] for n in (0, 2, 5, 8, 9)), *UNLISTED.items()]
HEADS, SIZE = 4, 8
BLOCKS = {"block_q": 6, "block_k": 5, "scores": 130}  # divide no length; two sequences do not fit at once
LENGTH = 48


def arrays(kv_heads: int, length: int = LENGTH, dtype=jnp.float32, heads: int = HEADS, rows: int = 2):
    """q, k, v and the gradient of the out."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(rows, length, heads, SIZE) for heads in (heads, kv_heads, kv_heads, heads)]
    return [jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes, strict=True)]


def causal_masks(length: int = LENGTH) -> dict[str, Mask]:
    position = jnp.tile(jnp.arange(length, dtype=jnp.int32), (2, 1))
    packed = jnp.stack([position[0] // 13, jnp.where(position[0] < 30, 3, 1)])
    ragged = jnp.where(position < jnp.array([[length - 11], [17]]), 0, -1)
    return {
        "plain": Mask.causal(position),
        "block_causal": Mask.causal(position // 4),
        "packed": Mask.causal(position, packed),
        "ragged": Mask.causal(position, ragged),
        "empty": Mask.causal(position, jnp.full_like(position, -1)),
        "first_rows_see_nothing": replace(Mask.causal(position), k_position=position + 20),
        "zigzag": Mask.causal(position[:, zigzag_order(length, 4)]),
        "striped": Mask.causal(position[:, striped_order(length, 4)], packed[:, striped_order(length, 4)]),
        "shuffled": Mask.causal(jax.random.permutation(jax.random.key(1), position, axis=1, independent=True), packed),
    }


AGENTS = {
    "causal": {},
    "window": {"window": 9},
    "full": {"is_causal": False},
    "full, window": {"is_causal": False, "window": 9},
}


def masks_of(kind: str) -> dict[str, Mask]:
    """Those of a kind are one program."""
    return {name: replace(mask, **AGENTS[kind]) for name, mask in causal_masks().items()}


@partial(jax.jit, static_argnames=("config", "mesh"))
def run(inputs, mask, config, mesh=None):
    """out, dq, dk, dv."""
    q, k, v, d_out = inputs
    out, pull = jax.vjp(lambda q, k, v: attention(q, k, v, mask, config=config, mesh=mesh), q, k, v)
    return (out, *pull(d_out))


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def relative_error(a, b) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30))


def check(scheme, mesh, inputs, masks, tolerance=1e-5):
    mesh = make_mesh(**mesh) if mesh else None
    config = AttentionConfig(scheme, **BLOCKS) if isinstance(scheme, str) else scheme
    for name, mask in masks.items():
        expected = run(inputs, mask, AttentionConfig("dense"))
        got = run(inputs, mask, config, mesh)
        for part, a, b in zip(("out", "dq", "dk", "dv"), got, expected, strict=True):
            assert np.isfinite(a).all(), (name, part)
            assert relative_error(a, b) <= tolerance, (name, part)


@pytest.mark.parametrize(
    ("scheme", "mesh", "kind"),
    [
        ("blockwise", {}, "causal"),
        *(slow("blockwise", {}, kind) for kind in ("window", "full", "full, window")),
        ("ring", {"ring": 4}, "causal"),
        *(slow("ring", {"ring": 4}, kind) for kind in AGENTS if kind != "causal"),
        *(slow(*case, kind) for case in ONE_OF_EACH[2:] for kind in AGENTS),
    ],
    ids=str,
)
def test_every_mask_with_grouped_heads(scheme, mesh, kind):
    check(scheme, mesh, arrays(kv_heads=2), masks_of(kind))


QUICK_MESHES = [("all_gather", {"ring": 2, "ulysses": 2})]


@pytest.mark.parametrize(
    ("scheme", "mesh"),
    [case if case in QUICK_MESHES else slow(*case) for case in CASES if case not in ONE_OF_EACH],
    ids=str,
)
def test_other_meshes(scheme, mesh):
    check(scheme, mesh, arrays(kv_heads=2), masks_of("window"))


@pytest.mark.slow
@pytest.mark.parametrize("kv_heads", [4, 1])
@pytest.mark.parametrize(("scheme", "mesh"), ONE_OF_EACH, ids=str)
def test_other_groupings(scheme, mesh, kv_heads):
    check(scheme, mesh, arrays(kv_heads), causal_masks())


@pytest.mark.parametrize("platform", ["gpu", slow("tpu")])
@pytest.mark.parametrize(("ring", "kind"), [(4, "causal"), slow(4, "full"), slow(8, "causal"), slow(8, "full")])
def test_the_ring_of_other_platforms(platform, ring, kind):
    """The order of transfer and compute of a GPU and of a TPU, run here."""
    config = AttentionConfig("ring", **BLOCKS, transport=Transport.of(platform))
    check(config, {"ring": ring}, arrays(kv_heads=2), masks_of(kind))


@pytest.mark.parametrize(("scheme", "mesh"), ONE_OF_EACH, ids=str)
def test_one_block_and_a_length_that_does_not_divide(scheme, mesh):
    inputs, position = arrays(2, length=21), jnp.tile(jnp.arange(21, dtype=jnp.int32), (2, 1))
    mask = Mask.causal(position)
    expected = run(inputs, mask, AttentionConfig("dense"))
    got = run(inputs, mask, AttentionConfig(scheme), make_mesh(**mesh) if mesh else None)
    assert max(map(relative_error, got, expected)) <= 1e-5


@pytest.mark.parametrize(("scheme", "mesh"), [*ONE_OF_EACH[:2], *(slow(*case) for case in ONE_OF_EACH[2:])], ids=str)
def test_the_default_blocks(scheme, mesh):
    """Several of them, as users have them."""
    length = 2100
    inputs, position = arrays(2, length), jnp.tile(jnp.arange(length, dtype=jnp.int32), (2, 1))
    mask = Mask.causal(position, position // jnp.array([[length], [900]]))
    expected = run(inputs, mask, AttentionConfig("dense"))
    got = run(inputs, mask, AttentionConfig(scheme), make_mesh(**mesh) if mesh else None)
    assert max(map(relative_error, got, expected)) <= 1e-5


@pytest.mark.parametrize(("scheme", "mesh"), [*CASES[:2], *ONE_OF_EACH[2:], slow(*CASES[2])], ids=str)
def test_bfloat16_is_as_good_as_dense_bfloat16(scheme, mesh):
    mask = causal_masks()["packed"]
    inputs = arrays(2, dtype=jnp.bfloat16)
    with jax.enable_x64(True):
        exact = run([jnp.asarray(x, jnp.float64) for x in inputs], mask, AttentionConfig("dense"))
    dense = run(inputs, mask, AttentionConfig("dense"))
    got = run(inputs, mask, AttentionConfig(scheme, **BLOCKS), make_mesh(**mesh) if mesh else None)
    for part, a, b, c in zip(("out", "dq", "dk", "dv"), got, dense, exact, strict=True):
        assert a.dtype == jnp.bfloat16
        assert relative_error(a, c) <= 2 * relative_error(b, c), part


@pytest.mark.parametrize("kernel", [name for name in KERNELS if name not in ("auto", "jax")])
def test_a_kernel_is_exact_here_or_refuses(kernel):
    """A kernel that is new in the table and runs on a CPU is tested from then on; for the others see kernels/."""
    blockwise, ring = (AttentionConfig(scheme, **BLOCKS, kernel=kernel) for scheme in ("blockwise", "ring"))
    inputs, masks = arrays(kv_heads=2), masks_of("causal")
    try:
        jax.eval_shape(partial(run, config=blockwise), inputs, masks["plain"])
    except UsageError as refusal:
        assert f"attention kernel '{kernel}' cannot run: it needs a" in str(refusal)  # noqa: PT017
        return
    check(blockwise, {}, inputs, masks | {f"full, {name}": mask for name, mask in masks_of("full").items()})
    check(ring, {"ring": 4}, inputs, masks)


@pytest.mark.parametrize("order", ["plain", "zigzag"])
def test_ring_size_does_not_matter(order):
    inputs, mask = arrays(4), causal_masks()[order]
    one = run(inputs, mask, AttentionConfig("ring"), make_mesh())
    for ring in (2, 4, 8):
        got = run(inputs, mask, AttentionConfig("ring"), make_mesh(ring=ring))
        assert max(map(relative_error, got, one)) <= 1e-6


@pytest.mark.parametrize(("scheme", "mesh"), ONE_OF_EACH, ids=str)
def test_a_token_changes_nothing_before_it(scheme, mesh):
    (q, k, v, d_out), mask = arrays(2), causal_masks()["zigzag"]
    mesh, config = make_mesh(**mesh) if mesh else None, AttentionConfig(scheme, **BLOCKS)
    place = int(np.flatnonzero(np.asarray(mask.q_position[0]) == 20)[0])
    before, after = (run((q, k, x, d_out), mask, config, mesh)[0] for x in (v, v.at[:, place].add(1.0)))
    changed = np.asarray(before != after).any((0, 2, 3))
    np.testing.assert_array_equal(changed, np.asarray(mask.q_position[0]) >= 20)


@pytest.mark.parametrize(("scheme", "mesh"), [CASES[0], CASES[2], slow(*CASES[3]), CASES[5]], ids=str)
def test_the_same_bits_twice(scheme, mesh):
    inputs, mask, mesh = arrays(2), causal_masks()["shuffled"], make_mesh(**mesh) if mesh else None
    once, again = (run(inputs, mask, AttentionConfig(scheme, **BLOCKS), mesh) for _ in range(2))
    for a, b in zip(once, again, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheme", "mesh", "kv_heads"),
    [(*case, kv_heads) for case, kv_heads in zip(EVERY_CASE, itertools.cycle((8, 2, 1)), strict=False)],
    ids=str,
)
def test_everything(scheme, mesh, kv_heads):
    """Every scheme on every mesh, every mask, both types; the masks of a kind share a batch, each is judged alone."""
    jax.clear_caches()  # conftest.forget_programs; one of these cases compiles as much as other modules
    mesh, config = make_mesh(**mesh) if mesh else None, AttentionConfig(scheme, **BLOCKS)
    masks = causal_masks()
    together = jax.tree.map(lambda *rows: jnp.concatenate(rows), *masks.values())
    inputs = arrays(kv_heads, heads=8, rows=2 * len(masks))
    halves = [x.astype(jnp.bfloat16) for x in inputs]
    for kind in (together, replace(together, window=9), replace(together, is_causal=False)):
        dense = run(inputs, kind, AttentionConfig("dense"))
        with jax.enable_x64(True):
            exact = run([jnp.asarray(x, jnp.float64) for x in halves], kind, AttentionConfig("dense"))
        dense_halves = run(halves, kind, AttentionConfig("dense"))
        got, got_halves = run(inputs, kind, config, mesh), run(halves, kind, config, mesh)
        for part, *results in zip(("out", "dq", "dk", "dv"), got, dense, got_halves, dense_halves, exact, strict=True):
            for n, name in enumerate(masks):
                a, b, c, d, e = (x[2 * n : 2 * n + 2] for x in results)
                case = f"{part} of {name}, causal {kind.is_causal}, window {kind.window}"
                assert np.isfinite(a).all(), case
                assert np.isfinite(c).all(), case
                assert relative_error(a, b) <= 1e-5, case
                assert relative_error(c, e) <= 2 * relative_error(d, e), f"bfloat16: {case}"


@pytest.mark.parametrize(
    ("dtype", "slope"), [(jnp.float32, 1), slow(jnp.float32, -1), slow(jnp.float16, 1), (jnp.float16, -1)]
)
def test_scores_that_grow_without_end(dtype, slope, monkeypatch):
    """The fast sum takes the first block's top for all; where later scores are far above it, it is done again."""
    q, k, v, d_out = arrays(4, dtype=dtype)
    growth = slope * jnp.linspace(0.0, 60.0, LENGTH, dtype=dtype)[None, :, None, None]
    inputs = (jnp.abs(q) * 3, jnp.abs(k) * growth, v, d_out)
    mask = Mask.causal(jnp.tile(jnp.arange(LENGTH, dtype=jnp.int32), (2, 1)))
    expected = run(inputs, mask, AttentionConfig("dense"))
    got = run(inputs, mask, AttentionConfig("blockwise", **BLOCKS))
    for a, b in zip(got, expected, strict=True):
        assert np.isfinite(a).all()
        # Scores reach 1,000: their own rounding is 1e-4 of a weight.
        assert relative_error(a, b) <= (2e-4 if dtype == jnp.float32 else 1e-2)
    if slope > 0:  # and it was necessary
        monkeypatch.setattr(online_softmax.SoftmaxState, "is_in_range", lambda running: jnp.bool(True))
        other_blocks = BLOCKS | {"block_q": 7}  # compiled anew
        assert not np.isfinite(run(inputs, mask, AttentionConfig("blockwise", **other_blocks))[0]).all()
