"""The rules of CONTRIBUTING that a reader would have to count for: lines of a file, depth of nested functions."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("rlring", "data", "agents")
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef


def files(*folders: str) -> Iterator[Path]:
    for folder in folders:
        yield from (ROOT / folder).rglob("*.py")


def too_deep(node: ast.AST, outer: tuple[str, ...] = ()) -> Iterator[str]:
    """Yields the functions that stand in a function of a function."""
    for child in ast.iter_child_nodes(node):
        names = (*outer, child.name) if isinstance(child, FUNCTIONS) else outer
        if len(names) > 2 and names != outer:
            yield f"{'.'.join(names)} (line {child.lineno})"
        yield from too_deep(child, names)


@pytest.mark.parametrize("folder", PACKAGES)
def test_a_file_has_at_most_300_lines(folder):
    lengths = {str(file.relative_to(ROOT)): len(file.read_text().splitlines()) for file in files(folder)}
    assert {name: length for name, length in lengths.items() if length > 300} == {}


def test_functions_nest_at_most_two_deep():
    found = {
        str(file.relative_to(ROOT)): [*too_deep(ast.parse(file.read_text()))] for file in files(*PACKAGES, "tests")
    }
    assert {name: functions for name, functions in found.items() if functions} == {}


def test_what_nests_too_deep_is_found():
    code = "def a():\n  def b():\n    class C:\n      def d(self): ...\n  def e(): ..."
    assert [*too_deep(ast.parse(code))] == ["a.b.d (line 4)"]
