"""convert: each export read by its consumer's semantics, each import back, and files shifted by one that must fail."""

import json
import re
import resource
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import DataError, Trajectory, TrajectoryStore
from data.build import build
from data.collect import collect
from data.convert import convert, main
from data.exorl import list_episodes, read_episode, write_episode
from data.formats.source import EpisodeFolder, open_source
from data.relabel import relabel
from tests.data.test_exorl import assert_same

TASK = "cartpole-swingup"
STEPS = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Five episodes, the third of which really ends."""
    folder = tmp_path_factory.mktemp("datasets") / "cartpole"
    collect("cartpole-balance", "uniform", 5, 0, folder, progress=False, episode_steps=STEPS)
    episode = read_episode(list_episodes(folder)[2])
    discount = episode.discount.copy()
    discount[-1] = 0
    write_episode(folder, 2, replace(episode, discount=discount))
    return folder


def written(source, to, path, **options):
    convert(source, to, path, progress=False, **options)
    return path


def npz(folder):
    for path in list_episodes(folder):
        with np.load(path) as file:
            yield {name: file[name] for name in file.files}


# --- what the consumers read ---


def as_infom(folder, rewards):
    """The arrays that InFOM's dataset_aggregator makes of the same episodes: its rules, read in its repository."""
    arrays = {name: [] for name in ("observations", "actions", "rewards", "next_observations", "terminals", "masks")}
    for episode, reward in zip(npz(folder), rewards, strict=True):
        ends = 1.0 - episode["discount"][1:]
        ends[-1] = 1.0
        rows = (episode["observation"][:-1], episode["action"][1:], reward[:, None], episode["observation"][1:], ends)
        for name, values in zip(arrays, (*rows, episode["discount"][1:]), strict=True):
            arrays[name].append(values)
    return {name: np.concatenate(values).squeeze() for name, values in arrays.items()}


def test_flat_is_what_infom_reads(folder, tmp_path):
    path = written(folder, "flat", tmp_path / "f.hdf5", task=TASK, relabel=True, control="exorl")
    episodes = map(read_episode, list_episodes(folder))
    expected = as_infom(folder, [relabel(TASK, episode, control="exorl") for episode in episodes])
    with h5py.File(path) as file:
        keys = []
        file.visititems(lambda name, item: keys.append(name) if isinstance(item, h5py.Dataset) else None)
        read = {key: file[key][:] for key in keys}
        assert file.attrs["task"] == TASK
    assert read.keys() == expected.keys()
    for name, values in read.items():
        assert values.dtype == np.float32
        np.testing.assert_array_equal(values.squeeze(), expected[name], err_msg=name)
    assert np.flatnonzero(read["terminals"]).tolist() == [19, 39, 59, 79, 99]
    assert np.flatnonzero(read["masks"] == 0).tolist() == [59]


def as_dict_buffer(folder):
    """What metamotivo's DictBuffer.load makes of a folder: its rules, read in TD-JEPA's repository."""
    config = json.loads((folder / "config.json").read_text())
    assert config.pop("__target__") == "metamotivo.buffers.transition.DictBuffer"
    begin, is_full = config.pop("_idx"), config.pop("_is_full")
    assert config.keys() == {"capacity", "device", "nested_key_separator"}
    storage = {}
    with h5py.File(folder / "buffer.hdf5") as file:
        for key, values in file.items():
            *nested, last = key.split(config["nested_key_separator"])
            inner = storage
            for name in nested:
                inner = inner.setdefault(name, {})
            inner[last] = values[:]
            assert values.ndim == 2
            assert len(values) == config["capacity"]
    assert (begin, is_full) == (0, True)
    return storage


def test_a_buffer_is_what_metamotivo_reads(folder, tmp_path):
    storage = as_dict_buffer(written(folder, "metamotivo", tmp_path / "buffer"))
    expected = {"observation": [], "action": [], "physics": [], "reward": [], "next": {}}
    expected["next"] = {"observation": [], "terminated": [], "physics": []}
    for episode in npz(folder):  # as its load_transitions makes them
        for name in ("observation", "physics"):
            expected[name].append(episode[name][:-1])
            expected["next"][name].append(episode[name][1:])
        for name in ("action", "reward"):
            expected[name].append(episode[name][1:])
        expected["next"]["terminated"].append((1 - episode["discount"][1:]).astype(bool))

    def compare(got, want):
        assert got.keys() == want.keys()
        for name, values in want.items():
            if isinstance(values, Mapping):
                compare(got[name], values)
                continue
            np.testing.assert_array_equal(got[name], np.concatenate(values))
            assert got[name].dtype == values[0].dtype

    compare(storage, expected)


