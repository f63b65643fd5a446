"""Trains a language model to look things up: python -m agents.recall configs/recall.toml [section.key=value ...]

The texts are those of agents.recall_texts. Loss and accuracy are over the answers only. Texts grow during training, and
tests may use longer texts than training. Running the command again continues an interrupted run, or tests a finished
one on the lengths in evaluate.lines.
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
from pydantic import Field, model_validator
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
from agents.processes import training_lock
from agents.recall_texts import KEYS, TOKENS, VALUES, Texts, texts
from agents.section import Count, Fraction, RunName, Section, Seed, Size
from agents.training_loop import Logged, Loop, run_updates
from data.atomic_file import write_text
from data.growth import Growth
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
TESTED = 2048  # minimum number of test questions per length


class RecallEvaluation(Section):
    """Settings of the test after training."""

    lines: list[Size] = Field(default=[])
    """Lengths of the test texts in lines, each tested separately. Empty: the longest training texts."""


class RecallConfig(Section):
    """The settings of one run: texts, model, training and test."""

    name: RunName
    seed: Seed = 0
    lines: Count = 8
    """Lines of the longest training texts."""
    grow: list[Size] = Field(default=[])
    """Curriculum of text lengths in lines, each for an equal share of the first `grow_until` of the updates. Shorter
    texts come in larger batches."""
    grow_until: Fraction = 0.47
    model: ModelConfig = ModelConfig()
    attention: AttentionSection = AttentionSection()
    mesh: MeshConfig = MeshConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    evaluate: RecallEvaluation = RecallEvaluation()

    @model_validator(mode="after")
    def can_be_made_and_split(self) -> "RecallConfig":
        if self.grow != sorted(n for n in self.grow if self.lines % n == 0):
            raise ValueError(
                f"texts of {self.lines} lines grow through divisors of that, the smallest first; got {self.grow}"
            )
        devices = self.mesh.ring * self.mesh.ulysses
        every = {"lines": [self.lines], "grow": self.grow, "evaluate.lines": self.evaluate.lines}
        for name, lines in ((name, n) for name, numbers in every.items() for n in numbers):
            if lines > KEYS:
                raise ValueError(f"{name}={lines}: there are {KEYS:,} keys; use fewer lines")
            if lines * TOKENS % devices:
                raise ValueError(
                    f"{name}={lines} are {lines * TOKENS} bytes, which mesh.ring * mesh.ulysses={devices} devices "
                    "cannot share; use a multiple of them"
                )
        check_batch(self.train.batch, self.train.accumulate, self.mesh)
        check_network(self.model, self.attention, self.mesh)
        return self

    @property
    def growth(self) -> Growth:
        return Growth(tuple(self.grow), round(self.grow_until * self.train.updates))

    def texts(self, update: int) -> Texts:
        """Returns the texts of an update. Their total size does not depend on their length."""
        lines = self.growth.at(update, self.lines)
        return texts(self.seed, update, self.train.batch * self.lines // lines, lines)


class Tested(NamedTuple):
    """The accuracy on new texts of one length."""

    lines: int
    right: np.ndarray  # [lines], share of right answers to the i-th question of a text
    texts: int

    def summary(self) -> dict[str, float]:
        """Returns the numbers that are written to accuracy.json and printed."""
        return {
            "lines": self.lines,
            "bytes": self.lines * TOKENS,
            "questions": self.texts * self.lines,
            "right": float(self.right.mean()),
            "right_in_second_half": float(self.right[self.lines // 2 :].mean()),
        }

    def __str__(self) -> str:
        return (
            "{lines:,} lines ({bytes:,} bytes): {right:.1%} of {questions:,} questions answered right, "
            "{right_in_second_half:.1%} in the second half of the text"
        ).format(**self.summary())


def training(config: RecallConfig) -> Training:
    """Returns the training setup of a config: model, optimizer and mesh."""
    mesh = config.mesh.make_mesh()
    attention = config.attention.attention_config(sharded=mesh is not None)
    shape = config.model.transformer_config(rope_fraction=1.0, attention=attention)
    settings = config.optimizer
    rate = schedule(settings, config.train.updates)
    optimizer = optax.chain(
        optax.clip_by_global_norm(settings.gradient_clip),
        optax.adamw(rate, b2=settings.beta2, weight_decay=settings.weight_decay),
    )
    return Training(LanguageModelConfig(256, shape), optimizer, mesh, accumulate=config.train.accumulate)


def recall(config: RecallConfig, *, progress: bool = True) -> list[Tested]:
    """Trains, or continues training, and returns the accuracy on new texts for each length that is tested."""
    folder = RUNS / config.name
    with training_lock(folder):
        return _recall(folder, config, progress=progress)


def _recall(folder: Path, config: RecallConfig, *, progress: bool) -> list[Tested]:
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
        state, loss = step(state, *order_for_mesh(made, whole))
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
                batches=((update, config.texts(update)) for update in range(first, updates)),
                update=update,
                loss="loss",
                log=partial(_log, file),
                save=partial(_save, folder, config, checkpoints),
            )
            state, _ = run_updates(run, state, first, bar)
    (folder / DIVERGED).unlink(missing_ok=True)
    tested = accuracy(config, whole, state.weights, progress=progress)
    write_text(folder / "accuracy.json", json.dumps([one.summary() for one in tested], indent=1) + "\n")
    return tested


def _log(file: TextIO, logged: Logged, bar: tqdm) -> None:
    file.write(json.dumps({"step": logged.update + 1, "loss": logged.metrics["loss"]}) + "\n")
    file.flush()
    bar.set_postfix_str(f"loss {logged.metrics['loss']:.3f}")


def _save(
    folder: Path, config: RecallConfig, checkpoints: ocp.CheckpointManager, done: int, state: TrainState, loss: float
) -> None:
    if not np.isfinite(float(optax.tree.norm(state.weights))):
        raise diverged(folder, "a weight", update=done, saved=checkpoints.latest_step() or 0)
    kept = {"config": config.model_dump(mode="json"), "checksums": damage.checksums(by_name(state))}
    checkpoints.save(done, args=ocp.args.StandardSave(state), custom_metadata=kept)


def _restored(checkpoints: ocp.CheckpointManager, step: int, like: TrainState, config: RecallConfig) -> TrainState:
    """Returns the state of a checkpoint. Raises ConfigError when it belongs to another run or is damaged."""
    place = Path(checkpoints.directory) / str(step)
    if (place / "state").is_dir():
        raise ConfigError(f"{place} is a checkpoint of agents.train, not of agents.recall. Choose another name.")
    with damage.reporting_damage(place):
        kept = damage.custom_metadata(checkpoints, step)
        check_config(RUNS / config.name, kept.get("config", {}), config)
        state = checkpoints.restore(step, args=ocp.args.StandardRestore(like))
        damage.check(place, kept.get("checksums", {}), damage.checksums(by_name(state)))
    return state


def order_for_mesh(made: Texts, whole: Training) -> tuple[np.ndarray, np.ndarray]:
    """Returns tokens and targets [B, T] in the order of the mesh."""
    tokens, _ = laid_out(made.bytes, mesh=whole.mesh)
    first = np.zeros((len(made.answers), 1), made.answers.dtype)  # laid_out drops it
    _, targets = laid_out(np.concatenate([first, made.answers], 1), mesh=whole.mesh)
    return tokens, targets


def accuracy(config: RecallConfig, whole: Training, weights: nnx.State, *, progress: bool = False) -> list[Tested]:
    """Returns, for each length to be tested, the share of new texts in which each answer is the most likely byte."""
    graph = nnx.graphdef(nnx.eval_shape(lambda: LanguageModel(whole.config, rngs=nnx.Rngs(0))))

    @jax.jit
    def likeliest(weights, tokens):
        model = nnx.merge(graph, weights)
        x = model(tokens, positions(*tokens.shape, mesh=whole.mesh), mesh=whole.mesh)
        head = model.embedding[...].T if model.head is None else model.head[...]
        return jnp.argmax(x.astype(jnp.float32) @ head, axis=-1)

    def test(lines: int) -> Tested:
        # At a time as many bytes as in an update, unless fewer are needed.
        rows = max(1, min(config.train.batch * config.lines, TESTED) // lines)
        rows += -rows % config.mesh.data
        right, rounds = np.zeros(lines), -(-TESTED // (lines * rows))
        for n in range(rounds):
            tokens, targets = order_for_mesh(texts(config.seed, config.train.updates + n, rows, lines), whole)
            row, place = np.nonzero(targets != NO_TARGET)
            # The order of the tokens depends on the mesh; questions are identified by their positions.
            question = np.asarray(positions(*tokens.shape, mesh=whole.mesh))[row, place] // TOKENS
            found = np.asarray(likeliest(weights, tokens))
            np.add.at(right, question, found[row, place] == targets[row, place])
        return Tested(lines, right / (rounds * rows), rounds * rows)

    return [test(lines) for lines in tqdm(config.evaluate.lines or [config.lines], desc="test", disable=not progress)]


def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="python -m agents.recall", description=__doc__.splitlines()[0])
    parser.add_argument("config", help="TOML file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="such as model.width=128")
    arguments = parser.parse_intermixed_args(argv)

    def body() -> None:
        config = load(RecallConfig, arguments.config, arguments.overrides)
        found = recall(config)
        print(f"runs/{config.name}: {config.train.updates} updates; by chance {1 / len(VALUES):.1%}")
        for tested in found:
            print(f"  {tested}")

    return run(body)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
