"""Every setting of the stack (agents.config_file reads them from TOML, checks them and writes them back)."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from agents.agent_config import VALUE_KINDS, AgentConfig
from agents.config_file import dump as dump
from agents.config_file import load as load
from agents.config_file import merge as merge
from agents.config_file import parse_override as parse_override
from agents.config_file import validate as validate
from agents.model_config import AttentionSection, MeshConfig, ModelConfig, check_batch, check_network
from agents.section import Chance, Count, Fraction, Positive, Return, RunName, Section, Seed, Share, Size, Text, Whole
from data.tasks import GoalTask, goal_task


class CollectConfig(Section):
    """How the episodes are made if they are not there (`python -m data.collect`)."""

    policy: Text
    episodes: Count
    seed: Seed = 0
    workers: Annotated[int, Field(gt=0, le=1024)] = 2


class DataConfig(Section):
    """Where trajectories come from."""

    tasks: list[Text] = Field(min_length=1)
    """Tasks named `domain-task`; with several, every chain is of one of them."""
    episodes: Text
    """Folder of ExoRL episodes, shared by all tasks of the domain."""
    stores: list[Text] = Field(min_length=1)
    """The relabelled HDF5 file of each task."""
    collect: CollectConfig | None = None
    held_out: Share = 0.1
    """Share of episodes never trained on; the contexts of evaluation are drawn from them."""

    @model_validator(mode="after")
    def one_store_a_task(self) -> "DataConfig":
        if len(self.tasks) != len(self.stores):
            raise ValueError(f"{len(self.tasks)} tasks need as many stores; got {len(self.stores)}")
        return self


class ChainConfig(Section):
    """What a training sequence is (`data.ChainSampler`)."""

    trajectories: Size = 1
    lengths: Literal["full", "mixed"] = "full"
    """mixed: a row is cut at random into chains of 1 to `trajectories`, so that acting after any number of them is
    learnt."""
    sort: Literal["ascending", "random", "descending", "time"] = "ascending"
    target: Literal["max", "own"] | Return = "max"
    met: Chance | Literal["annealed"] | None = None
    """Where the task hides a goal: the chance with which every trajectory but one has met it. "annealed": a chance that
    rises from 0 at the first to 1 at the last. None: 0 to 2 others have, and of the rest those that happen to."""
    grow: list[Size] = Field(default=[])
    """Trajectories of the chains of the first updates, such as [8, 16, 32], each for an equal share of them; a row then
    holds several chains side by side."""
    grow_until: Fraction = 0.47
    """Share of the updates in which chains grow."""


class OptimizerConfig(Section):
    learning_rate: Positive = 1e-3
    warmup: Whole = 100
    """Updates until the learning rate is reached."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """After the warm-up. cosine: it falls to a hundredth at train.updates; constant: it stays, whatever they are."""
    weight_decay: Annotated[float, Field(ge=0, le=1e30)] = 1e-2
    gradient_clip: Positive = 1.0
    beta2: Share = 0.99


class TrainConfig(Section):
    updates: Count = 1000
    batch: Size = 16
    """Chains an update, all devices together."""
    accumulate: Size = 1
    """Parts of a batch whose gradients are added up, for batches that do not fit at once."""
    log_every: Count = 10
    checkpoint_every: Count = 500
    keep_checkpoints: Count = 2
    """The newest ones."""
    keep_best: Whole = 0
    """Those besides with the lowest mean loss since the checkpoint before them."""
    prefetch: Annotated[int, Field(gt=0, le=4096)] = 4
    """Batches made ahead of the device."""
    workers: Annotated[int, Field(ge=0, le=1024)] = 0
    """Processes that make batches; 0: threads of this one."""


class EvaluateConfig(Section):
    contexts: list[Annotated[int, Field(ge=0, le=2**20)]] = Field(default=[0, 1, 2, 4], min_length=1)
    """Numbers of trajectories in the context."""
    groups: Size = 16
    """Prompted: held-out goals (or seeds) evaluated for every context; self: agents run side by side."""
    episodes: Count = 1
    """Episodes after each prompt, each seeing the ones before."""
    modes: list[Literal["prompted", "self"]] = Field(default=["prompted"], min_length=1)
    self_episodes: Count = 8
    episode_steps: Count | None = None
    """Steps of an episode. None: the task's own."""
    target: Literal["typical"] | Return = "typical"
    """Return asked for. typical: the 90th percentile of the best returns of the training chains."""
    mesh: MeshConfig = MeshConfig()
    """Devices that acting uses; the cache of keys and values is split over its sequence axes."""
    met: list[Chance] = Field(default=[])
    """Where the task hides a goal: chances, one after the other, with which a trajectory of a context has met it.
    None: contexts of random trajectories."""
    places: list[Size] = Field(default=[16, 64], min_length=1)
    """Of a map: places of the worlds, each visited once."""
    seen: list[Fraction] = Field(default=[0.0, 0.25, 0.5, 1.0], min_length=1)
    """Of a map: the share of its world, the last visits, that the agent has seen; contexts are not used."""
    queries: Size = 4
    """Of a map: queries of one world, which share its history; groups are those of all worlds."""
    memory_gib: Positive = 2.0
    """Of a map: memory for the keys and values of the queries that are played at a time."""
    foreign: bool = False
    """Also evaluate with contexts of another goal, which must not help."""
    checkpoint: Literal["newest", "best"] = "newest"
    """best: of lowest training loss, among those that train.keep_best kept."""
    sample: bool = True
    """Sample actions; false: the mean of the action distribution."""
    seed: Seed = 0


class WandbConfig(Section):
    mode: Literal["disabled", "offline", "online"] = "disabled"
    project: Text = "rlring"


