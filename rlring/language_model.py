"""A language model: token embedding, Transformer, head, tiled loss, training step, and presets with LLaMA's shapes.

The tokens of a batch are in the zigzag order of the mesh's ring, so that every device has the same work. Positions are
computed within the program, because the positions of 67 million tokens would be too large a constant.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Float32, Int, Int32

from rlring import sharding
from rlring.attention import AttentionConfig, Mask, zigzag_order
from rlring.attention.blocks import pad
from rlring.errors import UsageError
from rlring.mesh import AXES, SEQUENCE_AXES
from rlring.sharding import TOKENS, gathered, state_sharding
from rlring.transformer import Transformer
from rlring.transformer_config import TransformerConfig

NO_TARGET = -1  # the target of a token that does not count in the loss

# Width, layers, heads, feed-forward. 7b to 65b are LLaMA's (2302.13971, table 2). 3b is OpenLLaMA's, except that
# OpenLLaMA has 32 heads of size 100: a TPU computes on 128 numbers at a time, and compiling heads of size 100 takes
# three times as long. The two small shapes follow LLaMA's rule for the feed-forward: 8 / 3 of the width, rounded up to
# a multiple of 256.
_SHAPES = {
    "350m": (1024, 24, 16, 2816),
    "1b": (2048, 22, 16, 5632),
    "3b": (3200, 26, 25, 8640),
    "7b": (4096, 32, 32, 11008),
    "13b": (5120, 40, 40, 13824),
    "30b": (6656, 60, 52, 17920),
    "65b": (8192, 80, 64, 22016),
}
PRESETS = tuple(_SHAPES)


@dataclass(frozen=True)
class LanguageModelConfig:
    """The configuration of a language model."""

    vocabulary: int = 256
    transformer: TransformerConfig = field(default_factory=TransformerConfig)
    is_tied: bool = False
    """Whether the output head shares the embedding's weights."""
    loss_tile: int = 1024
    """Tokens per device whose logits are computed at a time."""

    def __post_init__(self) -> None:
        if self.transformer.attention.deterministic:
            raise UsageError(
                "a language model lays its tokens out in the zigzag order of the ring, in which no order of blocks is "
                "the same on all rings; got attention.deterministic=True. Leave it out, or use rlring.Transformer on "
                "tokens in their order."
            )


def preset(name: str, **changes) -> LanguageModelConfig:
    """Returns a language model in LLaMA's shape, with settings for training on a cluster.

    `changes` are fields of its TransformerConfig that replace those of the preset.

    Raises:
        UsageError: there is no such preset.
    """
    if name not in _SHAPES:
        raise UsageError(f"there is no preset {name!r}. Choose one of {', '.join(PRESETS)}.")
    width, layers, heads, feed_forward = _SHAPES[name]
    shape = {"width": width, "layers": layers, "heads": heads, "feed_forward": feed_forward}
    how = {
        "compute_type": "bfloat16",
        "remat": "all",
        "fsdp": True,
        "attention": AttentionConfig("hybrid", kernel="auto"),
    }
    return LanguageModelConfig(32_000, TransformerConfig(**shape | how | changes))


class LanguageModel(nnx.Module):
    """A language model, which predicts the next token at each position."""

    def __init__(self, config: LanguageModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        V, D = config.vocabulary, config.transformer.width
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), (V, D), jnp.float32))
        self.transformer = Transformer(config.transformer, rngs=rngs)
        self.head = None if config.is_tied else nnx.Param(jax.random.normal(rngs.params(), (D, V)) / D**0.5)

    def __call__(
        self, tokens: Int[Array, "B T"], position: Int[Array, "B T"], *, mesh: Mesh | None = None
    ) -> Float[Array, "B T D"]:
        """Returns the features of every token, from which the head predicts the next token."""
        dtype = self.config.transformer.compute_type
        # Gathering rounds to the compute type. After the cast to float32, the gradients of a token are summed in it.
        embedding = self._whole(self.embedding[...], mesh).astype(jnp.float32)
        return self.transformer(jnp.take(embedding, tokens, axis=0).astype(dtype), Mask.causal(position), mesh=mesh)

    def loss(
        self, tokens: Int[Array, "B T"], targets: Int[Array, "B T"], *, mesh: Mesh | None = None
    ) -> Float32[Array, ""]:
        """Returns the sum of the cross-entropies of all targets other than NO_TARGET; tokens and targets come from
        `laid_out`."""
        position = positions(*tokens.shape, mesh=mesh)
        x = self(tokens, position, mesh=mesh)
        head = self._whole(self.embedding[...] if self.head is None else self.head[...], mesh)
        if self.head is None:
            head = head.T / self.config.transformer.width**0.5  # the embedding has unit variance, a head has 1 / D
        return cross_entropy(x, head.astype(x.dtype), targets, tile=self.config.loss_tile, mesh=mesh)

    def _whole(self, weight: Array, mesh: Mesh | None) -> Array:
        config = self.config.transformer
        if not config.fsdp or mesh is None:
            return weight
        return gathered(weight, mesh, config.compute_type, smallest=sharding.SMALLEST_SPLIT)


