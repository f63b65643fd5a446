"""Detection of damaged checkpoints when they are read, with a one-line error."""

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
def reporting_damage(place: Path) -> Iterator[None]:
    """Turns the errors of orbax, raised in this context by a damaged checkpoint `place`, into a ConfigError.

    Damage means truncated, missing or overwritten files. `place` may also be the folder of all checkpoints, of which
    orbax reads some files: the error then names the damaged checkpoint, if it can be found.
    """
    try:
        yield
    except Exception as error:
        # Truncated files and flipped bytes raise these, and in array data a bare Exception. Everything else, such as
        # running out of memory, is passed on.
        known = (ValueError, TypeError, KeyError, AttributeError, NotImplementedError, FileNotFoundError)
        if isinstance(error, ConfigError) or (not isinstance(error, known) and type(error) is not Exception):
            raise
        _forget(error)
        told = next(iter(str(error).splitlines()), "")[:120] or type(error).__name__
        raise damaged(_unreadable(place) or place, told) from error


def damaged(place: Path, why: str) -> ConfigError:
    """Returns the ConfigError for a damaged checkpoint. place: its folder, or that of all checkpoints."""
    which = f"the checkpoint {place}" if place.name.isdigit() else f"one of the checkpoints in {place}"
    return ConfigError(
        f"{which} is damaged ({why}). Delete the folder of that one to use the one before it, or train again."
    )


def checksums(arrays: Mapping[str, jax.Array], text: object = None) -> dict[str, int]:
    """Returns a 32-bit checksum of every array, the same on every mesh, and of `text`, what JSON keeps, under "".

    The compression of checkpoints has no checksum: a flipped bit there gives wrong numbers without an error.
    """
    sums = {name: int(value) for name, value in jax.device_get(_sums(dict(arrays))).items()}
    return sums if text is None else sums | {"": zlib.crc32(json.dumps(text, sort_keys=True).encode())}


def check(place: Path, kept: Mapping[str, int], now: Mapping[str, int]) -> None:
    """Raises ConfigError when the checksums after reading differ from those kept. Older checkpoints keep none."""
    changed = [name or "settings" for name, value in now.items() if kept.get(name, value) != value]
    if changed:
        raise damaged(place, f"other numbers than were written, in {', '.join(changed[:2])}")


def custom_metadata(manager: Any, step: int) -> dict[str, Any]:
    """Returns the `custom_metadata` that a checkpoint was saved with. Raises ConfigError when they are lost; orbax then
    returns nothing."""
    kept = manager.metadata(step)
    if kept.init_timestamp_nsecs is None:
        raise damaged(manager.directory / str(step), "its _CHECKPOINT_METADATA cannot be read")
    return dict(kept.custom_metadata or {})


def _forget(error: BaseException) -> None:
    """Frees what a failed read left behind, without the messages that it would print to stderr now or later."""
    before, sys.unraisablehook = sys.unraisablehook, lambda unraisable: None
    try:
        traceback.clear_frames(error.__traceback__)
        gc.collect()
    finally:
        is_set = getattr(before, "func", None) is _but_given_up
        sys.unraisablehook = before if is_set else partial(_but_given_up, before)


# Messages of unfinished coroutines when they are collected, from asyncio and from orbax' reading of arrays.
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
    """Returns the first checkpoint whose metrics or metadata, which orbax reads for all checkpoints, are not JSON."""
    for name in ("metrics/metrics", "_CHECKPOINT_METADATA"):
        for path in sorted(place.glob(f"*/{name}")):
            try:
                json.loads(path.read_bytes())
            except ValueError:
                return place / path.relative_to(place).parts[0]
    return None
