"""Every setting of data.collect and data.build at its edges: one line on stderr, exit status 2, nothing left behind."""

import pytest

from data import build, collect
from data.exorl import list_episodes, read_episode

HUGE = 10**40
NUMBERS = ["0", "-1", "", "nan", "1.5", str(HUGE)]
NOT_NUMBERS = ["", "nan", "1.5"]
# {file} is a file, {folder} an empty folder; nothing can be made in /proc, even by root.
NOWHERE = ["", " ", "{file}/x", "/proc/x/y", "{folder}/" + "x" * 300]

COLLECT = [
    *(("--episodes", value) for value in [*NUMBERS, "1000001"]),
    *(("--workers", value) for value in [*NUMBERS, "100000"]),
    *(("--episode-steps", value) for value in [*NUMBERS, "1000001"]),
    *(("--seed", value) for value in ["-1", *NOT_NUMBERS, str(HUGE)]),
    *(("--task", value) for value in ["", " ", "nan", "walker", "walker-"]),
    *(("--policy", value) for value in ["", "nan"]),
    *(("--out", value) for value in [*NOWHERE, "{file}"]),
]
BUILD = [
    *(("--workers", value) for value in [*NUMBERS, "100000"]),
    *(("--limit-steps", value) for value in ["0", "-1", *NOT_NUMBERS]),
    *(("--task", value) for value in ["", " ", "nan", "cartpole", "walker-walk"]),
    *(("--control", value) for value in ["", "nan"]),
    *(("--exorl", value) for value in ["", " ", "{file}", "{file}/x", "{folder}", "{folder}/missing", "{strange}"]),
    *(("--out", value) for value in [*NOWHERE, "{file}", "{folder}"]),
]


@pytest.fixture(scope="module")
def episodes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("datasets") / "cartpole"
    collect.collect("cartpole-swingup", "uniform", 3, 0, folder, progress=False, episode_steps=5)
    return folder


def answer(main, arguments, capsys):
    try:
        status = main([word for pair in arguments.items() for word in (f"{pair[0]}={pair[1]}",)])
    except SystemExit as end:  # argparse ends by itself
        status = end.code
    return status, capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "name", "value"), [("collect", *c) for c in COLLECT] + [("build", *b) for b in BUILD]
)
def test_a_setting_at_its_edge(episodes, tmp_path, monkeypatch, capsys, command, name, value):
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    file, folder, strange = tmp_path / "file", tmp_path / "folder", tmp_path / "strange"
    file.write_text("precious")
    folder.mkdir()
    (strange / "episode_000000_5.npz").mkdir(parents=True)
    if command == "collect":
        arguments = {"--task": "cartpole-swingup", "--policy": "uniform", "--episodes": "1", "--out": "made"}
    else:
        arguments = {"--exorl": str(episodes), "--task": "cartpole-swingup", "--out": "made"}
    arguments[name] = value.format(file=file, folder=folder, strange=strange)
    status, error = answer({"collect": collect, "build": build}[command].main, arguments, capsys)
    assert status == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1, error
    assert file.read_text() == "precious"
    assert list(folder.iterdir()) == []
    assert list(work.iterdir()) == []


@pytest.mark.parametrize("command", [collect, build])
def test_a_setting_that_is_missing_or_unknown(capsys, command):
    for arguments in ([], ["--nonsense", "1"]):
        with pytest.raises(SystemExit) as end:
            command.main(arguments)
        assert end.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith("error: the following arguments are required: ")
        assert error.count("\n") == 1


def test_huge_where_it_means_all(episodes, tmp_path, capsys):
    arguments = {"--exorl": str(episodes), "--task": "cartpole-swingup", "--out": str(tmp_path / "s.h5")}
    assert answer(build.main, {**arguments, "--limit-steps": HUGE, "--workers": 1}, capsys)[0] == 0


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk(tiny_disk, capsys, workers):
    arguments = {"--task": "point_mass-dark", "--policy": "uniform", "--episodes": 2000, "--workers": workers}
    status, error = answer(collect.main, {**arguments, "--out": tiny_disk / "episodes"}, capsys)
    assert status == 2
    assert error.splitlines()[-1].startswith(f"error: the disk is full: could not write {tiny_disk}/episodes/episode_")
    assert not list((tiny_disk / "episodes").glob(".*"))
    paths = list_episodes(tiny_disk / "episodes")
    assert all(read_episode(path).length == 16 for path in paths)
    status, error = answer(
        build.main,
        {"--exorl": tiny_disk / "episodes", "--task": "point_mass-dark", "--out": tiny_disk / "s.h5"},
        capsys,
    )
    assert status == 2
    assert error.splitlines()[-1].startswith(f"error: the disk is full: could not write {tiny_disk}/s.h5")
    assert [path.name for path in tiny_disk.iterdir()] == ["episodes"]
