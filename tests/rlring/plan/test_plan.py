"""The plan command: what the compiler says comes out as it is, and what is counted is what the program does."""

import dataclasses
import json
import os
import re
import subprocess
import sys

import jax
import pytest

from rlring import AttentionConfig, TransformerConfig, make_mesh, plan
from rlring.language_model import LanguageModelConfig, Training, preset
from rlring.plan import command, compiled
from rlring.plan.hlo_schedule import Transfer, permutes
from rlring.plan.links import Link
from rlring.plan.table import table

CPU = ["--model", "350m", "--topology", "cpu:8", "--tokens", "512"]


def tiny(name: str, **changes) -> LanguageModelConfig:
    shape = {"width": 32, "layers": 3, "heads": 4, "kv_heads": 2, "feed_forward": 48, "compute_type": "bfloat16"}
    how = {"fsdp": True, "attention": AttentionConfig("hybrid", block_q=16, block_k=16)}
    return LanguageModelConfig(40, TransformerConfig(**shape | how | changes))


@pytest.fixture
def tiny_models(monkeypatch):
    for module in (command, compiled):
        monkeypatch.setattr(module, "preset", tiny)


def fake(request: plan.Request, *, fits_up_to: int) -> plan.Plan:
    total = request.tokens * 2**20
    return plan.Plan(
        request, 10**9, request.tokens <= fits_up_to, fits_up_to * 2**20, 1, total - 1, total,
        1e15, 2e15, 3e9, 4e9, 8, 7, 0.875, 1.0,
    )  # fmt: skip


REQUEST = plan.Request("3b", "v4:2x2x4", 4096, 1, 16, 1, 1, "all")


@pytest.mark.parametrize(
    ("longest", "tried"),
    [(10_000, [4096, 8192, 16384]), (1100, [4096, 2048, 1024]), (1, [4096 >> n for n in range(8)])],
)
def test_search(longest, tried):
    """Doubled until it does not fit, or halved until it does, or until a device has one token."""
    plans = list(plan.search(REQUEST, lambda request: fake(request, fits_up_to=longest)))
    assert [one.request.tokens for one in plans] == tried


def test_table():
    header, _, row = table([fake(REQUEST, fits_up_to=5000)]).splitlines()
    cells = dict(zip(header.split(" | "), row.split(" | "), strict=True))
    assert cells["total of GiB"] == "4.00 of 4.88"
    assert (cells["tokens"], cells["a device"], cells["fits"]) == ("4,096", "256", "yes")
    assert (cells["PFLOP"], cells["computed"], cells["ring GB"], cells["hops hidden |"]) == (
        "1",
        "2",
        "3",
        "88% |",
    )


@pytest.mark.parametrize(
    ("message", "gib"),
    [
        ("the total memory required for HLO temporaries (512.00G) exceeds available HBM (30.75G).", 512),
        ("the total memory required for arguments and HLO temporaries (1.50T) exceeds", 1536),
        ("Ran out of memory in memory space hbm. Used 43.21G of 30.75G hbm. Exceeded", 43.21),
    ],
)
def test_what_a_refused_program_wanted(message, gib):
    assert compiled._wanted(message) == pytest.approx(gib * 2**30)


def test_operations_of_a_model():
    """6 operations for every weight and token, and 12 T D for attention that sees everything: half of it, causal."""
    request = dataclasses.replace(REQUEST, tokens=2**20)
    config = preset("7b")
    cost = plan.StepCost.of(config, dataclasses.replace(request, ring=8), 6_738_415_616)
    matrices = 6_738_415_616 - 32_000 * 4096 - 65 * 4096  # without the embedding and the norms
    dense = 6 * matrices * 2**20
    attended = 32 * 14 * 4096 * 2**40 / 2  # 4 forward, 10 backward
    assert cost.flops * 8 == pytest.approx(dense + attended)
    assert cost.computed_flops * 8 == pytest.approx(
        dense * 4 / 3 + attended * 18 / 14
    )  # the forward of everything once more


