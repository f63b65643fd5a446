"""Exact attention over sequences sharded across devices, for JAX: ring, Ulysses, their hybrid, all-gather.

Importing the package does not initialise any device.
"""

from typing import TYPE_CHECKING

from rlring.interrupts import guard_imports, is_command

if is_command():  # the Ctrl-C handling of other programs is left unchanged
    guard_imports()

from rlring.attention import (
    AttentionConfig,
    BlockMask,
    FunctionMask,
    Mask,
    MeshAxes,
    SparsePattern,
    decode_attention,
    inverse_order,
    sharded_attention,
    striped_order,
    zigzag_order,
)
from rlring.cache import KVCache
from rlring.errors import UsageError
from rlring.mesh import SEQUENCE_AXES, join_cluster, make_mesh, processes, request_cpu_devices
from rlring.transformer import Transformer
from rlring.transformer_config import TransformerConfig

if TYPE_CHECKING:
    from rlring.attention import attention  # at run time rlring.attention is the package, which is callable

__all__ = [
    "SEQUENCE_AXES",
    "AttentionConfig",
    "BlockMask",
    "FunctionMask",
    "KVCache",
    "Mask",
    "MeshAxes",
    "SparsePattern",
    "Transformer",
    "TransformerConfig",
    "UsageError",
    "attention",
    "decode_attention",
    "inverse_order",
    "join_cluster",
    "make_mesh",
    "processes",
    "request_cpu_devices",
    "sharded_attention",
    "striped_order",
    "zigzag_order",
]
