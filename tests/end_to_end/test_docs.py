"""README and guides say what is so: their Python runs, their commands, files, flags and settings are there."""

import ast
import importlib
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

from agents.config import Config, load

ROOT = Path(__file__).parents[2]
PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in (ROOT / "README.md", *ROOT.glob("docs/**/*.md"))}
BLOCK = re.compile(r'^```(?P<language>\w*)(?: title="(?P<file>[^"]+)")?\n(?P<code>.*?)^```$', re.DOTALL | re.MULTILINE)
SLOW = {f"docs/{name}.md" for name in ("library", "own_model", "flax_nnx", "shard_map", "decoding", "training")}
WITH_PYTHON = [page for page in PAGES if "```python" in PAGES[page]]


def commands(text: str) -> list[list[str]]:
    """Returns the words of every `python -m ...` and `make ...` in code: in blocks and between backticks."""
    blocks = [line for block in BLOCK.finditer(text) for line in block["code"].splitlines()]
    spans = re.findall(r"`([^`\n]+)`", BLOCK.sub("", text))
    found = (re.match(r"(?:\S*/)?(python -m|make) [^#(]+", code.strip()) for code in blocks + spans)
    return [[w if "=[" in w else w.strip("[]") for w in one[0].split()] for one in found if one]


@pytest.mark.parametrize("page", [pytest.param(p, marks=pytest.mark.slow) if p in SLOW else p for p in WITH_PYTHON])
def test_the_python_of_a_page_runs(page, tmp_path):
    blocks = list(BLOCK.finditer(PAGES[page]))
    for block in blocks:
        if block["file"]:
            (tmp_path / block["file"]).write_text(block["code"])
    code = "\n".join(block["code"] for block in blocks if block["language"] == "python")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    # As a reader runs it: it may promote what ours may not, and XLA emits programs as it does by default.
    environment |= {"JAX_NUMPY_DTYPE_PROMOTION": "standard", "JAX_NUMPY_RANK_PROMOTION": "allow"}
    environment["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_page_with_python_was_lost():
    assert {"README.md", "docs/data.md", "docs/coming_from.md", *SLOW} <= set(WITH_PYTHON)


@pytest.mark.parametrize("page", [page for page in PAGES if commands(PAGES[page])])
def test_the_commands_of_a_page_are_there(page, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    targets = re.search(r"^\.PHONY: (.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    for words in commands(PAGES[page]):
        if words[0].endswith("make"):
            assert words[1] in targets, words
            continue
        if words[2] in ("pip", "venv"):
            continue
        module = importlib.import_module(words[2])
        if not hasattr(module, "main"):
            module = importlib.import_module(f"{words[2]}.__main__")
        with pytest.raises(SystemExit) as asked:
            module.main(["--help"])
        assert asked.value.code == 0
        known = capsys.readouterr().out
        assert not [w for w in words[3:] if w.startswith("--") and w.split("=")[0] not in known], words
        files = [w for w in words[3:] if w.startswith("configs/") and "CONFIG" not in w and "X.toml" not in w]
        assert all(Path(file).exists() for file in files), words


def test_the_settings_that_pages_name_are_settings(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = tmp_path / "dark.toml"
    config.write_text(next(block["code"] for block in BLOCK.finditer(PAGES["docs/training.md"]) if block["file"]))
    for words in (words for text in PAGES.values() for words in commands(text)):
        settings = [word for word in words[3:] if "=" in word and not word.startswith(("-", "section."))]
        if words[1] == "-m" and words[2] in ("agents.train", "agents.evaluate") and settings:
            is_file = Path(words[3]).is_file()  # a run stands for itself: its own mesh is not that of this config
            load(Config, words[3] if is_file else config, settings if is_file else ["mesh.ring=1", *settings])


def test_what_the_api_pages_describe_is_there():
    for text in (text for page, text in PAGES.items() if page.startswith("docs/api/")):
        for name, members in re.findall(r"^::: (\S+)(?:\n    options:\n      members: \[(.*)\])?", text, re.MULTILINE):
            found = pkgutil.resolve_name(name)
            assert not [member for member in members.split(", ") if member and not is_member(found, member)], name


def is_member(found: object, name: str) -> bool:
    return hasattr(found, name) or name in getattr(found, "__annotations__", {})


@pytest.mark.parametrize("page", PAGES)
def test_the_files_that_a_page_names_are_there(page):
    links = re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", BLOCK.sub("", PAGES[page]))
    assert all(((ROOT / page).parent / link).exists() for link in links)
    named = re.findall(r"(?:rlring|data|agents|tests|configs|docs)/[\w./-]*\w\.(?:py|toml|md|yaml|sbatch)", PAGES[page])
    missing = {name for name in named if not (ROOT / name).exists()}
    assert not {name for name in missing if "CONFIG" not in name and "/X.toml" not in name}


def test_docstrings_hold_no_accidental_links():
    # Markdown takes `[a][b]` outside of code for a link, and the documentation would not build.
    def docstrings(path):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
                yield re.sub(r"`[^`]*`|^ {4}.*$", "", text, flags=re.MULTILINE)

    paths = [path for package in ("rlring", "data", "agents") for path in (ROOT / package).rglob("*.py")]
    assert not [path for path in paths for text in docstrings(path) if re.search(r"\w\[[^\]]+\] ?\[", text)]