def cross_entropy(
    x: Float[Array, "B T D"], head: Float[Array, "D V"], targets: Int[Array, "B T"], *, tile: int, mesh: Mesh | None
) -> Float32[Array, ""]:
    """Returns the sum of the cross-entropies of all targets other than NO_TARGET.

    Each device computes `tile` tokens at a time, so that the logits of a whole sequence never exist, not in the
    backward pass either. A length that the mesh does not divide is padded.
    """

    @jax.checkpoint
    def of_tile(x, targets, head):
        logits = jnp.einsum("btd,dv->btv", x, head, preferred_element_type=jnp.float32)
        picked = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
        return jnp.where(targets == NO_TARGET, 0.0, jax.nn.logsumexp(logits, axis=-1) - picked).sum()

    def of_shard(x, targets, head):
        if mesh is not None:
            # Each device sums its gradient of the head over its tiles. These sums are added across devices only once.
            head = jax.lax.pcast(head, AXES, to="varying")
        B, T, D = x.shape
        tiles = max(1, -(-T // tile))
        size = -(-T // tiles)
        x = jnp.pad(x, [(0, 0), (0, tiles * size - T), (0, 0)])
        targets = jnp.pad(targets, [(0, 0), (0, tiles * size - T)], constant_values=NO_TARGET)
        pieces = x.reshape(B, tiles, size, D).swapaxes(0, 1), targets.reshape(B, tiles, size).swapaxes(0, 1)
        return jax.lax.map(lambda piece: of_tile(*piece, head), pieces).sum()[None]

    if mesh is None:
        return of_shard(x, targets, head)[0]
    more = -x.shape[1] % (mesh.shape["ring"] * mesh.shape["ulysses"])
    x = pad(x, 1, x.shape[1] + more)
    targets = jnp.pad(targets, [(0, 0), (0, more)], constant_values=NO_TARGET)
    specs = (P("data", SEQUENCE_AXES, None), TOKENS, P())
    return jax.shard_map(of_shard, mesh=mesh, in_specs=specs, out_specs=P(AXES))(x, targets, head).sum()


def positions(batch: int, length: int, *, mesh: Mesh | None = None) -> Int32[Array, "B T"]:
    """Returns the position of each token in the order of `laid_out`; each device computes its own part."""
    place, ring = jnp.arange(length, dtype=jnp.int32), _balanced(length, mesh)
    if ring > 1:
        chunk = length // (2 * ring)
        shard, offset = place // (2 * chunk), place % (2 * chunk)
        which = jnp.where(offset < chunk, shard, 2 * ring - 1 - shard)  # index of the chunk, as in zigzag_order
        place = which * chunk + offset % chunk
    position = jnp.broadcast_to(place, (batch, length))
    is_split = mesh is not None and length % (mesh.shape["ring"] * mesh.shape["ulysses"]) == 0
    return position if not is_split else jax.lax.with_sharding_constraint(position, NamedSharding(mesh, TOKENS))


def laid_out(text: Int[np.ndarray, "B tokens"], *, mesh: Mesh | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Returns input tokens and their targets (the next tokens), [B, T] each, in the zigzag order of the mesh's ring.

    They are padded to a length that the mesh divides; padding has the target NO_TARGET.
    """
    tokens, targets = text[:, :-1], text[:, 1:]
    more = 0 if mesh is None else -tokens.shape[1] % (mesh.shape["ring"] * mesh.shape["ulysses"])
    tokens, targets = (
        np.pad(x, ((0, 0), (0, more)), constant_values=c) for x, c in ((tokens, 0), (targets, NO_TARGET))
    )
    ring = _balanced(tokens.shape[1], mesh)
    order = zigzag_order(tokens.shape[1], ring) if ring > 1 else slice(None)
    return tokens[:, order], targets[:, order]


def _balanced(length: int, mesh: Mesh | None) -> int:
    """Returns the number of devices of the zigzag order: the ring, or 1 if 2 * ring does not divide the length."""
    ring = 1 if mesh is None else mesh.shape["ring"]
    return ring if length % (2 * ring) == 0 else 1


class TrainState(NamedTuple):
    """The weights and the optimizer state."""

    weights: nnx.State
    optimizer: optax.OptState

    def updated(self, optimizer: optax.GradientTransformation, gradients) -> "TrainState":
        """Returns the state after one update of the optimizer with these gradients."""
        with jax.numpy_dtype_promotion("standard"):  # optax needs it for the powers of the step count in Adam
            changes, state = optimizer.update(gradients, self.optimizer, self.weights)
        return TrainState(optax.apply_updates(self.weights, changes), state)


@dataclass(frozen=True)
class Training:
    """The training of a language model: init() and step(), which jitted() compiles for the mesh."""

    config: LanguageModelConfig
    optimizer: optax.GradientTransformation = field(
        default_factory=lambda: optax.adamw(3e-4, b2=0.95, weight_decay=0.1)
    )
    mesh: Mesh | None = None
    accumulate: int = 1
    """Micro-batches per update, whose gradients are summed."""

    def init(self, seed: Int[Array, ""] | int = 0) -> TrainState:
        """Returns the state before the first step."""
        weights = nnx.state(LanguageModel(self.config, rngs=nnx.Rngs(jax.random.key(seed))))
        return TrainState(weights, self.optimizer.init(weights))

    def step(
        self, state: TrainState, tokens: Int[Array, "B T"], targets: Int[Array, "B T"]
    ) -> tuple[TrainState, Float32[Array, ""]]:
        """Returns the state after one training step, and the mean loss of the batch before the update.

        Raises:
            UsageError: the number of rows is not a multiple of `accumulate`.
        """
        count = jnp.maximum((targets != NO_TARGET).sum(), 1).astype(jnp.float32)
        graph = nnx.graphdef(nnx.eval_shape(lambda: LanguageModel(self.config, rngs=nnx.Rngs(0))))

        def loss(weights, tokens, targets):
            return nnx.merge(graph, weights).loss(tokens, targets, mesh=self.mesh) / count

        def add(total, part):
            return jax.tree.map(jnp.add, total, jax.value_and_grad(loss)(state.weights, *part)), None

        if self.accumulate == 1:
            total = jax.value_and_grad(loss)(state.weights, tokens, targets)
        else:
            parts = self._parts(tokens), self._parts(targets)
            zero = jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, state.weights)
            total, _ = jax.lax.scan(add, zero, parts)
        mean, gradients = total
        return state.updated(self.optimizer, gradients), mean

    def shardings(self) -> TrainState:
        """Returns the sharding of every array of the state.

        Raises:
            UsageError: there is no mesh.
        """
        if self.mesh is None:
            raise UsageError(
                "without a mesh everything lives on one device. Give Training a mesh=rlring.make_mesh(...)."
            )
        return state_sharding(jax.eval_shape(self.init), self.mesh, fsdp=self.config.transformer.fsdp)

    def jitted(self):
        """Returns init() and step() compiled by jax.jit for the mesh; step donates its input state."""
        if self.mesh is None:
            return jax.jit(self.init), jax.jit(self.step, donate_argnums=0)
        state, tokens, loss = self.shardings(), NamedSharding(self.mesh, TOKENS), NamedSharding(self.mesh, P())
        step = jax.jit(self.step, in_shardings=(state, tokens, tokens), out_shardings=(state, loss), donate_argnums=0)
        return jax.jit(self.init, out_shardings=state), step

    def _parts(self, tokens: Int[Array, "B T"]) -> Int[Array, "parts rows T"]:
        """Returns the batch split into `accumulate` parts, each of which has rows of every device."""
        batch, length = tokens.shape
        if batch % self.accumulate:
            raise UsageError(
                f"accumulate={self.accumulate} cuts the batch into equal parts; got {batch} rows. Use a divisor."
            )
        parts = tokens.reshape(batch // self.accumulate, self.accumulate, length).swapaxes(0, 1)
        if self.mesh is None:
            return parts
        return jax.lax.with_sharding_constraint(parts, NamedSharding(self.mesh, P(None, *TOKENS)))
