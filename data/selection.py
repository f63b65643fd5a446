"""Selects the episodes of a folder from which a store is built, and divides them into shards."""

import re
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int

from data.errors import DataError


@dataclass(frozen=True)
class Selection:
    """Selects whole episodes in file-name order: those that end after the first `skip_steps` steps, and within the
    `limit_steps` steps that follow.

    With `spread`, it selects episodes at equal distances instead, as many as fit in `limit_steps`. (ExoRL's own loader
    reads the first 1,000,000 steps; InFOM skips 5,000,000 and takes 500,000.)
    """

    skip_steps: int = 0
    limit_steps: int | None = None
    spread: bool = False

    def __post_init__(self) -> None:
        if self.limit_steps is not None and self.limit_steps < 1:
            raise DataError(f"--limit-steps must be 1 or more; got {self.limit_steps}")
        if self.skip_steps < 0:
            raise DataError(f"--skip-steps must be 0 or more; got {self.skip_steps}")
        if self.spread and self.limit_steps is None:
            raise DataError("--spread takes as many episodes as --limit-steps has room for; give that too")

    @staticmethod
    def add_arguments(parser: ArgumentParser) -> None:
        """Adds the options that set the fields of a Selection."""
        parser.add_argument("--limit-steps", type=int, help="use whole episodes up to this many steps in total")
        parser.add_argument(
            "--skip-steps", type=int, default=0, help="leave out the first episodes, up to this many steps"
        )
        parser.add_argument(
            "--spread", action="store_true", help="with --limit-steps: episodes at equal distances, not the first ones"
        )

    def choose(self, lengths: Sequence[int] | Int[np.ndarray, " E"], where: Path) -> list[int]:
        """Returns the indices of the selected episodes. `lengths` has the steps of every episode, and `where` is named
        in errors. DataError when nothing is selected."""
        lengths = np.asarray(lengths)
        ends = np.cumsum(lengths)
        begin = int(np.searchsorted(ends, self.skip_steps, side="right")) if self.skip_steps else 0
        if begin == len(lengths):
            raise DataError(f"--skip-steps {self.skip_steps} leaves nothing of {where}, which has {ends[-1]} steps")
        if self.limit_steps is None:
            return list(range(begin, len(lengths)))
        count = int(np.searchsorted(ends, self.skip_steps + self.limit_steps, side="right")) - begin
        if count < 1:
            raise DataError(
                f"--limit-steps {self.limit_steps} is less than the first episode of {where}"
                f"{' that is not skipped' if begin else ''}, {lengths[begin]} steps; raise it"
            )
        if not self.spread:
            return list(range(begin, begin + count))
        return (begin + _spread(lengths[begin:], self.limit_steps)).tolist()

    def describe(self, chosen: int, there: int) -> str:
        """Returns the selection in words; `chosen` of `there` episodes were selected."""
        after = f", after the first {self.skip_steps} steps" if self.skip_steps else ""
        if self.spread:
            return f"{chosen} of {there} episodes, spread evenly{after}"
        if chosen == there:
            return f"all {there} episodes"
        return f"the first {chosen} of {there} episodes in file-name order{after}"


@dataclass(frozen=True)
class Shard:
    """Part `index`, counted from 0, of the selected episodes divided into `count` parts."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """Returns the shard for the text `I/N`; DataError when the text is not of this form, or I >= N."""
        found = re.fullmatch(r"(\d+)/(\d+)", text)
        if found is None or int(found[1]) >= int(found[2]):
            raise DataError(f"--shard is I/N, with I from 0 to N - 1, such as 0/8; got {text!r}")
        return cls(int(found[1]), int(found[2]))

    def choose(self, paths: Sequence[Path]) -> list[Path]:
        """Returns the shard's part of `paths`; DataError when there are fewer paths than shards."""
        if len(paths) < self.count:
            raise DataError(f"--shard {self}: only {len(paths)} episodes are chosen; use at most as many shards")
        return [paths[row] for row in np.array_split(np.arange(len(paths)), self.count)[self.index]]

    def path(self, out: Path) -> Path:
        """Returns the path of this shard of the store `out`, in the same folder."""
        return out.with_name(f"{out.stem}.shard-{self.index}-of-{self.count}{out.suffix}")

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


def shards_of(out: Path) -> dict[Shard, Path]:
    """Returns the existing shards of the store `out` and their paths."""
    name = re.compile(re.escape(out.stem) + r"\.shard-(\d+)-of-(\d+)" + re.escape(out.suffix))
    found = {path: name.fullmatch(path.name) for path in sorted(out.parent.glob("*"))}
    return {Shard(int(match[1]), int(match[2])): path for path, match in found.items() if match}


def _spread(lengths: np.ndarray, limit: int) -> np.ndarray:
    """Returns the indices of episodes at equal distances, as many as have at most `limit` steps together (at least
    one)."""
    count = min(len(lengths), int(limit / lengths.mean()) + 1)
    while True:
        # The episodes are divided into `count` equal parts; the middle one of each part is selected.
        chosen = ((np.arange(count) + 0.5) * len(lengths) / count).astype(int)
        if count == 1 or lengths[chosen].sum() <= limit:
            return chosen
        count -= 1