def test_minari_is_what_its_format_says(folder, tmp_path):
    path = written(folder, "minari", tmp_path / "cartpole-v0")
    metadata = json.loads((path / "data/metadata.json").read_text())
    assert {name: metadata[name] for name in ("total_episodes", "total_steps", "data_format", "dataset_id")} == {
        "total_episodes": 5,
        "total_steps": 100,
        "data_format": "hdf5",
        "dataset_id": "cartpole-v0",
    }
    box = {"type": "Box", "dtype": "float32", "shape": [1], "low": [-1.0], "high": [1.0]}
    assert json.loads(metadata["action_space"]) == box
    with h5py.File(path / "data/main_data.hdf5") as file:
        for index, episode in enumerate(map(read_episode, list_episodes(folder))):
            group = file[f"episode_{index}"]
            assert dict(group.attrs) == {"id": index, "total_steps": STEPS}
            np.testing.assert_array_equal(group["observations"][:], episode.observation)
            np.testing.assert_array_equal(group["actions"][:], episode.action)
            np.testing.assert_array_equal(group["rewards"][:], episode.reward)
            np.testing.assert_array_equal(group["infos/physics"][:], episode.physics)
            ended, cut = group["terminations"][:], group["truncations"][:]
            assert (ended.sum(), cut.sum()) == ((1, 0) if index == 2 else (0, 1))
            assert ended[-1] != cut[-1]


def test_the_minari_library_reads_ours_and_we_what_it_wrote(folder, tmp_path):
    minari = pytest.importorskip("minari", reason="pip install 'minari[hdf5]'")
    ours = minari.MinariDataset(str(written(folder, "minari", tmp_path / "cartpole-v0") / "data"))
    assert (ours.total_episodes, ours.total_steps) == (5, 100)
    episodes = list(map(read_episode, list_episodes(folder)))
    buffers = []
    for index, (read, episode) in enumerate(zip(ours.iterate_episodes(), episodes, strict=True)):
        np.testing.assert_array_equal(read.observations, episode.observation)
        np.testing.assert_array_equal(read.actions, episode.action)
        np.testing.assert_array_equal(read.infos["physics"], episode.physics)
        parts = {name: getattr(read, name) for name in ("observations", "actions", "rewards")}
        ends = {name: getattr(read, name) for name in ("terminations", "truncations")}
        buffers.append(minari.data_collector.EpisodeBuffer(id=index, **parts, **ends, infos=read.infos))
    from minari.dataset.minari_storage import MinariStorage

    (tmp_path / "theirs-v0").mkdir()
    spaces = {"observation_space": ours.observation_space, "action_space": ours.action_space}
    storage = MinariStorage.new(tmp_path / "theirs-v0/data", **spaces)
    storage.update_episodes(buffers)
    source = open_source(tmp_path / "theirs-v0")
    for index, episode in enumerate(episodes):
        assert_same(source.read(index), episode)


# --- and back ---


@pytest.mark.parametrize("to", ["flat", "minari"])
def test_a_store_comes_back(folder, tmp_path, to, capsys):
    build(folder, TASK, tmp_path / "s.h5", workers=1, control="exorl", progress=False)
    there = written(tmp_path / "s.h5", to, tmp_path / "there-v0")
    back = TrajectoryStore.open(written(there, "store", tmp_path / "back.h5"), TASK)
    assert back.content_hash == TrajectoryStore.open(tmp_path / "s.h5").content_hash
    assert back.control == "exorl"
    assert str(there) in back.source


