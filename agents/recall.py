"""Trains a language model to look things up: python -m agents.recall configs/recall.toml [section.key=value ...]

Byte-level associative recall, the shape of line retrieval (the test of long contexts in LongChat, Li et al. 2023):
every line says what a key stands for, and is followed by a question about any line so far.

    A7 / ?A7 / Bk / ?A7 / C0 / ?Bk / ...        where / ends a line, and A, B, C are any of 128 bytes

Only the answers are learnt and counted. Early questions have few lines to choose from: what is learnt on them serves
the later ones. Running the command again continues an interrupted run.
"""

import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, TextIO

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from pydantic import model_validator
from tqdm import tqdm

from agents import damage
from agents.checkpoint import by_name, read_metrics
from agents.cli import ConfigError, run
from agents.config import AttentionSection, MeshConfig, ModelConfig, OptimizerConfig, TrainConfig
from agents.config_file import dump, load
from agents.continuation import DIVERGED, check_command, diverged, has_checkpoints, set_aside
from agents.identity import check_config, check_total, differing_runs
from agents.model_config import check_batch, check_network
from agents.optimizer import schedule
from agents.processes import alone
from agents.section import Count, RunName, Section, Seed
from agents.training_loop import Logged, Loop, run_updates
from data.atomic_file import write_text
from rlring import request_cpu_devices
from rlring.cli import Parser
from rlring.language_model import (
    NO_TARGET,
    LanguageModel,
    LanguageModelConfig,
    Training,
    TrainState,
    laid_out,
    positions,
)

RUNS = Path("runs")
KEYS = np.arange(128, 256, dtype=np.uint8)
VALUES = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz0123456789", np.uint8)
LINE, QUESTION = len(b"A7\n"), len(b"?A7\n")
ANSWER = LINE + len(b"?A")  # its place, from the start of its line
TESTED = 64  # texts


class RecallConfig(Section):
    """One run: the task, the model, how it is trained."""

    name: RunName
    seed: Seed = 0
    lines: Count = 8
    model: ModelConfig = ModelConfig()
    attention: AttentionSection = AttentionSection()
    mesh: MeshConfig = MeshConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()

    @property
    def tokens(self) -> int:
        """Of a text."""
        return self.lines * (LINE + QUESTION)

    @model_validator(mode="after")
    def can_be_made_and_split(self) -> "RecallConfig":
        if self.lines > len(KEYS):
            raise ValueError(f"lines={self.lines}: there are {len(KEYS)} keys; use fewer lines")
        if self.tokens % (self.mesh.ring * self.mesh.ulysses):
            raise ValueError(
                f"lines={self.lines} are {self.tokens} bytes, which mesh.ring * mesh.ulysses="
                f"{self.mesh.ring * self.mesh.ulysses} devices cannot share; use a multiple of them"
            )
        check_batch(self.train.batch, self.train.accumulate, self.mesh)
        check_network(self.model, self.attention, self.mesh)
        return self


class Texts(NamedTuple):
    """Texts [B, T+1], and of each byte but the last the one that follows where that is an answer [B, T]."""

    bytes: np.ndarray
    answers: np.ndarray


def texts(config: RecallConfig, update: int, rows: int) -> Texts:
    """Returns the texts of an update, a pure function of (seed, update)."""
    made = [_text(np.random.default_rng((config.seed, update, row)), config.lines) for row in range(rows)]
    whole = np.pad(np.stack(made).astype(np.int32), ((0, 0), (0, 1)), constant_values=ord("\n"))
    is_answer = np.arange(1, config.tokens + 1) % (LINE + QUESTION) == ANSWER
    return Texts(whole, np.where(is_answer, whole[:, 1:], NO_TARGET))


def _text(random: np.random.Generator, lines: int) -> np.ndarray:
    keys = random.permutation(KEYS)[:lines, None]
    values = VALUES[random.integers(0, len(VALUES), (lines, 1))]
    asked = random.integers(0, np.arange(lines) + 1)  # any line so far

    def letter(of: bytes) -> np.ndarray:
        return np.full((lines, 1), ord(of), np.uint8)

    line = [keys, values, letter(b"\n")]
    question = [letter(b"?"), keys[asked], values[asked], letter(b"\n")]
    return np.concatenate([*line, *question], 1).ravel()


def training(config: RecallConfig) -> Training:
    """Returns the model of a config, its optimizer, and the mesh that it is trained on."""
    mesh = config.mesh.made()
    shape = config.model.made(rope_fraction=1.0, attention=config.attention.made(sharded=mesh is not None))
    settings = config.optimizer
    rate = schedule(settings, config.train.updates)
    optimizer = optax.chain(
        optax.clip_by_global_norm(settings.gradient_clip),
        optax.adamw(rate, b2=settings.beta2, weight_decay=settings.weight_decay),
    )
    return Training(LanguageModelConfig(256, shape), optimizer, mesh, accumulate=config.train.accumulate)


def recall(config: RecallConfig, *, progress: bool = True) -> np.ndarray:
    """Trains, or goes on training, and returns the share of new texts in which each question is answered right."""
    folder = RUNS / config.name
    with alone(folder):
        return _recall(folder, config, progress=progress)


