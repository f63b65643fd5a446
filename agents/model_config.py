"""The settings of a network, of its attention, and of the mesh that computes it: what `rlring` is asked for."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from agents.section import Count, Fraction, Section, Size, Whole
from rlring import AttentionConfig, SparsePattern


class ModelConfig(Section):
    """Shape of the network (`rlring.TransformerConfig`; bc takes width and layers)."""

    width: Size = 128
    layers: Size = 3
    heads: Size = 4
    kv_heads: Size | None = None
    feed_forward: Size | None = None
    feed_forward_tile: Count = 4096
    rope_base: Annotated[float, Field(gt=1, le=1e30)] = 10_000.0
    rope_fraction: Fraction | None = None
    """Share of each head rotated by position; the rest looks things up however far back they stand. None: 0 for fused
    tokens, whose steps and rewards tell all that order would; 1 for rsar tokens and for text, which only their places
    bind together."""
    log_scaling: bool = False
    """Queries grow with the logarithm of the keys that they see, by a factor learnt for each head
    (`rlring.TransformerConfig`): attention stays sharp on contexts longer than those of training."""
    compute_type: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "attention", "all", "offload"] = "none"
    fsdp: bool = False
    """Weights and optimizer state live in parts, one on each device, those along a sequence included."""
    dense_every: Size | None = None
    """With attention.scheme "sparse": every so many layers one sees the whole context."""

    def shape(self, *, rope_fraction: float) -> dict[str, Any]:
        """Returns the settings of `rlring.TransformerConfig`; rope_fraction where none is set."""
        settings = self.model_dump()
        return settings | {"rope_fraction": rope_fraction if self.rope_fraction is None else self.rope_fraction}


class SparseSection(Section):
    """Which blocks of the context each head sees (`rlring.SparsePattern`)."""

    block: Size = 64
    local_blocks: Size = 16
    stride: Size = 8
    offset: Whole = 0


class AttentionSection(Section):
    scheme: Literal["auto", "dense", "blockwise", "ring", "all_gather", "ulysses", "hybrid", "sparse"] = "ring"
    kernel: Literal["auto", "jax", "cudnn", "splash"] = "jax"
    block_q: Size | None = None
    block_k: Size | None = None
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
        """Returns the library's own: on one device a ring is blockwise attention."""
        own = self.model_dump(exclude={"scheme", "sparse"})
        if self.sparse is not None:
            return AttentionConfig(scheme="sparse", sparse=SparsePattern(**self.sparse.model_dump()), **own)
        return AttentionConfig(scheme=self.scheme if sharded else "blockwise", **own)


class MeshConfig(Section):
    """Devices along each mesh axis; their product is the number of devices used."""

    data: Size = 1
    ring: Size = 1
    ulysses: Size = 1

    @property
    def devices(self) -> int:
        return self.data * self.ring * self.ulysses
