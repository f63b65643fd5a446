"""Summarises a store or a folder of episodes on one screen.

python -m data.info stores/walker_walk_rnd.h5 datasets/walker/rnd
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int
from tqdm import tqdm

from data import cli
from data.exorl import collected, list_episodes, read_episode, read_reward
from data.store import TrajectoryStore

_BINS = 10
_WIDTH = 50  # of the longest bar


def describe(path: str | Path, progress: bool = False) -> str:
    """Returns a summary of the store, or of the folder of ExoRL episodes, at `path`: text of at most 25 lines.

    For a folder, the rewards of all episodes are read (a millisecond per episode), and one whole episode. DataError
    when `path` is neither a store nor such a folder, and when a file is damaged.
    """
    path = Path(path)
    return _of_folder(path, progress) if path.is_dir() else _of_store(path)


def histogram(values: Float[np.ndarray, " N"]) -> list[str]:
    """Returns a text histogram: a line for each of ten equal bins, with its bounds, a bar and the count. If all values
    are equal up to rounding, returns one line."""
    low, high = float(values.min()), float(values.max())
    # Differences below the precision of float32 sums are rounding errors.
    if high - low <= 1e-6 * max(1.0, abs(low), abs(high)):
        return [f"  all {low:.6g}"]
    counts, edges = np.histogram(values, bins=_BINS)
    texts = [f"{edge:.{_decimals(high - low)}f}" for edge in edges]
    width = max(map(len, texts))
    bars = ["#" * int(np.ceil(_WIDTH * count / counts.max())) for count in counts]
    return [
        f"  {start:>{width}} to {end:>{width}}  {bar:{_WIDTH}} {count}"
        for start, end, bar, count in zip(texts[:-1], texts[1:], bars, counts, strict=True)
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    parser = cli.Parser(prog="python -m data.info", description="Summarises stores and folders of episodes.")
    parser.add_argument("paths", nargs="+", metavar="PATH", help="a store, or a folder of episodes")
    options = parser.parse_args(argv)
    return cli.run(lambda: _print(options.paths))


def _print(paths: Iterable[str]) -> None:
    for number, path in enumerate(paths):
        if number:
            print()
        print(describe(cli.named_path("PATH", path), progress=True), flush=True)


def _of_store(path: Path) -> str:
    store = TrajectoryStore.open(path)
    sizes = {"observation": store.observation_size, "action": store.action_size}
    others = [field for field in store.fields if field not in (*sizes, "reward", "discount")]
    facts = {
        "from": store.source,
        "left out": _some(store.skipped),
        "rewards": f"of {store.task}, control {store.control}" if store.control else "",
        "made with": _versions(store.versions),
        "numbers": _numbers({**sizes, **{field: int(np.prod(store.shape(field)[1:])) for field in others}}),
        "steps": _steps(store.lengths),
        "size": _size([path]),
        "content": store.content_hash[:16],
        "made from": store.made_from[:16],
    }
    lines = [f"{path}: a store of {store.task}, {_counts(store.episodes, store.steps)}", *_listed(facts)]
    if store.goal == "hindsight":
        return "\n".join(
            [*lines, "  returns   none yet: goals are chosen, and rewards computed, when chains are drawn"]
        )
    return "\n".join([*lines, *_returns(store.returns)])


def _of_folder(folder: Path, progress: bool) -> str:
    paths = list_episodes(folder)
    first = read_episode(paths[0])
    lengths, returns = np.empty(len(paths), np.int64), np.empty(len(paths))
    for row, path in enumerate(tqdm(paths, desc=str(folder), unit="episode", leave=False, disable=not progress)):
        reward = read_reward(path)
        lengths[row], returns[row] = len(reward), reward.sum(dtype=np.float64)
    note = collected(paths[0].parent)
    facts = {
        "policy": f"{note.get('policy')}, seed {note.get('seed')}" if note else "unknown: it has no collect.json",
        "made with": _versions(note.get("versions", {})),
        "numbers": _numbers(
            {
                "observation": first.observation.shape[1],
                "action": first.action.shape[1],
                "physics": 0 if first.physics is None else first.physics.shape[1],
                **{key: int(np.prod(values.shape[1:])) for key, values in first.extras.items()},
            }
        ),
        "steps": _steps(lengths),
        "size": _size(paths),
    }
    of = f" of {note['task']}" if note else ""
    title = f"{folder}: a folder of episodes{of}, {_counts(len(paths), int(lengths.sum()))}"
    return "\n".join([title, *_listed(facts), *_returns(returns)])


def _listed(facts: Mapping[str, str]) -> list[str]:
    return [f"  {name:10}{fact}" for name, fact in facts.items() if fact]


def _counts(episodes: int, steps: int) -> str:
    return f"{episodes:,} episode{'s' * (episodes != 1)}, {steps:,} steps"


def _steps(lengths: Int[np.ndarray, " N"]) -> str:
    shortest, longest = int(lengths.min()), int(lengths.max())
    return f"{longest} each" if shortest == longest else f"{shortest} to {longest}, median {np.median(lengths):g}"


def _versions(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _some(messages: Sequence[str]) -> str:
    return f"{len(messages)} bad, such as {messages[0]}" if messages else ""


def _numbers(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {size}" for name, size in sizes.items() if size)


def _size(paths: Iterable[Path]) -> str:
    size = float(sum(path.stat().st_size for path in paths))
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{size:.3g} {unit}"


def _decimals(spread: float) -> int:
    return max(0, 2 - int(np.floor(np.log10(spread))))


def _returns(returns: Float[np.ndarray, " N"]) -> list[str]:
    title = f"returns   mean {returns.mean():.6g}, median {np.median(returns):.6g}"
    return [f"  {title}", *histogram(returns)]


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
