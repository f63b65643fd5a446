"""wandb, asked for where it cannot start: one line, and the name of the run stays free."""

from pathlib import Path

import pytest

from agents.train import main


@pytest.fixture
def no_key(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    for name, place in (("HOME", "home"), ("NETRC", "netrc"), ("WANDB_CONFIG_DIR", "config")):
        monkeypatch.setenv(name, str(tmp_path / place))


def test_online_without_a_key_creates_nothing(write_config, no_key, capsys):
    assert main([str(write_config), "wandb.mode=online"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: wandb.mode is 'online' and wandb knows no API key here: run `wandb login`, set")
    assert not Path("runs").exists()


@pytest.mark.slow
def test_a_server_that_does_not_answer_leaves_the_name_free(write_config, no_key, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "3")
    assert main([str(write_config), "wandb.mode=online"]) == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert errors[0].startswith("error: wandb did not start: ")
    assert not Path("runs/tiny").exists()
    assert main([str(write_config), "wandb.mode=offline", "train.updates=2"]) == 0