@settings(max_examples=20)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=6),
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    seed=st.integers(0, 1000),
)
def test_episodes_come_back(tmp_path_factory, lengths, sizes, seed):
    tmp_path, rng = tmp_path_factory.mktemp("round"), np.random.default_rng(seed)
    for index, steps in enumerate(lengths):
        discount = np.ones(steps)
        discount[-1] = rng.integers(2)
        arrays = {
            "observation": rng.normal(size=(steps + 1, sizes[0])),
            "action": rng.uniform(-1, 1, (steps, sizes[1])),
            "physics": rng.normal(size=(steps + 1, 4)),
            "extras": {"skill": np.tile(rng.random(2), (steps + 1, 1))},
        }
        write_episode(tmp_path / "e", index, Trajectory(reward=rng.random(steps), discount=discount, **arrays))
    own = [read_episode(path) for path in list_episodes(tmp_path / "e")]
    back = written(written(tmp_path / "e", "minari", tmp_path / "m-v0"), "episodes", tmp_path / "back")
    for left, right in zip(own, map(read_episode, list_episodes(back)), strict=True):
        assert_same(left, right)
    flat = open_source(written(tmp_path / "e", "flat", tmp_path / "f.hdf5"))
    assert flat.lengths.tolist() == lengths
    for index, episode in enumerate(own):
        for name in ("observation", "action", "reward", "discount"):
            np.testing.assert_array_equal(getattr(flat.read(index), name), getattr(episode, name))


def test_slices_are_those_of_build(folder, tmp_path):
    options = {"skip_steps": 20, "limit_steps": 45}
    build(folder, "cartpole-balance", tmp_path / "s.h5", workers=1, progress=False, **options)
    path = written(folder, "flat", tmp_path / "f.hdf5", **options)
    with h5py.File(path) as file:
        assert json.loads(file.attrs["selection"]) == options | {"spread": False}
        assert "the first 2 of 5 episodes in file-name order, after the first 20 steps" in file.attrs["source"]
    back = TrajectoryStore.open(written(path, "store", tmp_path / "back.h5"))
    for field in back.fields:
        want = TrajectoryStore.open(tmp_path / "s.h5").column(field)
        np.testing.assert_allclose(back.column(field), want, atol=1e-6)


def test_d4rl_says_timeouts(tmp_path):
    observations, names = np.arange(6, dtype=np.float32)[:, None], ("observations", "next_observations", "actions")
    with h5py.File(tmp_path / "d.hdf5", "w") as file:
        for name, values in zip(names, (observations, observations + 1, observations / 10), strict=True):
            file[name] = values
        file["rewards"] = np.arange(6.0)
        file["terminals"] = np.array([0, 0, 1, 0, 0, 0], bool)
        file["timeouts"] = np.array([0, 0, 0, 0, 1, 0], bool)
    source = open_source(tmp_path / "d.hdf5")
    assert source.lengths.tolist() == [3, 2, 1]
    assert [source.read(index).discount.tolist() for index in range(3)] == [[1, 1, 0], [1, 1], [1]]
    assert source.read(1).observation[:, 0].tolist() == [3, 4, 5]
    assert source.read(2).action.tolist() == [[0.5]]


# --- what must fail ---


def everything(path):
    source = open_source(path)
    return [source.read(index) for index in range(len(source.lengths))]


def edited(source, path, edit):
    """A copy of a file or folder whose HDF5 `edit` has changed, as if others had made it: without our checksum."""
    shutil.copytree(source, path) if source.is_dir() else shutil.copy(source, path)
    file = path / "data/main_data.hdf5" if path.is_dir() else path
    if path.is_dir():
        metadata = json.loads((path / "data/metadata.json").read_text())
        del metadata["rlring_checksum"]
        (path / "data/metadata.json").write_text(json.dumps(metadata))
    else:
        with open(path, "r+b") as content:
            content.write(bytes(512))
    with h5py.File(file, "r+") as changed:
        edit(changed)
    return path


def replaced(file, name, values):
    del file[name]
    file[name] = values


def test_flat_files_shifted_by_one_fail(folder, tmp_path):
    flat = written(folder, "flat", tmp_path / "f.hdf5")
    for number, (edit, message) in enumerate(
        [
            (
                lambda f: replaced(f, "next_observations", f["observations"][:]),
                r"next_observations\[0\] is not observations\[1\], within an episode; the rows are shuffled or shifted",
            ),
            (
                lambda f: replaced(f, "terminals", np.roll(f["terminals"][:], 1)),
                r"next_observations\[19\] is not observations\[20\], within an episode",
            ),
            (lambda f: replaced(f, "rewards", f["rewards"][:-1]), r"/rewards has 99 rows; expected 100"),
            (lambda f: replaced(f, "rewards", np.ones((100, 2))), r"rewards has shape \(20, 2\); expected one number"),
            (lambda f: replaced(f, "observations", np.ones((100, 3))), "as many of each; got shapes"),
            (lambda f: replaced(f, "masks", [b"pickle"] * 100), "/masks is no array of numbers"),
            (lambda f: f.__delitem__("rewards"), "it has no rewards .InFOM calls it reward-free"),
            (lambda f: f.__delitem__("terminals"), "it lacks terminals; it has actions, masks"),
            (lambda f: replaced(f, "rewards", h5py.SoftLink("/masks")), "it lacks rewards"),
            (lambda f: replaced(f, "rewards", h5py.ExternalLink(str(flat), "rewards")), "it lacks rewards"),
            (lambda f: f["actions"].write_direct(np.full((100, 1), np.nan, "f4")), r"action\[0, 0\] is nan"),
        ]
    ):
        with pytest.raises(DataError, match=message):
            everything(edited(flat, tmp_path / f"{number}.hdf5", edit))