def _recall(folder: Path, config: RecallConfig, *, progress: bool) -> np.ndarray:
    if (folder / "config.json").exists():
        check_command(folder, "agents.recall")
        changed = differing_runs(load(RecallConfig, folder / "config.json"), config)
        if changed and (folder / DIVERGED).exists():
            set_aside(folder)
        elif changed:
            told = ", ".join(changed[:4])
            raise ConfigError(f"{folder} holds a run with other settings: {told}; choose another name.")
    elif has_checkpoints(folder):
        raise ConfigError(
            f"{folder} has checkpoints, but no config.json: with which settings they were trained is not known. "
            "Put it back, or choose another name."
        )
    request_cpu_devices(config.mesh.devices)
    whole = training(config)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "config.json", dump(config))
    init, step = whole.jitted()
    updates = config.train.updates

    def update(state: TrainState, made: Texts) -> tuple[TrainState, dict[str, jax.Array]]:
        state, loss = step(state, *arranged(made, whole))
        return state, {"loss": loss}

    options = ocp.CheckpointManagerOptions(max_to_keep=config.train.keep_checkpoints)
    with ocp.CheckpointManager((folder / "checkpoints").absolute(), options=options) as checkpoints:
        state, first = init(config.seed), checkpoints.latest_step() or 0
        check_total(folder, first, updates)
        if first:
            state = _restored(checkpoints, first, state, config)
        log = folder / "metrics.jsonl"
        write_text(log, "".join(json.dumps(entry) + "\n" for entry in read_metrics(log, up_to=first)))
        bar = tqdm(total=updates, initial=first, desc=config.name, unit="update", disable=not progress)
        with bar, log.open("a") as file:
            run = Loop(
                folder,
                config.train,
                batches=((update, texts(config, update, config.train.batch)) for update in range(first, updates)),
                update=update,
                loss="loss",
                log=partial(_log, file),
                save=partial(_save, folder, config, checkpoints),
            )
            state, _ = run_updates(run, state, first, bar)
    (folder / DIVERGED).unlink(missing_ok=True)
    return accuracy(config, whole, state.weights)


def _log(file: TextIO, logged: Logged, bar: tqdm) -> None:
    file.write(json.dumps({"step": logged.update + 1, "loss": logged.metrics["loss"]}) + "\n")
    file.flush()
    bar.set_postfix_str(f"loss {logged.metrics['loss']:.3f}")


def _save(
    folder: Path, config: RecallConfig, checkpoints: ocp.CheckpointManager, done: int, state: TrainState, loss: float
) -> None:
    if not np.isfinite(float(optax.global_norm(state.weights))):
        raise diverged(folder, "a weight", update=done, saved=checkpoints.latest_step() or 0)
    kept = {"config": config.model_dump(mode="json"), "checksums": damage.checksums(by_name(state))}
    checkpoints.save(done, args=ocp.args.StandardSave(state), custom_metadata=kept)


def _restored(checkpoints: ocp.CheckpointManager, step: int, like: TrainState, config: RecallConfig) -> TrainState:
    """Returns the state of a checkpoint. ConfigError when it is none of this run, or damaged."""
    place = Path(checkpoints.directory) / str(step)
    if (place / "state").is_dir():
        raise ConfigError(f"{place} is a checkpoint of agents.train, not of agents.recall. Choose another name.")
    with damage.whole(place):
        kept = damage.custom(checkpoints, step)
        check_config(RUNS / config.name, kept.get("config", {}), config)
        state = checkpoints.restore(step, args=ocp.args.StandardRestore(like))
        damage.check(place, kept.get("checksums", {}), damage.checksums(by_name(state)))
    return state


def arranged(made: Texts, whole: Training) -> tuple[np.ndarray, np.ndarray]:
    """Returns tokens and targets in the order in which the mesh wants them."""
    tokens, _ = laid_out(made.bytes, mesh=whole.mesh)
    first = np.zeros((len(made.answers), 1), made.answers.dtype)  # laid_out drops it
    _, targets = laid_out(np.concatenate([first, made.answers], 1), mesh=whole.mesh)
    return tokens, targets


def accuracy(config: RecallConfig, whole: Training, weights: nnx.State) -> np.ndarray:
    """Returns, by question, in how many of TESTED texts that no update has seen its answer is the likeliest byte."""
    graph = nnx.graphdef(nnx.eval_shape(lambda: LanguageModel(whole.config, rngs=nnx.Rngs(0))))

    @jax.jit
    def likeliest(weights, tokens):
        model = nnx.merge(graph, weights)
        x = model(tokens, positions(*tokens.shape, mesh=whole.mesh), mesh=whole.mesh)
        head = model.embedding[...].T if model.head is None else model.head[...]
        return jnp.argmax(x.astype(jnp.float32) @ head, axis=-1)

    right = np.zeros(config.lines)
    tests = -(-TESTED // config.train.batch)
    for test in range(tests):
        tokens, targets = arranged(texts(config, config.train.updates + test, config.train.batch), whole)
        rows, places = np.nonzero(targets != NO_TARGET)
        # Any order of the tokens: a question is known by its position in the text.
        question = np.asarray(positions(*tokens.shape, mesh=whole.mesh))[rows, places] // (LINE + QUESTION)
        found = np.asarray(likeliest(weights, tokens))
        np.add.at(right, question, found[rows, places] == targets[rows, places])
    return right / (tests * config.train.batch)


def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="python -m agents.recall", description=__doc__.splitlines()[0])
    parser.add_argument("config", help="TOML file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args(argv)

    def body() -> None:
        config = load(RecallConfig, arguments.config, arguments.overrides)
        right = recall(config)
        late = right[len(right) // 2 :]
        print(
            f"runs/{config.name}: {config.train.updates} updates; {right.mean():.1%} of the questions about new texts "
            f"of {config.lines} lines ({config.tokens} bytes) answered right, {late.mean():.1%} in their second half; "
            f"{1 / len(VALUES):.1%} by chance"
        )

    return run(body)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
