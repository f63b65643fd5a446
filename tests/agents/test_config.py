"""Configs: every file loads, what is written back is equal, and every mistake has its one message."""

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agents.cli import ConfigError
from agents.config import Config, SweepConfig, dump, load, parse_override
from agents.model_config import AttentionSection, ModelConfig
from agents.recall import RecallConfig
from rlring import AttentionConfig, SparsePattern, TransformerConfig

CONFIGS = Path(__file__).parents[2] / "configs"
MINIMAL = """
name = "a"
[data]
tasks = ["walker-walk"]
episodes = "e"
stores = ["s.h5"]
[agent]
kind = "agentic_transformer"
"""


@pytest.fixture
def minimal(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text(MINIMAL)
    return path


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("**/*.toml")), ids=lambda path: path.stem)
def test_every_config_of_the_repository_loads(path):
    if path.stem == "recall":
        load(RecallConfig, path)
    elif "[runs." in path.read_text():
        assert load(SweepConfig, path).configs()
    else:
        load(Config, path)


def test_a_config_written_back_is_equal(minimal, tmp_path):
    config = load(
        Config, minimal, ["train.updates=7", "optimizer.learning_rate=1e-4", "chain.target=3.5", "mesh.ring=2"]
    )
    assert (config.train.updates, config.optimizer.learning_rate, config.chain.target) == (7, 1e-4, 3.5)
    (tmp_path / "config.json").write_text(dump(config))
    assert load(Config, tmp_path / "config.json") == config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.updats=3"], r"unknown key 'train.updats'; did you mean 'updates'\?"),
        (["trian.updates=3"], r"unknown key 'trian'; did you mean 'train'\?"),
        (["train.updates=0"], r"'train.updates': Input should be greater than 0; got 0"),
        (['train.updates="3"'], r"'train.updates': Input should be a valid integer; got '3'"),
        (
            ["agent.kind=dt"],
            r"'agent.kind': Input should be 'agentic_transformer', 'algorithm_distillation', .* or "
            "'iql'; got 'dt'",
        ),
        (
            ["attention.scheme=ring", "mesh.ulysses=2"],
            r"attention.scheme 'ring' does not fit mesh.ring=1, mesh.ulysses=2",
        ),
        (["attention.scheme=sparse"], r"attention: scheme 'sparse' and the table attention.sparse go together"),
        (["attention.sparse.block=16"], r"go together; got scheme 'ring' with it; an empty table is the default"),
        (
            ["attention.scheme=sparse", "attention.sparse.strides=4"],
            r"unknown key 'attention.sparse.strides'; did you mean 'stride'\?",
        ),
        (
            ["attention.scheme=sparse", "attention.sparse.block=16", "mesh.ring=2"],
            r"attention.scheme 'sparse' does not fit mesh.ring=2",
        ),
        (
            ["attention.scheme=sparse", "attention.sparse.block=16", "agent.window=9"],
            r"'sparse' has a window of its own, attention.sparse.local_blocks; got agent.window=9; leave",
        ),
        (["model.width=100", "model.heads=3"], r"width 100 does not divide by 3 heads"),
        (["model.kv_heads=3"], r"4 heads do not divide by 3 kv_heads"),
        (["model.dense_every=2"], r"dense_every=2 goes with attention scheme 'sparse'"),
        (["mesh.data=3"], r"train.batch=16 does not divide over mesh.data=3 devices"),
        (['data.stores=["a", "b"]'], r"1 tasks need as many stores; got 2"),
        (["train"], r"'train' is no override; write it as section.key=value"),
        (["a..b=1"], r"'a..b=1' is no override"),
        (["=1"], r"'=1' is no override"),
        (["train.updates=" + "9" * 5000], r"'train.updates': Input should be a valid integer; got '9+...9+'"),
        (["train={updates=2020-01-01}"], r"'train.updates': Input should be a valid integer; got datetime.date"),
        (["train=3"], r"'train': Input should be a valid dictionary"),
        (["name.a=3"], r"'name': Input should be a valid string; got {'a': 3}"),
        (["evaluate.contexts=" + "[" * 2000], r"'evaluate.contexts': Input should be a valid list"),
    ],
)
def test_mistakes(minimal, overrides, message):
    with pytest.raises(ConfigError, match=message):
        load(Config, minimal, overrides)