def test_minari_files_shifted_by_one_fail(folder, tmp_path):
    dataset = written(folder, "minari", tmp_path / "d-v0")
    for number, (edit, message) in enumerate(
        [
            (
                lambda f: replaced(f, "episode_0/observations", f["episode_0/observations"][1:]),
                r"episode_0/observations has 20 rows; expected 21",
            ),
            (
                lambda f: replaced(f, "episode_0/actions", f["episode_0/observations"][:]),
                r"episode_0/actions has 21 rows; expected 20",
            ),
            (lambda f: f.__delitem__("episode_4"), "it lacks episode_4, which its metadata counts"),
            (
                lambda f: (f.__delitem__("episode_0/actions"), f.create_group("episode_0/actions")),
                "episode_0/actions is a group; only arrays of numbers are read, not dictionaries",
            ),
        ]
    ):
        with pytest.raises(DataError, match=message):
            open_source(edited(dataset, tmp_path / f"{number}-v0", edit)).read(0)
    meta = dataset / "data/metadata.json"
    for text, message in (
        ("{", "metadata.json: damaged"),
        ("[]", "not the metadata of a Minari dataset"),
        ('{"data_format": "arrow"}', "'arrow' files are not read; convert it to hdf5 first"),
        ('{"total_episodes": 0}', "total_episodes must be 1 or more; got 0"),
    ):
        meta.write_text(text)
        with pytest.raises(DataError, match=message):
            open_source(dataset)


@pytest.mark.parametrize("kind", ["flat", "minari"])
def test_a_damaged_file_is_refused_or_read_right(folder, tmp_path, kind):
    path = written(folder, kind, tmp_path / "d-v0", limit_steps=2 * STEPS)
    file = path / "data/main_data.hdf5" if path.is_dir() else path
    own, whole, refused = [read_episode(one) for one in list_episodes(folder)[:2]], file.read_bytes(), 0
    for seed in range(150):
        rng, damaged = np.random.default_rng(seed), bytearray(whole)
        place = int(rng.integers(len(damaged)))
        if rng.random() < 0.3:
            del damaged[place:]
        else:
            damaged[place : place + 4] = rng.bytes(4)
        file.unlink()  # another file: the HDF5 library knows those that are still open by their number
        file.write_bytes(damaged)
        try:
            read = everything(path)
        except DataError:
            refused += 1
            continue
        for left, right in zip(read, own, strict=True):
            for name in ("observation", "action", "reward", "discount"):
                np.testing.assert_array_equal(getattr(left, name), getattr(right, name), err_msg=f"seed {seed}")
    assert refused > 140
    file.write_bytes(whole[:-100])
    with pytest.raises(DataError, match=re.escape(str(file))):
        everything(path)


