"""The settings of the network, its attention and the device mesh; they become configs of `rlring`."""

from typing import Annotated, Literal

from jax.sharding import Mesh
from pydantic import Field, model_validator

from agents.section import Count, Fraction, Section, Size, Whole
from rlring import AttentionConfig, SparsePattern, TransformerConfig, make_mesh
from rlring.attention.kernels import KERNELS
from rlring.attention.schemes import SCHEMES
from rlring.remat import Remat


class ModelConfig(Section):
    """Shape of the network (`rlring.TransformerConfig`). bc and value-based agents use `width` and `layers` only."""

    width: Size = TransformerConfig.width
    layers: Size = TransformerConfig.layers
    heads: Size = TransformerConfig.heads
    kv_heads: Size | None = TransformerConfig.kv_heads
    feed_forward: Size | None = TransformerConfig.feed_forward
    feed_forward_tile: Count = TransformerConfig.feed_forward_tile
    rope_base: Annotated[float, Field(gt=1, le=1e30)] = TransformerConfig.rope_base
    rope_fraction: Fraction | None = None
    """Share of each head's channels with rotary position embedding. The other channels attend by content, whatever the
    distance. None: 0 for fused tokens, which hold the step index and the reward; 1 for rsar tokens and for text, which
    only their positions bind together."""
    log_scaling: bool = TransformerConfig.log_scaling
    """Whether queries are scaled by the logarithm of the number of visible keys, with a learnt factor per head
    (`rlring.TransformerConfig`). Attention then stays sharp on contexts longer than those of training."""
    qk_norm: bool = TransformerConfig.qk_norm
    """Whether queries and keys are normalised to unit root mean square, times learnt gains
    (`rlring.TransformerConfig`), so that attention depends on their directions alone."""
    compute_type: Literal["float32", "bfloat16"] = TransformerConfig.compute_type
    remat: Remat = TransformerConfig.remat
    fsdp: bool = TransformerConfig.fsdp
    """Whether weights and optimizer state are sharded over all devices, those of the sequence axes included."""
    dense_every: Size | None = TransformerConfig.dense_every
    """Every `dense_every`-th layer attends to the whole context. The other layers attend as attention.scheme "sparse"
    lets them, or to the last `local_window` tokens. None: all layers are alike."""
    local_window: Size | None = TransformerConfig.local_window

    def transformer_config(
        self, *, rope_fraction: float, attention: AttentionConfig | None = None
    ) -> TransformerConfig:
        """Returns the `rlring` config; `rope_fraction` is the default. Raises UsageError for an invalid shape."""
        settings = self.model_dump()
        settings["rope_fraction"] = rope_fraction if self.rope_fraction is None else self.rope_fraction
        return TransformerConfig(**settings, attention=attention or AttentionConfig())


class SparseSection(Section):
    """The blocks of the context that each head attends to (`rlring.SparsePattern`)."""

    block: Size = SparsePattern.block
    local_blocks: Size = SparsePattern.local_blocks
    stride: Size = SparsePattern.stride
    offset: Whole = SparsePattern.offset


class AttentionSection(Section):
    scheme: Literal["auto", *SCHEMES] = "ring"  # pyrefly: ignore[invalid-literal]
    kernel: Literal[*KERNELS] = "jax"  # pyrefly: ignore[invalid-literal]
    block_q: Size | None = AttentionConfig.block_q
    block_k: Size | None = AttentionConfig.block_k
    sparse: SparseSection | None = None
    """The pattern of scheme "sparse". `model.dense_every` makes some layers dense."""

    @model_validator(mode="after")
    def sparse_with_its_scheme(self) -> "AttentionSection":
        if (self.scheme == "sparse") != (self.sparse is not None):
            raise ValueError(
                f"scheme 'sparse' and the table attention.sparse go together; got scheme '{self.scheme}' "
                f"{'with' if self.sparse else 'without'} it; an empty table is the default pattern"
            )
        return self

    def attention_config(self, *, sharded: bool) -> AttentionConfig:
        """Returns the `rlring` config. On one device (not `sharded`), dense schemes become "blockwise"."""
        fields = self.model_dump(exclude={"scheme", "sparse"})
        if self.sparse is not None:
            return AttentionConfig(scheme="sparse", sparse=SparsePattern(**self.sparse.model_dump()), **fields)
        return AttentionConfig(scheme=self.scheme if sharded else "blockwise", **fields)


class MeshConfig(Section):
    """Number of devices along each mesh axis. Their product is the number of devices used."""

    data: Size = 1
    ring: Size = 1
    ulysses: Size = 1

    @property
    def devices(self) -> int:
        return self.data * self.ring * self.ulysses

    def make_mesh(self) -> Mesh | None:
        """Returns the mesh, or None for a single device."""
        return make_mesh(data=self.data, ring=self.ring, ulysses=self.ulysses) if self.devices > 1 else None


def check_network(model: ModelConfig, attention: AttentionSection, mesh: MeshConfig) -> None:
    """Raises ValueError when the Transformer's shape is invalid or its attention scheme does not fit the mesh.

    Configs check this when they are loaded, so that a run that cannot start leaves nothing behind.
    """
    model.transformer_config(rope_fraction=0.0, attention=attention.attention_config(sharded=mesh.devices > 1))
    split = [axis for axis in ("ring", "ulysses") if getattr(mesh, axis) > 1]
    if attention.scheme in SCHEMES and not set(split) <= set(SCHEMES[attention.scheme].splits):
        fitting = ["auto", *(name for name, scheme in SCHEMES.items() if set(split) <= set(scheme.splits))]
        raise ValueError(
            f"attention.scheme '{attention.scheme}' does not fit mesh.ring={mesh.ring}, mesh.ulysses={mesh.ulysses}; "
            f"use one of {', '.join(map(repr, fitting))}, or another mesh"
        )


def check_batch(batch: int, accumulate: int, mesh: MeshConfig) -> None:
    """Raises ValueError when the batch, or a micro-batch of it, does not divide over the data axis of the mesh."""
    if batch % (mesh.data * accumulate):
        raise ValueError(
            f"train.batch={batch} does not divide over mesh.data={mesh.data} devices in train.accumulate={accumulate} "
            "parts"
        )
