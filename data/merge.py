"""Joins the shards that `python -m data.build --shard I/N` wrote into one store.

    python -m data.merge stores/walker_walk_rnd.h5

The result holds the same numbers in the same order as the store that a single build would have written, and that build
finds it up to date. One episode is in memory at a time.
"""

import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from data import cli
from data.errors import DataError
from data.origin import Origin
from data.selection import Shard, shards_of
from data.store import TrajectoryStore
from data.store_file import check_own
from data.store_writer import Counted, write_store
from data.trajectory import Trajectory


def merge(out: str | Path, *, delete: bool = False, progress: bool = True) -> TrajectoryStore:
    """Writes the store `out` from the shards beside it, and returns it; with `delete`, then deletes the shards.

    DataError when shards are missing, damaged or of different builds, and when `out` exists and is not a store.
    """
    out = cli.named_path("OUT", out)
    check_own(out)
    shards = _whole_set(out)
    stores = [TrajectoryStore.open(path) for path in shards]
    origin = _joined(shards)
    first = stores[0]
    store = write_store(
        out,
        Counted(_episodes(stores), sum(store.episodes for store in stores)),
        task=first.task,
        source=first.source.rsplit("; shard ", 1)[0],
        keep_physics="physics" in first.fields,
        origin=origin,
        control=first.control,
        goal=first.goal,
        skipped=[message for store in stores for message in store.skipped],
        progress=progress,
    )
    for path in shards if delete else ():
        path.unlink()
    print(f"wrote {out}: {store.episodes} episodes, {store.steps} steps of {store.task}, from {len(shards)} shards")
    return store


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    parser = cli.Parser(prog="python -m data.merge", description="Joins the shards of a store.")
    parser.add_argument("out", metavar="OUT", help="the store: what data.build was given as --out")
    parser.add_argument("--delete", action="store_true", help="delete the shards when the store is complete")
    options = parser.parse_args(arguments)
    return cli.run(partial(merge, **vars(options)))


def _whole_set(out: Path) -> list[Path]:
    """Returns the shards in order; DataError if some are missing, or belong to builds with different shard counts."""
    found = shards_of(out)
    counts = {shard.count for shard in found}
    if not counts:
        raise DataError(
            f"no shards of {out}: there is no {Shard(0, 8).path(out).name} or the like. Build them with "
            f"`python -m data.build ... --out {out} --shard I/N`"
        )
    if len(counts) > 1:
        raise DataError(
            f"{out.parent} holds shards of {out.name} in {' and in '.join(str(count) for count in sorted(counts))} "
            "parts; delete those of the older build"
        )
    (count,) = counts
    missing = [index for index in range(count) if Shard(index, count) not in found]
    if missing:
        raise DataError(
            f"shard{'s' * (len(missing) > 1)} {', '.join(map(str, missing))} of {count} of {out} "
            f"{'are' if len(missing) > 1 else 'is'} missing; build with `--shard {Shard(missing[0], count)}`"
        )
    return [found[Shard(index, count)] for index in range(count)]


def _joined(shards: Sequence[Path]) -> Origin:
    origins = [Origin.of(path) for path in shards]
    for path, origin in zip(shards, origins, strict=True):
        if not origin.shard or origin.settings != origins[0].settings:
            raise DataError(
                f"{path} was built with other settings or versions than {shards[0].name}; build it again: "
                f"they say {origin.settings or 'nothing'} and {origins[0].settings or 'nothing'}"
            )
        if origin.whole != origins[0].whole:
            raise DataError(
                f"{path} is a part of other episodes than {shards[0].name}: the folder was another one, or has changed "
                "in between. Run the `--shard` builds again: what is up to date stays"
            )
    return Origin(origins[0].settings, np.concatenate([origin.digests for origin in origins]))


def _episodes(stores: Sequence[TrajectoryStore]) -> Iterator[Trajectory]:
    for store in stores:
        yield from (store.trajectory(episode) for episode in range(store.episodes))
        store.close()


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