def test_wrong_arguments(folder, tmp_path, capsys):
    build(folder, TASK, tmp_path / "s.h5", workers=1, progress=False)
    collect("point_mass-dark", "waypoints", 1, 0, tmp_path / "dark", progress=False)
    build(tmp_path / "dark", "point_mass-dark", tmp_path / "dark.h5", workers=1, progress=False)
    flat = written(folder, "flat", tmp_path / "f.hdf5")
    unnamed = edited(flat, tmp_path / "g.hdf5", lambda f: f.attrs.clear())
    dark = written(tmp_path / "dark", "minari", tmp_path / "dark-v0")
    (tmp_path / "text").write_text("precious")
    new = str(tmp_path / "new")
    for arguments, message in (
        ([folder, "--to", "flat", "--out", tmp_path / "text"], "exists already; choose another --out, or delete it"),
        ([folder, "--to", "minari", "--out", new], "a Minari dataset is named NAME-vN, such as walker-walk-v0"),
        ([folder, "--to", "store", "--out", new], "make a store of it with `python -m data.build`"),
        ([folder, "--to", "flat", "--out", new, "--relabel"], "--relabel computes the rewards of a task: name it"),
        ([folder, "--to", "flat", "--out", new, "--task", TASK], "add --relabel to compute those"),
        ([folder, "--to", "flat", "--out", new, "--task", "walker-wlak"], "did you mean 'walker-walk'"),
        ([folder, "--to", "flat", "--out", new, "--skip-steps", "100"], "--skip-steps 100 leaves nothing of"),
        ([folder, "--to", "flat", "--out", ""], "--out is empty; name a path"),
        ([tmp_path / "s.h5", "--to", "metamotivo", "--out", new], "has no physics, which metamotivo's buffers hold"),
        ([tmp_path / "dark.h5", "--to", "flat", "--out", new], "point_mass-dark hides its goal; convert its episodes"),
        ([dark, "--to", "store", "--out", new], "point_mass-dark hides a goal: convert to episodes"),
        ([unnamed, "--to", "store", "--out", new], "does not say whose rewards it holds, and a store must"),
        ([unnamed, "--to", "store", "--out", new, "--task", "walker-walk"], "24 numbers of observation and 6 of"),
        ([flat, "--to", "minari", "--out", f"{new}-v0", "--task", TASK, "--relabel"], "no physics states"),
        ([tmp_path / "nothing", "--to", "flat", "--out", new], "nothing at .*nothing; name a store"),
        ([tmp_path / "text", "--to", "flat", "--out", new], "is not a trajectory store"),
        ([tmp_path, "--to", "flat", "--out", new], "it holds no <name>_<index>_<length>.npz"),
    ):
        assert main(list(map(str, arguments))) == 2, arguments
        said = capsys.readouterr().err.splitlines()
        with pytest.raises(DataError, match=message):
            raise DataError(said[-1])
        assert said[-1].startswith("error: ")
        assert not [path for path in tmp_path.iterdir() if "new" in path.name], "nothing is left behind"
    assert (tmp_path / "text").read_text() == "precious"


FORMATS = {"flat": "f.hdf5", "minari": "m-v0", "metamotivo": "buffer", "episodes": "again"}


@pytest.mark.parametrize("to", FORMATS)
def test_a_full_disk_is_one_message_and_leaves_nothing(folder, tmp_path, capsys, to):
    """Of the HDF5 library it was a segmentation fault, when it closed a file that it could not write."""
    out, limit = tmp_path / FORMATS[to], resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limit[1]))
    try:
        assert main([str(folder), "--to", to, "--out", str(out)]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"error: the disk is full: could not write {out} (")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("to", ["minari", "metamotivo", "episodes"])
def test_a_folder_is_there_when_it_is_whole(folder, tmp_path, monkeypatch, to):
    """A part of the episodes would pass for all of them, and the same command would find its folder taken."""
    out, read = tmp_path / FORMATS[to], EpisodeFolder.read

    def interrupted(source, episode):
        if episode == 3:
            with pytest.raises(DataError, match=rf"another process is writing {out} right now; wait for it"):
                written(folder, to, out, limit_steps=STEPS)
            raise KeyboardInterrupt
        return read(source, episode)

    left = tmp_path / f".{out.name}.rlring-partial"  # of a writer that was killed
    left.mkdir()
    (left / "episode_000009_20.npz").write_text("PK")
    monkeypatch.setattr(EpisodeFolder, "read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        written(folder, to, out)
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    if to != "metamotivo":  # which nothing here reads
        assert len(open_source(written(folder, to, out)).lengths) == 5


def test_command_line(folder, tmp_path, capsys):
    out = tmp_path / "f.hdf5"
    words = [str(folder), "--to", "flat", "--out", str(out), "--task", TASK, "--relabel", "--limit-steps", "60"]
    assert main(words) == 0
    assert f"wrote {out}: 3 episodes, 60 steps, as flat" in capsys.readouterr().out
    source = open_source(Path(out))
    assert (source.task, source.control, source.lengths.tolist()) == (TASK, "actual", [STEPS] * 3)
    np.testing.assert_array_equal(source.read(1).reward, relabel(TASK, read_episode(list_episodes(folder)[1])))
