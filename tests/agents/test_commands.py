"""What every command answers to arguments that cannot work: one line, and nothing is begun."""

import importlib
import signal
import subprocess
import sys
from pathlib import Path

import pytest

NO_CONFIG = r"no config at nope. Give the path of a TOML file"
SOMETHING_ELSE = "--json mine.json: that file holds something else than such measurements, and would be replaced"
TOPOLOGY = ("--topology", "cpu:1")
ARGUMENTS = [
    ("agents.train", ("nope",), NO_CONFIG),
    ("agents.train", ("folder",), "Is a directory: folder"),
    ("agents.train", ("bytes",), "bytes is no text"),
    ("agents.train", (), "the following arguments are required: config"),
    ("agents.train", ("tiny.toml", "--processes", "0"), "--processes and --process go with --cluster"),
    ("agents.train", ("tiny.toml", "name=../up"), "it names a folder within runs/"),
    ("agents.train", ("tiny.toml", "train.updates=0"), "Input should be greater than 0; got 0"),
    ("agents.train", ("tiny.toml", "mesh.ring=1048576"), "1048576 devices of one process were asked for"),
    ("agents.train", ("tiny.toml", 'data.stores=["bytes"]', "name=b"), "bytes"),
    ("agents.train", ("tiny.toml", 'data.tasks=["no-task"]', "name=b"), "no-task"),
    ("agents.evaluate", ("nope",), "nope is no run: it has no config.json"),
    ("agents.evaluate", ("bytes",), "bytes is no run"),
    ("agents.evaluate", (), "the following arguments are required: run"),
    ("agents.sweep", ("nope",), NO_CONFIG),
    ("agents.sweep", ("tiny.toml",), "unknown key 'agent'"),
    ("agents.sweep", (), "the following arguments are required: config"),
    ("agents.plot", ("nope", "--out", "a.png"), "there are no results at nope"),
    ("agents.plot", ("bytes", "--out", "a.png"), "line 1 of bytes is no result"),
    ("agents.plot", ("folder",), "the following arguments are required: --out"),
    ("agents.plot", ("folder", "--out", "mine.png"), "mine.png exists and is no plot; choose another --out"),
    ("agents.plot", ("folder", "--out", "a.jpg"), "a plot is a .png, .svg or .pdf file; got a.jpg"),
    ("agents.plan", ("nope", *TOPOLOGY), NO_CONFIG),
    ("agents.plan", ("tiny.toml", "--topology", "cpu:0"), "a topology is a generation and how many chips"),
    ("agents.plan", ("tiny.toml", *TOPOLOGY, "--json", "folder"), "that is a folder. Give the name of a file in it"),
    ("agents.plan", ("tiny.toml", *TOPOLOGY, "--json", "mine.json"), SOMETHING_ELSE),
    ("agents.bench", ("acting", "--json", "mine.json"), SOMETHING_ELSE),
    ("agents.bench", ("nope",), "invalid choice: 'nope'"),
    ("agents.bench", ("reading",), "`reading` wants a run, such as runs/NAME, and nothing else does; got None"),
    (
        "agents.bench",
        ("acting", "runs/x"),
        "`reading` wants a run, such as runs/NAME, and nothing else does; got runs/x",
    ),
    ("agents.bench", ("reading", "folder"), "folder is no run: it has no config.json"),
    ("agents.bench", ("acting", "--devices", "0"), "'0' is not a whole number of at least 1"),
    ("agents.bench", ("acting", "--json", "no/x"), "there is no folder no. Make it first"),
    ("agents.recall", ("nope",), NO_CONFIG),
    ("agents.recall", ("recall.toml", "lines=16385"), "there are 16,384 keys"),
    ("agents.recall", ("recall.toml", "train.batch=0"), "Input should be greater than 0; got 0"),
    ("rlring.bench", ("--lengths", "0"), "'0' is not a whole number of at least 1"),
    ("rlring.bench", ("--heads", "3", "--kv-heads", "2"), "--heads is a multiple of --kv-heads"),
    ("rlring.bench", ("--lengths", "9" * 30), "is not a whole number of at least 1 and below 2^31"),
    ("rlring.bench", ("--matmul", "999999999"), "--matmul is at most 131072; got 999999999"),
    ("rlring.bench", ("--json", "folder"), "that is a folder"),
    ("rlring.bench", ("--json", "bytes"), "that file holds something else than such measurements"),
    ("rlring.bench", ("--json", "mine.json"), SOMETHING_ELSE),
    ("rlring.bench", ("--json", "x" * 300), "error: File name too long: xxx"),
    ("rlring.bench", ("--sparse", "1,2"), "'1,2' is not BLOCK,LOCAL,STRIDE"),
    ("rlring.plan", ("--model", "no", *TOPOLOGY, "--tokens", "8"), "no"),
    ("rlring.plan", ("--model", "3b", *TOPOLOGY, "--tokens", "-1"), "'-1' is not a whole number of at least 1"),
    ("rlring.plan", ("--model", "3b"), "the following arguments are required"),
    ("rlring.plan", ("--model", "3b", *TOPOLOGY, "--tokens", "8", "--json", "folder"), "that is a folder"),
    ("rlring.plan", ("--model", "3b", *TOPOLOGY, "--tokens", "8", "--json", "mine.json"), SOMETHING_ELSE),
]


@pytest.mark.parametrize(("module", "arguments", "message"), ARGUMENTS, ids=str)
def test_one_line(write_config, capsys, module, arguments, message):
    Path("folder").mkdir()
    Path("bytes").write_bytes(bytes(range(256)))
    Path("recall.toml").write_text('name = "r"')
    for mine in ("mine.json", "mine.png"):
        Path(mine).write_text('{"mine": 1}')
    try:
        status = importlib.import_module(module).main(list(arguments))
    except SystemExit as end:  # how argparse ends
        status = end.code
    printed = capsys.readouterr()
    assert status == 2
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert message in printed.err
    assert not Path("runs").exists()
    assert not list(Path("folder").iterdir())
    assert {Path(mine).read_text() for mine in ("mine.json", "mine.png")} == {'{"mine": 1}'}


@pytest.mark.parametrize(("module", "option"), [("agents.train", "--resume"), ("agents.sweep", "--dry-run")])
def test_options_stand_between_overrides(write_config, capsys, module, option):
    assert importlib.import_module(module).main([str(write_config), "seed=0", option, "no.such=1"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {write_config}: unknown key")


@pytest.mark.parametrize("module", ["agents.train", "agents.plot", "data.collect", "rlring.bench", "rlring.plan"])
def test_an_interrupt_while_modules_are_imported_is_one_line(module):
    command = [sys.executable, "-X", "importtime", "-m", module, "--help"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        for line in process.stderr:  # of every module imported
            if line.endswith(" numpy.linalg\n"):
                process.send_signal(signal.SIGINT)
                break
        rest = process.stderr.read().splitlines()
    assert process.returncode == 130
    assert rest[-1].startswith("interrupted; ")
    assert not any("Traceback" in line for line in rest)
