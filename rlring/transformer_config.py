"""The configuration of a Transformer and of the attention of each layer."""

from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

from jax.sharding import Mesh

from rlring.attention import AttentionConfig, Mask
from rlring.errors import UsageError
from rlring.remat import Remat


class Layer(NamedTuple):
    """The attention settings of a layer."""

    attention: AttentionConfig
    window: int | None
    """Window: the number of latest tokens that a query sees, itself included. None: all."""
    rope_fraction: float

    def mask(self, mask: Mask) -> Mask:
        """Returns the mask of this layer: `mask`, restricted to the layer's window if it has one."""
        return mask if self.window is None else mask.within(self.window)


@dataclass(frozen=True)
class TransformerConfig:
    """The configuration of a Transformer: its shape, and how it is computed."""

    width: int = 128
    layers: int = 3
    heads: int = 4
    kv_heads: int | None = None
    """Heads of keys and values; each serves heads / kv_heads query heads. None: as many as heads."""
    head_size: int | None = None
    """Size of each head. None: width / heads."""
    feed_forward: int | None = None
    """Inner width of the feed-forward layer. None: 4 * width."""
    feed_forward_tile: int = 4096
    """Tokens per tile of the blockwise feed-forward (Liu and Abbeel 2023), on each device."""
    rope_base: float = 10_000.0
    rope_fraction: float = 1.0
    """Share of each head that is rotated. The rest of the head does not depend on positions."""
    log_scaling: bool = False
    """Multiplies queries by s * log(number of keys that they may see), with s learnt for each head: attention to one of
    many keys stays sharp on contexts longer than in training (scalable softmax, 2501.19399, equation 3)."""
    qk_norm: bool = False
    """Scales queries and keys to unit root mean square, times learnt gains, before the rotation (2302.05442,
    section 2.1): scores then depend only on the directions of queries and keys."""
    compute_type: Literal["float32", "bfloat16"] = "float32"
    """Type of activations; weights are kept in float32."""
    remat: Remat = "none"
    """What the backward pass recomputes: "none" nothing; "attention" all but the outputs of attention, so the ring runs
    once; "all" everything but the inputs of blocks; "offload" the same, with these inputs in the memory of the host."""
    fsdp: bool = False
    """Splits weights over all devices of the mesh (rlring.sharding), and gathers them block by block."""
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    dense_every: int | None = None
    """Every `dense_every`-th layer sees the whole context; the others see what attention scheme "sparse" shows
    (2407.17678), or the last `local_window` tokens. None: all layers are alike."""
    local_window: int | None = None
    """With dense_every: how many tokens back the other layers see, the query included. These layers rotate whole heads,
    because positions within a window are the same in longer contexts (as in Llama 4, and 2501.18795)."""

    def __post_init__(self) -> None:
        is_sparse = self.attention.scheme == "sparse"
        if self.local_window is not None and (self.dense_every is None or is_sparse or self.local_window < 1):
            raise UsageError(
                f"local_window, at least 1, goes with dense_every and without attention scheme 'sparse'; got "
                f"local_window={self.local_window}, dense_every={self.dense_every}, scheme '{self.attention.scheme}'."
            )
        if self.dense_every is not None:
            if not is_sparse and self.local_window is None:
                raise UsageError(
                    f"dense_every={self.dense_every} goes with attention scheme 'sparse' or with local_window; got "
                    f"'{self.attention.scheme}' without it, where every layer is dense. Leave it out."
                )
            if self.dense_every < 2 or self.layers % self.dense_every:
                raise UsageError(
                    f"every dense_every-th of {self.layers} layers is dense; got dense_every={self.dense_every}. "
                    f"Use a divisor of {self.layers} above 1, or None."
                )
        if self.head_size is None and self.width % self.heads:
            raise UsageError(
                f"width {self.width} does not divide by {self.heads} heads; change one of them or set head_size."
            )
        if self.heads % (self.kv_heads or self.heads):
            raise UsageError(
                f"{self.heads} heads do not divide by {self.kv_heads} kv_heads; choose kv_heads among the divisors."
            )

    def layer_group(self, mesh: Mesh | None = None) -> tuple[Layer, ...]:
        """Returns the settings of each layer of a group; all groups are equal. With `dense_every`, a group has that
        many layers, and the last one is dense; otherwise it is one layer."""
        whole = Layer(self.attention, None, self.rope_fraction)
        if self.dense_every is None:
            return (whole,)
        if self.local_window is not None:
            return (Layer(self.attention, self.local_window, 1.0),) * (self.dense_every - 1) + (whole,)
        # On a mesh sparse attention splits the heads, and so does its dense counterpart.
        scheme = "ulysses" if mesh is not None and mesh.shape["ulysses"] > 1 else "blockwise"
        dense = whole._replace(attention=replace(self.attention, scheme=scheme, sparse=None))
        return (whole,) * (self.dense_every - 1) + (dense,)

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """The sizes D (width), N (query heads), K (key/value heads), H (head size) and F (inner feed-forward width)."""
        return (
            self.width,
            self.heads,
            self.kv_heads or self.heads,
            self.head_size or self.width // self.heads,
            self.feed_forward or 4 * self.width,
        )