@pytest.mark.slow
@pytest.mark.parametrize(
    ("remat", "data", "ring", "ulysses"),
    [
        *[(remat, 1, 8, 1) for remat in ("none", "attention", "all")],
        # In a ring of two both directions are one: the compiler for CPUs finds the second forward to be the first.
        *[(remat, data, 2, 8 // data // 2) for remat in ("none", "attention") for data in (1, 2)],
    ],
)
def test_bytes_of_the_ring_are_those_of_the_program(remat, data, ring, ulysses):
    request = plan.Request("tiny", "cpu:8", 256, data, ring, ulysses, data, remat)
    mesh = make_mesh(data=data, ring=ring, ulysses=ulysses)
    training = Training(tiny("tiny", remat=remat), mesh=mesh)
    tokens = jax.ShapeDtypeStruct((data, 256), "int32")
    state = jax.eval_shape(training.init)
    compiled = training.jitted()[1].lower(state, tokens, tokens).compile().as_text()
    sent = 3 * sum(x.bytes for x in permutes(compiled))  # the program of a layer runs three times
    turns = 3 if remat == "all" else 2  # of keys: forward, again, backward
    positions = 3 * turns * (ring - 1) * 8 * 256 / ring
    assert plan.StepCost.of(training.config, request, 1).ring_bytes == sent - positions


def test_hidden_share():
    """The hops of a layer, of which the loop of the ring has nearly all, and the way home outside of it."""
    cost = plan.StepCost(1, 1.0, 1.0, 1.0, 1.0, hop_flops=100.0, hop_bytes=100.0)
    forward = Transfer("while/shard_map/while/ppermute", 100, True, True, True)
    keys = forward._replace(source="transpose(while)/shard_map/while/ppermute")
    gradients = keys._replace(bytes=200)
    last = gradients._replace(is_hidden=False, source="transpose(while)/shard_map/ppermute")
    fast, slow = Link("", "", 1.0, 1.5, ""), Link("", "", 1.0, 0.5, "")
    # Sent in the time of 100 / 1.5 and 300 / 1.5, computed in that of 100 and 250: all but the way home is hidden.
    assert cost.hidden_share(fast, [forward, keys, gradients, last]) == 1
    # A third as fast: 200 and 600.
    assert cost.hidden_share(slow, [forward, keys, gradients, last]) == pytest.approx((100 + 250) / 800)
    exposed = keys._replace(is_hidden=False)
    assert cost.hidden_share(fast, [forward, exposed, gradients]) == pytest.approx((100 + 200) / 400)


def test_a_plan_for_virtual_devices(tiny_models, tmp_path, capsys):
    path = tmp_path / "plan.json"
    assert plan.main([*CPU, "--data", "2", "--ulysses", "2", "--json", str(path)]) == 0
    printed = capsys.readouterr()
    assert re.search(r"\| 350m \(0\.03M\) \| cpu:8 \| 2 x 2 x 2 \| all \| 512 \| 128 \|", printed.out)
    assert "350m at 512 tokens on cpu:8: compiling ..." in printed.err
    written = json.loads(path.read_text())
    (one,) = written["plans"]
    assert one["fits"] is None
    assert one["hidden_share"] is None
    assert one["temporary_bytes"] > 0
    assert {"rlring", "jax", "jaxlib"} <= set(written["versions"])


def rows_of_a_tpu(*argv: str, program: str = "from rlring import plan") -> list[list[str]]:
    """Returns the rows that the command prints, run in a process of its own."""
    command = [sys.executable, "-c", f"{program}; raise SystemExit(plan.main())", "--model", "350m", *argv]
    ran = subprocess.run(command, env=os.environ, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    return [line.strip("| ").split(" | ") for line in ran.stdout.splitlines() if line.startswith("| 350m")]


def with_model(width: int, heads: int, scheme: str, kernel: str = "jax") -> str:
    """Returns a program in which every preset is this model of two layers."""
    return (
        "from rlring import *; from rlring import plan; from rlring.plan import compiled;"
        "from rlring.language_model import LanguageModelConfig;"
        f"config = TransformerConfig(width={width}, layers=2, heads={heads}, fsdp=True, remat='all',"
        f"compute_type='bfloat16', attention=AttentionConfig('{scheme}', kernel='{kernel}'));"
        "compiled.preset = lambda name, **how: LanguageModelConfig(512, config)"
    )


@pytest.mark.libtpu
def test_a_plan_for_a_tpu():
    """The whole training step of a model as large as nothing."""
    (row,) = rows_of_a_tpu("--topology", "v5e:2x4", "--tokens", "16384", program=with_model(256, 2, "hybrid"))
    assert row[1:6] == ["v5e:2x4", "1 x 8 x 1", "all", "16,384", "2,048"]
    assert 0 < float(row[7]) < 1
    assert row[9] == "yes"
    assert row[14].endswith("%")


@pytest.mark.libtpu
@pytest.mark.slow
def test_the_longest_context_of_a_tpu():
    rows = rows_of_a_tpu("--topology", "v5e:2x4", "--tokens", "262144", "--search")
    assert [row[9] for row in rows[-2:]] == ["yes", "no"]


@pytest.mark.libtpu
@pytest.mark.slow
def test_widths_that_do_not_divide_by_a_tpu_whose_links_route_straight_on():
    """The scales of norms, of 160 numbers, on 64 chips: no sum over half of them, which its compiler refuses."""
    (row,) = rows_of_a_tpu("--topology", "v5e:8x8", "--tokens", "65536", program=with_model(160, 5, "ring"))
    assert row[9] == "yes"


@pytest.mark.libtpu
@pytest.mark.slow
def test_the_hops_of_a_wide_model_are_hidden():
    """Two layers as wide as 3b's on 64 chips: had the keys to be turned round at each hop, not half would be."""
    wide = with_model(3200, 25, "ring", kernel="auto")
    (row,) = rows_of_a_tpu("--topology", "v4:4x4x4", "--tokens", "1048576", program=wide)
    assert row[-1].strip(" |") == "100%"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model", "3b"], r"the following arguments are required: --topology, --tokens"),
        ([*CPU, "--tokens", "0"], r"argument --tokens: '0' is not a whole number of at least 1"),
        ([*CPU, "--model", "3B"], r"there is no preset '3B'\. Choose one of 350m, 1b"),
        ([*CPU, "--topology", "gpu:8"], r"a topology is a generation .*; got 'gpu:8'\. Write it like"),
        ([*CPU, "--ulysses", "3"], r"--data 1 times --ulysses 3 does not divide the 8 devices of cpu:8"),
        ([*CPU, "--tokens", "513"], r".*share --rows 1 sequences of --tokens 513\. Use a multiple of 1 rows and of 8"),
        ([*CPU, "--search"], r"--search needs a memory to fit into; cpu:8 has no fixed one\. Use a TPU topology"),
        ([*CPU, "--remat", "offload"], r"remat 'offload' moves .* Use remat 'all'"),
        ([*CPU, "--json", "nowhere/plan.json"], r"--json nowhere/plan.json: there is no folder nowhere\. Make it"),
    ],
)
def test_errors_are_one_line(argv, message, capsys, request):
    if "3B" not in argv:
        request.getfixturevalue("tiny_models")
    try:
        status = plan.main(argv)
    except SystemExit as stopped:  # argparse
        status = stopped.code
    printed = capsys.readouterr()
    assert status == 2
    assert not printed.out
    assert re.search(rf"error: {message}.*\n$", printed.err)
