"""Every setting of the stack, read from TOML, checked, and written back: `load`, `dump`, and the one error format.

(Longer than 300 lines because a person who looks for a setting looks in one place.)
"""

import difflib
import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from agents.cli import ConfigError

Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """Unknown keys are errors, and a value of another type is one too ("1" is no number)."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class CollectConfig(Section):
    """How the episodes are made if they are not there (`python -m data.collect`)."""

    policy: str
    episodes: PositiveInt
    seed: int = 0
    workers: PositiveInt = 2


class DataConfig(Section):
    """Where trajectories come from."""

    tasks: list[str] = Field(min_length=1)
    """Tasks named `domain-task`; with several, every chain is of one of them."""
    episodes: str
    """Folder of ExoRL episodes, shared by all tasks of the domain."""
    stores: list[str] = Field(min_length=1)
    """The relabelled HDF5 file of each task."""
    collect: CollectConfig | None = None
    held_out: Fraction = 0.1
    """Share of episodes never trained on; the contexts of evaluation are drawn from them."""

    @model_validator(mode="after")
    def one_store_a_task(self) -> "DataConfig":
        if len(self.tasks) != len(self.stores):
            raise ValueError(f"{len(self.tasks)} tasks need as many stores; got {len(self.stores)}")
        return self


class ChainConfig(Section):
    """What a training sequence is (`data.ChainSampler`)."""

    trajectories: PositiveInt = 1
    lengths: Literal["full", "mixed"] = "full"
    """mixed: a row is cut at random into chains of 1 to `trajectories`, so that acting after any number of them is
    learnt."""
    sort: Literal["ascending", "random", "descending", "time"] = "ascending"
    target: Literal["max", "own"] | float = "max"
    grow: list[PositiveInt] = []
    """Trajectories of the chains of the first updates, such as [8, 16, 32], each for an equal share of them; a row then
    holds several chains side by side."""
    grow_until: Fraction = 0.47
    """Share of the updates in which chains grow."""


class AgentConfig(Section):
    kind: Literal["agentic_transformer", "decision_transformer", "bc"]
    tokens: Literal["rsar", "fused"] = "fused"
    """rsar: return, state, action and reward are a token each (the papers'); fused: one token a step, four times the
    context."""
    window: PositiveInt | None = None
    """Steps that a token sees, itself included. None: all."""
    loss_on: Literal["last", "all", "all+last"] = "all+last"
    """Trajectories whose actions are learnt. all+last: all, and the best one twice. Of a map, "last" are the
    queries."""
    loss_elsewhere: Fraction = 0.0
    """With loss_on "last": how much the actions of the other trajectories count."""
    top_fraction: Fraction = 0.1
    """bc: share of the time steps kept, from the trajectories of highest return."""


class ModelConfig(Section):
    """Shape of the network (`rlring.TransformerConfig`; bc takes width and layers)."""

    width: PositiveInt = 128
    layers: PositiveInt = 3
    heads: PositiveInt = 4
    kv_heads: PositiveInt | None = None
    feed_forward: PositiveInt | None = None
    feed_forward_tile: PositiveInt = 4096
    rope_base: Annotated[float, Field(gt=1)] = 10_000.0
    rope_fraction: Fraction | None = None
    """Share of each head rotated by position; the rest looks things up however far back they stand. None: 0 for fused
    tokens, whose steps and rewards tell all that order would; 1 for rsar tokens and for text, which only their places
    bind together."""
    compute_type: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "attention", "all", "offload"] = "none"
    fsdp: bool = False
    """Weights and optimizer state live in parts, one on each device, those along a sequence included."""
    dense_every: PositiveInt | None = None
    """With attention.scheme "sparse": every so many layers one sees the whole context."""

    def shape(self, *, rope_fraction: float) -> dict[str, Any]:
        """Returns the settings of `rlring.TransformerConfig`; rope_fraction where none is set."""
        settings = self.model_dump()
        return settings | {"rope_fraction": rope_fraction if self.rope_fraction is None else self.rope_fraction}


class SparseSection(Section):
    """Which blocks of the context each head sees (`rlring.SparsePattern`)."""

    block: PositiveInt = 64
    local_blocks: PositiveInt = 16
    stride: PositiveInt = 8
    offset: int = 0


class AttentionSection(Section):
    scheme: Literal["auto", "dense", "blockwise", "ring", "all_gather", "ulysses", "hybrid", "sparse"] = "ring"
    kernel: Literal["auto", "jax", "cudnn", "splash"] = "jax"
    block_q: PositiveInt | None = None
    block_k: PositiveInt | None = None
    sparse: SparseSection | None = None
    """With scheme "sparse". model.dense_every makes some layers dense."""

    @model_validator(mode="after")
    def sparse_with_its_scheme(self) -> "AttentionSection":
        if (self.scheme == "sparse") != (self.sparse is not None):
            raise ValueError(
                f"scheme 'sparse' and the table attention.sparse go together; got scheme '{self.scheme}' "
                f"{'with' if self.sparse else 'without'} it; an empty table is the default pattern"
            )
        return self


class MeshConfig(Section):
    """Devices along each mesh axis; their product is the number of devices used."""

    data: PositiveInt = 1
    ring: PositiveInt = 1
    ulysses: PositiveInt = 1

    @property
    def devices(self) -> int:
        return self.data * self.ring * self.ulysses


class OptimizerConfig(Section):
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    warmup: int = 100
    """Updates until the learning rate is reached."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """After the warm-up. cosine: it falls to a hundredth at train.updates; constant: it stays, whatever they are."""
    weight_decay: float = 1e-2
    gradient_clip: Annotated[float, Field(gt=0)] = 1.0
    beta2: float = 0.99


class TrainConfig(Section):
    updates: PositiveInt = 1000
    batch: PositiveInt = 16
    """Chains an update, all devices together."""
    accumulate: PositiveInt = 1
    """Parts of a batch whose gradients are added up, for batches that do not fit at once."""
    log_every: PositiveInt = 10
    checkpoint_every: PositiveInt = 500
    keep_checkpoints: PositiveInt = 2
    """The newest ones."""
    keep_best: Annotated[int, Field(ge=0)] = 0
    """Those besides with the lowest mean loss since the checkpoint before them."""
    prefetch: PositiveInt = 4
    """Batches made ahead of the device."""
    workers: Annotated[int, Field(ge=0)] = 0
    """Processes that make batches; 0: threads of this one."""


class EvaluateConfig(Section):
    contexts: list[Annotated[int, Field(ge=0)]] = [0, 1, 2, 4]
    """Numbers of trajectories in the context."""
    groups: PositiveInt = 16
    """Prompted: held-out goals (or seeds) evaluated for every context; self: agents run side by side."""
    episodes: PositiveInt = 1
    """Episodes after each prompt, each seeing the ones before."""
    modes: list[Literal["prompted", "self"]] = ["prompted"]
    self_episodes: PositiveInt = 8
    target: Literal["typical"] | float = "typical"
    """Return asked for. typical: the 90th percentile of the best returns of the training chains."""
    mesh: MeshConfig = MeshConfig()
    """Devices that acting uses; the cache of keys and values is split over its sequence axes."""
    foreign: bool = False
    """Also evaluate with contexts of another goal, which must not help."""
    checkpoint: Literal["newest", "best"] = "newest"
    """best: of lowest training loss, among those that train.keep_best kept."""
    sample: bool = True
    """Sample actions; false: the mean of the action distribution."""
    seed: int = 0


class WandbConfig(Section):
    mode: Literal["disabled", "offline", "online"] = "disabled"
    project: str = "rlring"


class Config(Section):
    """One training run and its evaluation."""

    name: str
    series: str = ""
    """Runs of one series that differ in their seed alone are averaged; a sweep writes it. Empty: this run alone."""
    seed: int = 0
    data: DataConfig
    agent: AgentConfig
    chain: ChainConfig = ChainConfig()
    model: ModelConfig = ModelConfig()
    attention: AttentionSection = AttentionSection()
    mesh: MeshConfig = MeshConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    wandb: WandbConfig = WandbConfig()

    @model_validator(mode="after")
    def scheme_fits_mesh(self) -> "Config":
        """Checked here and not only by the library, so that nothing is collected for a run that cannot start."""
        scheme, mesh = self.attention.scheme, self.mesh
        if self.agent.kind == "bc":
            return self
        needs = {
            "auto": True,
            "dense": mesh.ring == mesh.ulysses == 1,
            "blockwise": mesh.ring == mesh.ulysses == 1,
            "ring": mesh.ulysses == 1,
            "all_gather": True,
            "ulysses": mesh.ring == 1,
            "hybrid": True,
            "sparse": mesh.ring == 1,
        }
        if not needs[scheme]:
            raise ValueError(
                f"attention.scheme '{scheme}' does not fit mesh.ring={mesh.ring}, mesh.ulysses={mesh.ulysses}; "
                "'ring' wants ulysses=1, 'ulysses' and 'sparse' want ring=1, 'dense' and 'blockwise' both; 'auto' and "
                "'hybrid' take any"
            )
        if scheme == "sparse" and self.agent.window is not None:
            raise ValueError(
                f"attention.scheme 'sparse' has a window of its own, attention.sparse.local_blocks; got agent.window="
                f"{self.agent.window}; leave agent.window out"
            )
        if self.train.batch % (mesh.data * self.train.accumulate):
            raise ValueError(
                f"train.batch={self.train.batch} does not divide over mesh.data={mesh.data} devices in train."
                f"accumulate={self.train.accumulate} parts"
            )
        return self


class SweepConfig(Section):
    """Several agents on the same data, evaluated alike and drawn together."""

    name: str
    title: str = ""
    seeds: list[int] = Field(default=[0], min_length=1)
    shared: dict[str, Any]
    """Settings of every run (the sections of `Config`)."""
    runs: dict[str, dict[str, Any]] = Field(min_length=1)
    """Settings of each agent, by the name drawn in the plot; they win over the shared ones."""
    baseline: bool = True
    """Draw the oracle, where the task has one."""

    def configs(self) -> list[Config]:
        """Returns the training runs, an agent after the other, a seed after the other."""
        configs = []
        for agent, own in self.runs.items():
            for seed in self.seeds:
                settings = merge(merge({}, self.shared), own)
                settings["name"] = f"{self.name}/{agent}-{seed}"
                settings.setdefault("seed", seed)
                configs.append(validate(Config, settings, source=f"runs.{agent}"))
        return configs


AnyConfig = TypeVar("AnyConfig", bound=Section)


def load(kind: type[AnyConfig], path: str | Path, overrides: Sequence[str] = ()) -> AnyConfig:
    """Returns the config in a TOML file (or the JSON of a run), with `a.b=value` overrides, values written as in
    TOML."""
    path = Path(path)
    try:
        text = path.read_text()
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.toml")], n=1)
        hint = f" Did you mean {path.with_name(near[0])}?" if near else " Give the path of a TOML file."
        raise ConfigError(f"no config at {path}.{hint}") from None
    try:
        settings = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (tomllib.TOMLDecodeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}. Mend that place.") from None
    for override in overrides:
        merge(settings, parse_override(override))
    return validate(kind, settings, source=str(path))


def dump(config: Section) -> str:
    """Returns the config as JSON that `load` reads back to an equal one."""
    return config.model_dump_json(indent=2) + "\n"


def parse_override(text: str) -> dict[str, Any]:
    """Returns `a.b=value` as nested settings; what is no TOML value is taken as a string."""
    key, equals, value = text.partition("=")
    if not equals or not key or any(not part for part in key.split(".")):
        raise ConfigError(f"'{text}' is no override; write it as section.key=value, for example train.updates=100.")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value
    for part in reversed(key.split(".")):
        parsed = {part: parsed}
    return parsed


def merge(settings: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Returns `settings` with those of `other` laid over them, section by section."""
    for key, value in other.items():
        if isinstance(value, dict) and isinstance(settings.get(key), dict):
            merge(settings[key], value)
        else:
            settings[key] = json.loads(json.dumps(value)) if isinstance(value, dict) else value
    return settings


def validate(kind: type[AnyConfig], settings: dict[str, Any], *, source: str) -> AnyConfig:
    """Returns the checked config; the first few errors become one message, each with the place and the nearest known
    name."""
    try:
        return kind.model_validate(settings)
    except ValidationError as error:
        found = []
        # Unknown keys first: what is missing is often there under a misspelt name.
        problems = sorted(error.errors(include_url=False), key=lambda problem: problem["type"] != "extra_forbidden")
        for problem in problems[:3]:
            place = ".".join(
                str(part) for part in problem["loc"] if not str(part).startswith(("function-", "literal["))
            )
            if problem["type"] == "extra_forbidden":
                known = _keys(kind, problem["loc"][:-1])
                near = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1)
                hint = f"did you mean '{near[0]}'?" if near else f"known here: {', '.join(known)}"
                found.append(f"unknown key '{place}'; {hint}")
            elif problem["type"] == "missing":
                found.append(f"'{place}' is missing; add it")
            elif problem["type"] == "value_error":
                found.append(f"{place}: {problem['ctx']['error']}" if place else str(problem["ctx"]["error"]))
            else:
                found.append(f"'{place}': {problem['msg']}; got {problem['input']!r}")
        text = "; ".join(dict.fromkeys(found))
        raise ConfigError(f"{source}: {text}{'' if text.endswith('?') else '.'}") from None


def _keys(kind: type[Section], path: tuple) -> list[str]:
    """Known keys of the section at `path`."""
    for part in path:
        annotation = kind.model_fields[part].annotation if part in kind.model_fields else None
        options = getattr(annotation, "__args__", (annotation,))
        kind = next((option for option in options if isinstance(option, type) and issubclass(option, Section)), kind)
    return sorted(kind.model_fields)
