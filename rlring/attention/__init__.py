"""Exact attention over sequences that are split over devices: one function, several schemes.

The package is callable, because it has the name of its main function: `rlring.attention(q, k, v, mask, config=...)`.
Its modules can still be imported, for example `import rlring.attention.ring`.
"""

import importlib
import inspect
import sys
from types import ModuleType

from rlring.attention.api import attention, sharded_attention
from rlring.attention.axes import MeshAxes
from rlring.attention.block_mask import BlockMask
from rlring.attention.decode import decode_attention
from rlring.attention.function_mask import FunctionMask
from rlring.attention.layouts import inverse_order, striped_order, zigzag_order
from rlring.attention.mask import Mask
from rlring.attention.schemes import SCHEMES as _TABLE
from rlring.attention.schemes import AttentionConfig
from rlring.attention.sparse_pattern import SparsePattern

SCHEMES = ("auto", *_TABLE)

__all__ = [
    "SCHEMES",
    "AttentionConfig",
    "BlockMask",
    "FunctionMask",
    "Mask",
    "MeshAxes",
    "SparsePattern",
    "attention",
    "decode_attention",
    "inverse_order",
    "sharded_attention",
    "striped_order",
    "zigzag_order",
]


class _CallablePackage(ModuleType):
    __signature__ = inspect.signature(attention)

    def __call__(self, *args, **kwargs):
        return attention(*args, **kwargs)

    def __reduce__(self):  # makes the package picklable, like a function
        return importlib.import_module, (__name__,)


sys.modules[__name__].__class__ = _CallablePackage
