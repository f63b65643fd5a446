"""Annotations are checked at every call of rlring's functions: types by beartype, shapes by jaxtyping.

Importing this installs it, for what is imported later. Two kinds of functions are left alone: those whose docstring
says what they raise, which check for themselves and take more than they ask for (arrays of NumPy, lists); and those
within functions, which would be wrapped anew whenever the outer one is called.
"""

import ast
import sys
from collections.abc import Callable
from functools import wraps
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder, SourceFileLoader

from beartype import BeartypeConf, beartype
from beartype.roar import BeartypeCallHintParamViolation
from jaxtyping import jaxtyped

PACKAGES = ("rlring",)
TYPES = beartype(conf=BeartypeConf(is_pep484_tower=True))  # a whole number passes for a float


def checked(function: Callable) -> Callable:
    """Returns the function with its annotations checked."""
    typed = jaxtyped(TYPES(function), typechecker=None)

    @wraps(function)
    def call(*arguments, **named):
        try:
            return typed(*arguments, **named)
        except BeartypeCallHintParamViolation as violation:
            if not has_begun(function, violation):
                function(*arguments, **named)  # its own error tells more, if it has one for this
            raise

    return call


def has_begun(function: Callable, error: Exception) -> bool:
    """Returns whether the error comes from within the function, and not from the check of its arguments."""
    frame = error.__traceback__
    while frame is not None and frame.tb_frame.f_code is not function.__code__:
        frame = frame.tb_next
    return frame is not None


class Checked(ast.NodeTransformer):
    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        if "Raises:" not in (ast.get_docstring(node) or ""):
            node.decorator_list.append(ast.Name("__checked__", ast.Load()))
        return node


class Loader(SourceFileLoader):
    """Neither reads nor writes a .pyc: what it makes of a file is not for others."""

    def get_code(self, fullname: str):
        tree = Checked().visit(ast.parse(self.get_data(self.path)))
        return compile(ast.fix_missing_locations(tree), self.path, "exec")

    def exec_module(self, module) -> None:
        module.__checked__ = checked
        super().exec_module(module)


class Finder(MetaPathFinder):
    def find_spec(self, name: str, path, target=None):
        if name.split(".")[0] not in PACKAGES or name == "rlring.attention.blocks":
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = Loader(spec.loader.name, spec.loader.path)
        return spec


sys.meta_path.insert(0, Finder())
