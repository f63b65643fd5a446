"""Checkpoints that something happened to."""

from pathlib import Path

import pytest

from agents.cli import ConfigError
from agents.evaluate import load_agent


@pytest.mark.slow
def test_a_damaged_checkpoint_is_named(trained):
    newest = trained() / "checkpoints/12"
    parts = newest.glob("state/ocdbt.process_0/d/*")
    data = max(parts, key=lambda path: path.stat().st_size)
    names = (
        "metrics/metrics",
        "meta/metadata",
        "state/_METADATA",
        "state/array_metadatas/process_0",
        "state/_sharding",
    )
    for file in (*(newest / name for name in names), newest / "state/manifest.ocdbt", data):
        whole = file.read_bytes()
        file.write_bytes(whole[: 0 if file == data else len(whole) // 2])
        with pytest.raises(ConfigError, match=r"the checkpoint .*runs/tiny/checkpoints/12 is damaged \(.*Delete that"):
            load_agent(Path("runs/tiny"))
        file.write_bytes(whole)
    (newest / "state/_METADATA").unlink()
    with pytest.raises(ConfigError, match=r"checkpoints/12 is damaged"):
        load_agent(Path("runs/tiny"))