class Config(Section):
    """One training run and its evaluation."""

    name: RunName
    series: str = ""
    """Runs of one series that differ in their seed alone are averaged; a sweep writes it. Empty: this run alone."""
    seed: Seed = 0
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

    @property
    def hidden_goals(self) -> list[GoalTask]:
        """Those of its tasks that hide a goal."""
        return [goal for goal in map(goal_task, self.data.tasks) if goal is not None]

    @model_validator(mode="after")
    def network_can_be_made_and_split(self) -> "Config":
        check_batch(self.train.batch, self.train.accumulate, self.mesh)
        if self.agent.kind in ("bc", "recurrent", *VALUE_KINDS):
            return self
        check_network(self.model, self.attention, self.mesh)
        if self.attention.scheme == "sparse" and self.agent.window is not None:
            raise ValueError(
                f"attention.scheme 'sparse' has a window of its own, attention.sparse.local_blocks; got agent.window="
                f"{self.agent.window}; leave agent.window out"
            )
        return self

    @model_validator(mode="after")
    def what_has_no_attention_splits_no_sequence(self) -> "Config":
        whole = {"recurrent": "reads one token after the other", **dict.fromkeys(VALUE_KINDS, "reads transitions")}
        if self.agent.kind not in whole:
            return self
        for name, mesh in (("mesh", self.mesh), ("evaluate.mesh", self.evaluate.mesh)):
            if mesh.ring * mesh.ulysses > 1:
                raise ValueError(
                    f"agent.kind '{self.agent.kind}' {whole[self.agent.kind]}, and no mesh splits that; got "
                    f"{name}.ring={mesh.ring}, {name}.ulysses={mesh.ulysses}; use {name}.data alone"
                )
        if self.agent.tokens != "fused" or self.agent.window is not None:
            raise ValueError(
                f"agent.kind '{self.agent.kind}' takes fused tokens and has no window; got agent.tokens="
                f"{self.agent.tokens!r}, agent.window={self.agent.window}; leave them out"
            )
        return self

    @model_validator(mode="after")
    def values_are_of_rewards_that_are_there(self) -> "Config":
        hidden = ", ".join(goal.name for goal in self.hidden_goals)
        if self.agent.kind in VALUE_KINDS and hidden:
            raise ValueError(
                f"agent.kind '{self.agent.kind}' learns what observations are worth, and {hidden} hides the "
                "goal that is paid for; use a task whose observation tells all"
            )
        if self.agent.kind in VALUE_KINDS and self.train.accumulate > 1:
            raise ValueError(
                f"agent.kind '{self.agent.kind}' takes its batch whole; got train.accumulate={self.train.accumulate}; "
                "leave it out"
            )
        return self

    @model_validator(mode="after")
    def histories_are_in_the_order_of_time(self) -> "Config":
        if self.agent.kind != "algorithm_distillation":
            return self
        if any(goal.sign_size for goal in self.hidden_goals):
            raise ValueError(
                f"agent.kind 'algorithm_distillation' learns from histories, and of a map "
                f"({', '.join(self.data.tasks)}) there are none; use a task that is no map"
            )
        wanted = {"sort": "time"} | ({"met": "annealed"} if self.hidden_goals else {})
        got = {name: getattr(self.chain, name) for name in wanted}
        if got != wanted:
            raise ValueError(
                f"agent.kind 'algorithm_distillation' learns from histories: set "
                f"{', '.join(f'chain.{name}={value!r}' for name, value in wanted.items())}; "
                f"got {', '.join(f'chain.{name}={value!r}' for name, value in got.items())}"
            )
        return self

    @model_validator(mode="after")
    def foreign_needs_a_goal(self) -> "Config":
        if self.evaluate.foreign and not self.hidden_goals:
            raise ValueError(
                f"evaluate.foreign takes contexts of another goal, and {', '.join(self.data.tasks)} hides none; "
                "leave it out"
            )
        return self


class SweepConfig(Section):
    """Several agents on the same data, evaluated alike and drawn together."""

    name: RunName
    title: str = ""
    seeds: list[Seed] = Field(default=[0], min_length=1)
    shared: dict[str, Any]
    """Settings of every run (the sections of `Config`)."""
    runs: dict[str, dict[str, Any]] = Field(min_length=1)
    """Settings of each agent, by the name drawn in the plot; they win over the shared ones."""
    baseline: bool = True
    """Draw the oracle, where the task has one."""

    @model_validator(mode="after")
    def names_and_seeds_are_the_sweeps_own(self) -> "SweepConfig":
        for place, settings in {
            "shared": self.shared,
            **{f"runs.{name}": changes for name, changes in self.runs.items()},
        }.items():
            for key, instead in (("seed", "seeds=[...]"), ("name", "name"), ("series", "name")):
                if key in settings:
                    raise ValueError(f"{place}.{key} would be that of every run; a sweep has {instead} for it")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds={self.seeds} names one twice; it would be trained once and count twice")
        if "oracle" in self.runs:
            raise ValueError("runs.oracle: the plot draws its ceiling under this name; choose another")
        return self

    def arms(self) -> list[tuple[str, Config]]:
        """Returns the training runs with the name of their agent, an agent after the other, a seed after the other."""
        arms = []
        for agent, changes in self.runs.items():
            for seed in self.seeds:
                settings = merge(merge({}, self.shared), changes)
                settings |= {"name": f"{self.name}/{agent}-{seed}", "series": f"{self.name}/{agent}", "seed": seed}
                arms.append((agent, validate(Config, settings, source=f"runs.{agent}")))
        return arms

    def configs(self) -> list[Config]:
        """Returns the training runs alone."""
        return [config for _, config in self.arms()]
