"""Damage to a checkpoint: found when it is read, and told in one line."""

import gc
import json
import sys
import traceback
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from agents.cli import ConfigError


@contextmanager
def whole(place: Path) -> Iterator[None]:
    """ConfigError when the checkpoint `place` that orbax reads here is damaged: files cut short, lost, overwritten.

    `place` may be the folder of all checkpoints, of which orbax reads some files: the damaged one is then looked for.
    """
    try:
        yield
    except Exception as error:
        # A sweep of cuts and flipped bytes over all files raised these, and for the data of arrays a bare Exception,
        # which only this can catch. Everything else, such as a full memory, is raised.
        known = (ValueError, TypeError, KeyError, AttributeError, NotImplementedError, FileNotFoundError)
        if isinstance(error, ConfigError) or (not isinstance(error, known) and type(error) is not Exception):
            raise
        _forget(error)
        told = next(iter(str(error).splitlines()), "")[:120] or type(error).__name__
        raise damaged(_unreadable(place) or place, told) from error


def damaged(place: Path, why: str) -> ConfigError:
    """Returns the error that names a damaged checkpoint."""
    which = f"the checkpoint {place}" if place.name.isdigit() else f"one of the checkpoints in {place}"
    return ConfigError(
        f"{which} is damaged ({why}). Delete the folder of that one to use the one before it, or train again."
    )


def checksums(arrays: Mapping[str, jax.Array], text: object = None) -> dict[str, int]:
    """Returns a number of every array, the same on every mesh, that almost surely changes with any of its bits; and of
    what JSON keeps, `text`, under "". The compression of a checkpoint has none: it hands out wrong numbers silently.
    """
    sums = {name: int(value) for name, value in jax.device_get(_sums(dict(arrays))).items()}
    return sums if text is None else sums | {"": zlib.crc32(json.dumps(text, sort_keys=True).encode())}


def check(place: Path, kept: Mapping[str, int], now: Mapping[str, int]) -> None:
    """ConfigError when what was read is not what was written; an older checkpoint keeps no checksums."""
    changed = [name or "settings" for name, value in now.items() if kept.get(name, value) != value]
    if changed:
        raise damaged(place, f"other numbers than were written, in {', '.join(changed[:2])}")


def custom(manager: Any, step: int) -> dict[str, Any]:
    """Returns what a checkpoint was saved with as `custom_metadata`. ConfigError when that is lost, which orbax gives
    as nothing."""
    kept = manager.metadata(step)
    if kept.init_timestamp_nsecs is None:
        raise damaged(manager.directory / str(step), "its _CHECKPOINT_METADATA cannot be read")
    return dict(kept.custom_metadata or {})


def _forget(error: BaseException) -> None:
    """Drops what a failed read left half-done, which would tell of itself on stderr, now or when its threads end."""
    before, sys.unraisablehook = sys.unraisablehook, lambda unraisable: None
    try:
        traceback.clear_frames(error.__traceback__)
        gc.collect()
    finally:
        is_set = getattr(before, "func", None) is _but_given_up
        sys.unraisablehook = before if is_set else partial(_but_given_up, before)


# What a coroutine says that is collected before its end: of asyncio, and of orbax about an array that it was reading.
GIVEN_UP = ("Event loop is closed", "Encountered error while reading array index")


def _but_given_up(hook: Callable[[Any], object], unraisable: Any) -> None:
    if not str(unraisable.exc_value).startswith(GIVEN_UP):
        hook(unraisable)


@jax.jit
def _sums(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    def total(x: jax.Array) -> jax.Array:
        x = x.astype(jnp.uint8) if x.dtype == bool else x
        words = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{min(8 * x.dtype.itemsize, 32)}"))
        return words.astype(jnp.uint32).sum(dtype=jnp.uint32)

    return jax.tree.map(total, arrays)


def _unreadable(place: Path) -> Path | None:
    """Returns the first checkpoint with a file that orbax reads of all of them and that is no JSON."""
    for name in ("metrics/metrics", "_CHECKPOINT_METADATA"):
        for path in sorted(place.glob(f"*/{name}")):
            try:
                json.loads(path.read_bytes())
            except ValueError:
                return place / path.relative_to(place).parts[0]
    return None
