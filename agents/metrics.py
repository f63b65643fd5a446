"""Logging of training runs: lines of `metrics.jsonl`, and wandb on request."""

import importlib.util
import json
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any

import jax

from agents.checkpoint import read_metrics
from agents.cli import ConfigError
from agents.config import Config, WandbConfig, dump
from agents.statistics import SummaryRow
from data.atomic_file import write_text

WANDB_ID = "wandb_id"


def check_wandb(config: WandbConfig) -> None:
    """Raises ConfigError when wandb is enabled and cannot start: it is not installed, or there is no API key. Does not
    use the network."""
    if config.mode == "disabled":
        return
    if importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            f"wandb.mode is '{config.mode}' and wandb is not installed: pip install wandb, or {_OTHERWISE}."
        )
    import wandb

    if config.mode == "online" and not wandb.login(prompt=False, verify=False):
        raise ConfigError(
            "wandb.mode is 'online' and wandb knows no API key here: run `wandb login`, set WANDB_API_KEY, or "
            f"{_OTHERWISE}."
        )


_OTHERWISE = "choose wandb.mode=offline or wandb.mode=disabled"


def claim(folder: Path, config: Config) -> Any:
    """Creates the run folder with its config.json, and returns the wandb run, or None if wandb is disabled. Raises
    ConfigError when wandb does not start; a new folder is then removed again."""
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        wandb_run = _start_wandb(folder, config)
        write_text(folder / "config.json", dump(config))
    except BaseException:
        if is_new:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    return wandb_run


def _start_wandb(folder: Path, config: Config) -> Any:
    wandb_settings = config.wandb
    if wandb_settings.mode == "disabled":
        return None
    import wandb

    settings = json.loads(dump(config))
    # A continued training and the evaluations log to the same wandb run.
    kept = folder / WANDB_ID
    if not kept.exists():
        write_text(kept, uuid.uuid4().hex)
    try:
        return wandb.init(
            project=wandb_settings.project,
            name=config.name,
            mode=wandb_settings.mode,
            config=settings,
            dir=folder,
            id=kept.read_text().strip(),
            # Offline runs cannot be resumed: `wandb sync` joins the pieces by their id.
            resume="allow" if wandb_settings.mode == "online" else None,
        )
    except wandb.errors.Error as error:
        raise ConfigError(f"wandb did not start: {str(error).splitlines()[0]}. Mend that, or {_OTHERWISE}.") from None


def log_evaluation(folder: Path, config: Config, rows: Sequence[SummaryRow], looks: Sequence[Path]) -> None:
    """Logs the summary of an evaluation to the wandb run as a table, and images (.png) and films (.mp4) by name. Does
    nothing if `wandb.mode` is "disabled". Raises ConfigError when wandb does not start."""
    check_wandb(config.wandb)
    wandb_run = _start_wandb(folder, config)
    if wandb_run is None:
        return
    import wandb

    columns = [one.name for one in fields(SummaryRow)]
    cells = [[None if value != value else value for value in astuple(row)] for row in rows]  # wandb takes no NaN
    logged: dict[str, Any] = {"evaluation/summary": wandb.Table(columns=columns, data=cells)}
    for path in looks:
        is_film = path.suffix == ".mp4"
        media = wandb.Video(str(path), format="mp4") if is_film else wandb.Image(str(path))
        logged[f"{'films' if is_film else 'figures'}/{path.stem}"] = media
    try:
        wandb_run.log(logged)
    finally:
        wandb_run.finish()


@contextmanager
def metrics_log(path: Path, first: int, wandb_run: Any) -> Iterator[Callable[[dict[str, float]], None]]:
    """Yields a function that logs an entry: a line of `metrics.jsonl`, and to wandb.

    Lines after update `first`, from which the run continues, are dropped, since they are written again. With several
    processes, only the first one writes.
    """
    if jax.process_index():
        yield lambda entry: None
        return
    kept = read_metrics(path, up_to=first)
    write_text(path, "".join(json.dumps(entry) + "\n" for entry in kept))
    with path.open("a") as file:

        def log(entry: dict[str, float]) -> None:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            if wandb_run is not None:
                wandb_run.log(entry, step=int(entry["step"]))

        try:
            yield log
        finally:
            if wandb_run is not None:
                wandb_run.finish()
