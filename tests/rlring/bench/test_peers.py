"""rlring.bench --peers: twelve masks, ours and others beside float64."""

import json
import sys

import numpy as np
import pytest

from rlring import bench
from rlring.bench.masks import cases

TINY = ["--peers", "--head-size", "4", "--repeats", "2", "--lengths", "32", "--schemes", "blockwise", "ring"]
OTHERS = ("torch", "tokamax", "ejkernel", "flash_attn_jax", "transformer_engine")


@pytest.mark.parametrize("length", [32, 100])
def test_the_twelve_masks_are_ours_as_well(length):
    """In any order of the tokens."""
    order = np.random.default_rng(0).permutation(length).astype(np.int32)
    twelve = cases(length)
    assert len({case.name for case in twelve}) == 12
    for case in twelve:
        seen = case.ours(order[None]).visible()[0]
        np.testing.assert_array_equal(seen, case.seen[order][:, order], err_msg=case.name)
        assert case.seen.any(1).all()


def rows(argv, tmp_path, capsys, monkeypatch):
    for name in OTHERS:
        monkeypatch.setitem(sys.modules, name, None)
    out = tmp_path / "peers.json"
    assert bench.main([*TINY, *argv, "--devices", "2", "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    return printed, json.loads(out.read_text())["measurements"]


def check(masks, printed, measured):
    for mask in masks:
        here = {(m["name"], m["devices"]): m for m in measured if m["mask"] == mask}
        done = ["rlring blockwise", "rlring ring", "jax.nn.dot_product_attention"]
        assert [name for name, _ in here][:3] == done
        for (name, devices), m in here.items():
            if name not in done:
                assert m["refused"] == "not installed"
                continue
            assert devices == (2 if name == "rlring ring" else 1)
            assert m["error"] < 1e-5 > m["gradient_error"]
            assert len(m["forward_ms"]) == len(m["forward_backward_ms"]) == 2
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 3 * len(masks)
    assert "- torch SDPA on 1: not installed (all masks)" in printed
    assert "errors against float64" in printed


def test_two_masks(tmp_path, capsys, monkeypatch):
    masks = ["causal", "block-sparse"]
    check(masks, *rows(["--masks", *masks], tmp_path, capsys, monkeypatch))


@pytest.mark.slow
def test_all_masks(tmp_path, capsys, monkeypatch):
    check([case.name for case in cases(32)], *rows([], tmp_path, capsys, monkeypatch))


def test_a_mask_that_is_none(capsys):
    with pytest.raises(SystemExit) as stopped:
        bench.main(["--peers", "--masks", "ful"])
    assert stopped.value.code == 2
    assert "argument --masks: invalid choice: 'ful'" in capsys.readouterr().err
