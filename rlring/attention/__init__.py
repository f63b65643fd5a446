"""Exact attention over sequences that are split over devices: one function, several schemes.

The package can be called, `rlring.attention(q, k, v, mask, config=...)`: the name is that of the function in it, and
`import rlring.attention.ring` works as well.
"""

import importlib
import inspect
import sys
from types import ModuleType

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


class _CallablePackage(ModuleType):
    __signature__ = inspect.signature(attention)

    def __call__(self, *args, **kwargs):
        return attention(*args, **kwargs)

    def __reduce__(self):  # a function can be pickled, a module cannot
        return importlib.import_module, (__name__,)


sys.modules[__name__].__class__ = _CallablePackage
