"""The settings of a network, of its attention, and of the mesh that computes it: what `rlring` is asked for."""

from typing import Annotated, Literal

from jax.sharding import Mesh
from pydantic import Field, model_validator

from agents.section import Count, Fraction, Section, Size, Whole
from rlring import AttentionConfig, SparsePattern, TransformerConfig, make_mesh
from rlring.attention.kernels import KERNELS
from rlring.attention.schemes import SCHEMES
from rlring.remat import Remat


class ModelConfig(Section):
    """Shape of the network (`rlring.TransformerConfig`; bc and agents that learn a value take width and layers)."""

    width: Size = TransformerConfig.width
    layers: Size = TransformerConfig.layers
    heads: Size = TransformerConfig.heads
    kv_heads: Size | None = TransformerConfig.kv_heads
    feed_forward: Size | None = TransformerConfig.feed_forward
    feed_forward_tile: Count = TransformerConfig.feed_forward_tile
    rope_base: Annotated[float, Field(gt=1, le=1e30)] = TransformerConfig.rope_base
    rope_fraction: Fraction | None = None
    """Share of each head rotated by position; the rest looks things up however far back they stand. None: 0 for fused
    tokens, whose steps and rewards tell all that order would; 1 for rsar tokens and for text, which only their places
    bind together."""
    log_scaling: bool = TransformerConfig.log_scaling
    """Queries grow with the logarithm of the keys that they see, by a factor learnt for each head
    (`rlring.TransformerConfig`): attention stays sharp on contexts longer than those of training."""
    qk_norm: bool = TransformerConfig.qk_norm
    """Queries and keys have unit root mean square, times learnt gains (`rlring.TransformerConfig`): a query finds its
    key among many by direction alone."""
    compute_type: Literal["float32", "bfloat16"] = TransformerConfig.compute_type
    remat: Remat = TransformerConfig.remat
    fsdp: bool = TransformerConfig.fsdp
    """Weights and optimizer state live in parts, one on each device, those along a sequence included."""
    dense_every: Size | None = TransformerConfig.dense_every
    """Every so many layers one sees the whole context; the others what attention.scheme "sparse" shows them, or
    the last `local_window` tokens."""
    local_window: Size | None = TransformerConfig.local_window

    def made(self, *, rope_fraction: float, attention: AttentionConfig | None = None) -> TransformerConfig:
        """Returns the library's; rope_fraction where none is set. UsageError for a shape that cannot be."""
        settings = self.model_dump()
        settings["rope_fraction"] = rope_fraction if self.rope_fraction is None else self.rope_fraction
        return TransformerConfig(**settings, attention=attention or AttentionConfig())


class SparseSection(Section):
    """Which blocks of the context each head sees (`rlring.SparsePattern`)."""

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
    """With scheme "sparse". model.dense_every makes some layers dense."""

    @model_validator(mode="after")
    def sparse_with_its_scheme(self) -> "AttentionSection":
        if (self.scheme == "sparse") != (self.sparse is not None):
            raise ValueError(
                f"scheme 'sparse' and the table attention.sparse go together; got scheme '{self.scheme}' "
                f"{'with' if self.sparse else 'without'} it; an empty table is the default pattern"
            )
        return self

    def made(self, *, sharded: bool) -> AttentionConfig:
        """Returns the library's: on one device a ring is blockwise attention."""
        fields = self.model_dump(exclude={"scheme", "sparse"})
        if self.sparse is not None:
            return AttentionConfig(scheme="sparse", sparse=SparsePattern(**self.sparse.model_dump()), **fields)
        return AttentionConfig(scheme=self.scheme if sharded else "blockwise", **fields)


class MeshConfig(Section):
    """Devices along each mesh axis; their product is the number of devices used."""

    data: Size = 1
    ring: Size = 1
    ulysses: Size = 1

    @property
    def devices(self) -> int:
        return self.data * self.ring * self.ulysses

    def made(self) -> Mesh | None:
        """Returns the mesh; None where it is one device."""
        return make_mesh(data=self.data, ring=self.ring, ulysses=self.ulysses) if self.devices > 1 else None


def check_network(model: ModelConfig, attention: AttentionSection, mesh: MeshConfig) -> None:
    """Raises ValueError for a Transformer that cannot be made, or whose attention does not fit the mesh.

    Checked in configs and not only by the library, so that nothing is begun for a run that cannot start.
    """
    model.made(rope_fraction=0.0, attention=attention.made(sharded=mesh.devices > 1))
    split = [axis for axis in ("ring", "ulysses") if getattr(mesh, axis) > 1]
    if attention.scheme in SCHEMES and not set(split) <= set(SCHEMES[attention.scheme].splits):
        fitting = ["auto", *(name for name, scheme in SCHEMES.items() if set(split) <= set(scheme.splits))]
        raise ValueError(
            f"attention.scheme '{attention.scheme}' does not fit mesh.ring={mesh.ring}, mesh.ulysses={mesh.ulysses}; "
            f"use one of {', '.join(map(repr, fitting))}, or another mesh"
        )


def check_batch(batch: int, accumulate: int, mesh: MeshConfig) -> None:
    """Raises ValueError where the devices cannot share a batch, or each part of it."""
    if batch % (mesh.data * accumulate):
        raise ValueError(
            f"train.batch={batch} does not divide over mesh.data={mesh.data} devices in train.accumulate={accumulate} "
            "parts"
        )
