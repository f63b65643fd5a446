"""The folder of episodes that `data.collect` writes: its note `collect.json`, and a lock for one process at a time."""

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path

from data.atomic_file import lock, write_text
from data.errors import DataError

NOTE = "collect.json"


def describe(task: str, policy: str, seed: int, episode_steps: int) -> dict[str, object]:
    """Returns the content of `collect.json` for a dataset, with the installed versions."""
    return {"task": task, "policy": policy, "seed": seed, "episode_steps": episode_steps, "versions": _versions()}


def claim(out: Path, description: Mapping[str, object]) -> None:
    """Creates the folder and its `collect.json`. If they exist, checks that everything but the versions agrees.

    DataError when something disagrees, and when the folder holds episodes without a readable `collect.json`.
    """
    if out.exists() and not out.is_dir():
        raise DataError(f"{out} is a file; --out names a folder. Choose another")
    out.mkdir(parents=True, exist_ok=True)
    path = out / NOTE
    if not path.exists():
        if any(out.glob("*.npz")):
            raise DataError(f"{out} holds episodes but no collect.json that says of what. Choose another --out")
        write_text(path, json.dumps(description, indent=2) + "\n")
        return
    try:
        present = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is damaged ({error}); choose another --out, or delete that folder") from None
    if not isinstance(present, dict) or not isinstance(present.get("versions") or {}, dict):
        raise DataError(f"{path} is not what data.collect writes; choose another --out, or delete that folder")
    for key, value in description.items():
        if key != "versions" and present.get(key) != value:
            raise DataError(
                f"{out} holds episodes of {key} {present.get(key)!r}, and this run is of {key} {value!r}. "
                "Choose another --out, or delete that folder"
            )


def note_versions(out: Path, locks: ExitStack) -> None:
    """Adds the installed versions to collect.json, and prints a note if they differ from those recorded.

    Collecting may go on with other versions. Writing replaces collect.json, so the new file is locked too (`alone`).
    """
    path = out / NOTE
    present = json.loads(path.read_text())
    before, now = present.get("versions") or {}, _versions()
    other = {name: before.get(name) for name in now if now[name] not in str(before.get(name)).split(", ")}
    if not other:
        return
    told = ", ".join(f"{name} {was} ({now[name]} now)" for name, was in other.items())
    print(f"note: the episodes in {out} so far were made with {told}; collect.json keeps both", file=sys.stderr)
    both = {name: f"{was}, {now[name]}" if was else now[name] for name, was in other.items()}
    write_text(path, json.dumps({**present, "versions": {**before, **both}}, indent=2) + "\n")
    locks.enter_context(alone(out))


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Locks the folder; DataError when another process collects into it, because both would write the same files."""
    with open(out / NOTE, "rb") as note:
        lock(note, f"another process collects into {out} right now; wait for it, or choose another --out")
        yield


def _versions() -> dict[str, str]:
    return {package: version(package) for package in ("dm_control", "mujoco", "numpy")}
