"""The wheel: every way to import it, and that it declares what it imports."""

import ast
import inspect
import pickle
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import rlring

ROOT = Path(rlring.__file__).parents[1]
CALL = "(q, q, q, rlring.Mask.causal(jnp.zeros((1, 2), jnp.int32)), config=rlring.AttentionConfig()).shape == q.shape"


@pytest.mark.parametrize(
    "lines",
    [
        f"import rlring; assert rlring.attention{CALL}",
        f"import rlring.attention.ring as r, rlring; r.ring_attention; assert rlring.attention{CALL}",
        f"from rlring import *; import rlring; rlring.attention.ring.ring_attention; assert attention{CALL}",
        f"from rlring.attention import attention, ring; import rlring; ring.ring_attention; assert attention{CALL}",
    ],
)
def test_every_form_of_import(lines):
    code = f"import jax.numpy as jnp; q = jnp.ones((1, 2, 1, 4)); {lines}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_the_package_is_a_function_to_others():
    assert [*inspect.signature(rlring.attention).parameters][:4] == ["q", "k", "v", "mask"]
    assert pickle.loads(pickle.dumps(rlring.attention)) is rlring.attention


def test_the_wheel_declares_what_it_imports():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {requirement.split(">")[0] for requirement in declared}
    for file in (ROOT / "rlring").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                modules = [node.module]
            tops = {module.split(".")[0] for module in modules} - sys.stdlib_module_names - {"rlring", "jaxlib"}
            assert tops <= names, f"{file} imports {tops - names}"
