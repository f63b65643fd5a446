"""The language model: the same losses on every mesh, however its weights are sharded and whatever is computed twice."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from rlring import AttentionConfig, TransformerConfig, UsageError, make_mesh, sharding
from rlring.attention import zigzag_order
from rlring.language_model import (
    PRESETS,
    LanguageModel,
    LanguageModelConfig,
    Training,
    cross_entropy,
    laid_out,
    positions,
    preset,
)

MESHES = ({}, {"data": 2}, {"ring": 4}, {"ulysses": 4}, {"data": 2, "ring": 2, "ulysses": 2})
STEPS, ROWS, LENGTH, VOCABULARY = 3, 8, 64, 40


@pytest.fixture(autouse=True)
def everything_is_split(monkeypatch):
    """Small weights too."""
    monkeypatch.setattr(sharding, "SMALLEST_SPLIT", 0)


def config(*, is_tied: bool = False, **changes) -> LanguageModelConfig:
    attention = AttentionConfig("hybrid", block_q=16, block_k=16)
    shape = {"width": 32, "layers": 2, "heads": 4, "feed_forward": 48, "feed_forward_tile": 4, "attention": attention}
    return LanguageModelConfig(VOCABULARY, TransformerConfig(**shape | changes), is_tied=is_tied, loss_tile=5)


def losses(model: LanguageModelConfig, mesh_sizes: dict[str, int] | None, *, accumulate: int = 1) -> list[float]:
    mesh = None if mesh_sizes is None else make_mesh(**mesh_sizes)
    training = Training(model, optax.adamw(1e-2), mesh, accumulate)
    init, step = training.jitted()
    state, found = init(), []
    for i in range(STEPS):
        text = np.random.default_rng(i).integers(0, VOCABULARY, (ROWS, LENGTH + 1), dtype=np.int32)
        text[0, -9:] = -1  # nothing follows: no loss there, and a token that is not looked up
        tokens, targets = laid_out(text, mesh=mesh)
        state, loss = step(state, np.maximum(tokens, 0), targets)
        found.append(float(loss))
    return found


@pytest.fixture(scope="module")
def reference() -> list[float]:
    """One device, everything kept, the whole batch at once."""
    return losses(config(feed_forward_tile=64), None)


def test_training_learns(reference):
    assert reference[0] == pytest.approx(np.log(VOCABULARY), rel=0.2)
    assert len(set(reference)) == STEPS


# Every mesh with everything, and every single thing on the largest mesh.
@pytest.mark.slow  # minutes: a program for each mesh and policy
@pytest.mark.parametrize(
    ("mesh", "fsdp", "remat", "accumulate"),
    [
        *((mesh, fsdp, "all", 1) for mesh in MESHES for fsdp in (False, True)),
        *((MESHES[-1], fsdp, remat, 1) for fsdp in (False, True) for remat in ("none", "attention")),
        *((mesh, True, "attention", 4) for mesh in MESHES),
        (None, False, "none", 4),
    ],
    ids=str,
)
def test_the_same_losses(reference, mesh, fsdp, remat, accumulate):
    model = config(fsdp=fsdp, remat=remat)
    np.testing.assert_allclose(losses(model, mesh, accumulate=accumulate), reference, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("length", [0, 13])
def test_lengths_that_a_mesh_does_not_divide(length):
    """Of one step, and of the losses alone, which takes tokens that were not padded."""
    model = config(layers=1)
    text = np.random.default_rng(0).integers(0, VOCABULARY, (4, length + 1), dtype=np.int32)

    def loss(mesh):
        init, step = Training(model, mesh=mesh).jitted()
        return float(step(init(), *laid_out(text, mesh=mesh))[1])

    assert loss(make_mesh(**MESHES[-1])) == pytest.approx(loss(None), rel=1e-6)
    network = LanguageModel(model, rngs=nnx.Rngs(0))
    tokens = jnp.asarray(text)
    one, many = (network.loss(tokens[:, :-1], tokens[:, 1:], mesh=mesh) for mesh in (None, make_mesh(ring=4)))
    np.testing.assert_allclose(many, one, rtol=1e-6)


@pytest.mark.slow
def test_the_same_losses_with_a_tied_head(reference):
    found = [losses(config(is_tied=True, fsdp=True), mesh) for mesh in (None, MESHES[-1])]
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5)
    assert abs(found[0][0] - reference[0]) > 1e-3


@pytest.mark.parametrize("tile", [1, 5, 64])
@pytest.mark.parametrize("mesh", [None, *MESHES], ids=str)
def test_tiled_cross_entropy(mesh, tile):
    """Against the whole logits at once: the sum, and both gradients."""
    mesh = None if mesh is None else make_mesh(**mesh)
    x, head = jax.random.normal(jax.random.key(0), (2, 48, 8)), jax.random.normal(jax.random.key(1), (8, 30))
    targets = jax.random.randint(jax.random.key(2), (2, 48), -1, 30)

    def whole(x, head):
        logits = jax.nn.log_softmax(x @ head)
        return -jnp.where(targets < 0, 0, jnp.take_along_axis(logits, targets[..., None] % 30, -1)[..., 0]).sum()

    want, want_gradients = jax.value_and_grad(whole, (0, 1))(x, head)
    tiled = jax.value_and_grad(lambda x, head: cross_entropy(x, head, targets, tile=tile, mesh=mesh), (0, 1))
    got, gradients = jax.jit(tiled)(x, head)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for a, b in zip(gradients, want_gradients, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("mesh", [None, *MESHES], ids=str)
def test_positions_are_those_of_the_layout(mesh):
    mesh = None if mesh is None else make_mesh(**mesh)
    ring = 1 if mesh is None else mesh.shape["ring"]
    text = np.broadcast_to(np.arange(65), (2, 65))
    tokens, targets = laid_out(text, mesh=mesh)
    np.testing.assert_array_equal(jax.jit(lambda: positions(2, 64, mesh=mesh))(), tokens)
    np.testing.assert_array_equal(tokens[0], zigzag_order(64, ring) if ring > 1 else np.arange(64))
    np.testing.assert_array_equal(targets, tokens + 1)


def test_every_device_keeps_a_part_of_everything():
    """Weights and optimizer state: an eighth of the bytes, but for what no device count divides."""
    mesh = make_mesh(data=2, ring=2, ulysses=2)
    init, _ = Training(config(fsdp=True), optax.adamw(1e-2), mesh).jitted()
    arrays = [x for x in jax.tree.leaves(init()) if x.ndim]
    assert all(x.addressable_shards[0].data.size * 8 == x.size for x in arrays)
    whole, _ = Training(config(), optax.adamw(1e-2), mesh).jitted()
    assert all(x.addressable_shards[0].data.size == x.size for x in jax.tree.leaves(whole()))


@pytest.mark.slow
@pytest.mark.parametrize("ring", [4, 8])
def test_activations_are_not_gathered(ring):
    """The trap of FSDP: a partitioner that gathers tokens instead of weights. No collective moves as much as that."""
    mesh = make_mesh(ring=ring)
    training = Training(config(fsdp=True, remat="all", feed_forward_tile=4096), optax.adamw(1e-2), mesh)
    _, step = training.jitted()
    length = 2**14
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    compiled = step.lower(jax.eval_shape(training.init), tokens, tokens).compile()
    text = compiled.as_text()
    gathers = [line.split(" all-gather(")[0] for line in text.splitlines() if " all-gather(" in line]
    assert gathers
    assert not [line for line in gathers if str(length) in line]


@pytest.mark.parametrize(
    ("name", "billions"),
    [("350m", 0.373), ("1b", 1.26), ("3b", 3.43), ("7b", 6.74), ("13b", 13.02), ("30b", 32.53), ("65b", 65.29)],
)
def test_presets_have_the_sizes_of_llama(name, billions):
    model = nnx.eval_shape(lambda: LanguageModel(preset(name), rngs=nnx.Rngs(0)))
    count = sum(x.size for x in jax.tree.leaves(nnx.state(model)))
    assert count / 1e9 == pytest.approx(billions, abs=0.006)


def test_errors():
    assert len(PRESETS) == 7
    with pytest.raises(UsageError, match=r"there is no preset '3B'\. Choose one of 350m, 1b"):
        preset("3B")
    with pytest.raises(UsageError, match=r"accumulate=3 cuts the batch into equal parts; got 8 rows"):
        losses(config(), None, accumulate=3)
    with pytest.raises(UsageError, match=r"without a mesh everything lives on one device"):
        Training(config()).shardings()
    with pytest.raises(UsageError, match=r"on a CPU the two are the same memory\. Use remat 'all'"):
        losses(config(remat="offload"), {"ring": 2})
