"""Exact attention over sequences that are split over devices: one function, several schemes."""

from rlring.attention.api import SCHEMES, AttentionConfig, attention
from rlring.attention.decode import decode_attention
from rlring.attention.mask import Mask, inverse_order, striped_order, zigzag_order
from rlring.attention.sparse import SparsePattern

__all__ = [
    "SCHEMES",
    "AttentionConfig",
    "Mask",
    "SparsePattern",
    "attention",
    "decode_attention",
    "inverse_order",
    "striped_order",
    "zigzag_order",
]