def test_the_network_of_a_config_is_the_librarys(minimal):
    """Every setting of it is a field there, with the same default."""
    library = TransformerConfig()
    assert ModelConfig().transformer_config(rope_fraction=library.rope_fraction) == library
    assert set(ModelConfig.model_fields) < {field.name for field in dataclasses.fields(library)}
    pattern = AttentionSection.model_validate({"scheme": "sparse", "sparse": {}}).attention_config(sharded=True).sparse
    assert pattern == SparsePattern()
    assert load(Config, minimal).attention.attention_config(sharded=True) == AttentionConfig()


@pytest.mark.parametrize("change", ["attention.scheme=ulysses", "model.heads=3", "train.accumulate=3"])
def test_recall_refuses_what_cannot_be_before_it_begins(tmp_path, monkeypatch, change):
    monkeypatch.chdir(tmp_path)
    Path("r.toml").write_text('name = "r"')
    with pytest.raises(ConfigError, match=r"does not (fit|divide)"):
        load(RecallConfig, "r.toml", ["mesh.ring=2", change])


def test_missing_and_broken_files(minimal, tmp_path):
    with pytest.raises(ConfigError, match=r"no config at .*aa.toml. Did you mean .*a.toml\?"):
        load(Config, tmp_path / "aa.toml")
    minimal.write_text(MINIMAL + "[train\n")
    with pytest.raises(ConfigError, match=r"cannot be read: .*line 9, column 7"):
        load(Config, minimal)
    minimal.write_text(MINIMAL.replace('name = "a"', ""))
    with pytest.raises(ConfigError, match=r"'name' is missing; add it"):
        load(Config, minimal)
    for text, message in (
        (b"\xff\xfe\x00", r"is no text. Give the path of a TOML file"),
        (b"", r"'name' is missing; add it; 'data' is missing; add it"),
        (b"seed = " + b"9" * 5000, r"cannot be read: Exceeds the limit"),
        (b"seed = " + b"[" * 5000, r"cannot be read: "),
    ):
        minimal.write_bytes(text)
        with pytest.raises(ConfigError, match=message):
            load(Config, minimal)
    for text in ("[]", "null", "3"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ConfigError, match=r"config.json holds no settings, but"):
            load(Config, tmp_path / "config.json", ["seed=1"])


@given(st.sampled_from(sorted(Config.model_fields)), st.characters(categories=["Ll"]))
def test_any_misspelt_key_is_rejected(name, letter):
    from agents.config import validate

    misspelt = name + letter
    with pytest.raises(ConfigError, match=f"unknown key '{misspelt}'"):
        validate(Config, {misspelt: 1}, source="x")


def test_an_override_takes_toml_values():
    assert parse_override("a.b=1e-4") == {"a": {"b": 1e-4}}
    assert parse_override("a=[1, 2]") == {"a": [1, 2]}
    assert parse_override("a=some words") == {"a": "some words"}


def test_runs_of_a_sweep_win_over_what_is_shared(tmp_path):
    text = MINIMAL.replace('name = "a"', 'name = "s"\nseeds = [3, 4]').replace("[data]", "[shared.data]")
    text = text.replace("[agent]", "[shared.train]\nupdates = 5\n[runs.X.train]\nbatch = 2\n[runs.X.agent]")
    path = tmp_path / "s.toml"
    path.write_text(text)
    first, second = load(SweepConfig, path).configs()
    assert (first.name, second.name, second.seed) == ("s/X-3", "s/X-4", 4)
    assert (first.train.updates, first.train.batch) == (5, 2)
    path.write_text(text.replace("batch = 2", "bach = 2"))
    with pytest.raises(ConfigError, match=r"runs.X: unknown key 'train.bach'; did you mean 'batch'\?"):
        load(SweepConfig, path).configs()
