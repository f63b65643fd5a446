"""The settings of training, evaluation and sweeps (`agents.config_file` reads, checks and writes them)."""

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
    """How to collect the episodes where they are missing (`python -m data.collect`)."""

    policy: Text
    episodes: Count
    seed: Seed = 0
    workers: Annotated[int, Field(gt=0, le=1024)] = 2


class DataConfig(Section):
    """The source of the trajectories."""

    tasks: list[Text] = Field(min_length=1)
    """Task names, each `domain-task`. With several tasks, all trajectories of a chain belong to the same task."""
    episodes: Text
    """Folder of the ExoRL episodes, shared by all tasks of the domain."""
    stores: list[Text] = Field(min_length=1)
    """Path of the relabelled HDF5 store of each task, in the order of `tasks`."""
    collect: CollectConfig | None = None
    held_out: Share = 0.1
    """Share of the episodes held out from training. Evaluation draws its contexts from them."""

    @model_validator(mode="after")
    def one_store_a_task(self) -> "DataConfig":
        if len(self.tasks) != len(self.stores):
            raise ValueError(f"{len(self.tasks)} tasks need as many stores; got {len(self.stores)}")
        return self


class ChainConfig(Section):
    """How training chains are drawn (`data.ChainSampler`)."""

    trajectories: Size = 1
    lengths: Literal["full", "mixed"] = "full"
    """full: every chain has `trajectories` trajectories. mixed: each row is cut at random into chains of 1 to
    `trajectories`, so that the agent learns to act after any number of trajectories."""
    sort: Literal["ascending", "random", "descending", "time"] = "ascending"
    target: Literal["max", "own"] | Return = "max"
    met: Chance | Literal["annealed"] | None = None
    """For tasks with a hidden goal. One trajectory of each chain always reaches the goal; `met` is the probability that
    each other one does. "annealed": the probability rises along the chain from 0 towards 1. None: 0 to 2 others are
    chosen because they reached it, the rest at random."""
    grow: list[Size] = Field(default=[])
    """Curriculum of chain lengths in trajectories, such as [8, 16, 32], each used for an equal share of the first
    `grow_until` of the updates. A row then holds several short chains side by side."""
    grow_until: Fraction = 0.47
    """Share of the updates after which all chains have `trajectories` trajectories."""


class OptimizerConfig(Section):
    learning_rate: Positive = 1e-3
    warmup: Whole = 100
    """Updates over which the learning rate rises linearly from 0."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """After the warm-up. cosine: the rate decays to a hundredth by update `train.updates`. constant: it stays."""
    weight_decay: Annotated[float, Field(ge=0, le=1e30)] = 1e-2
    gradient_clip: Positive = 1.0
    beta2: Share = 0.99


class TrainConfig(Section):
    updates: Count = 1000
    batch: Size = 16
    """Chains per update, over all devices; for value-based agents, transitions per update."""
    accumulate: Size = 1
    """Micro-batches per update. Their gradients are summed, so that larger batches fit into memory."""
    log_every: Count = 10
    checkpoint_every: Count = 500
    keep_checkpoints: Count = 2
    """Number of newest checkpoints to keep."""
    keep_best: Whole = 0
    """Number of best checkpoints to keep as well: those with the lowest mean loss since the previous checkpoint."""
    prefetch: Annotated[int, Field(gt=0, le=4096)] = 4
    """Batches prepared in advance."""
    workers: Annotated[int, Field(ge=0, le=1024)] = 0
    """Processes that prepare batches. 0: a thread of the training process does."""


class EvaluateConfig(Section):
    contexts: list[Annotated[int, Field(ge=0, le=2**20)]] = Field(default=[0, 1, 2, 4], min_length=1)
    """Context lengths to evaluate, in trajectories."""
    groups: Size = 16
    """prompted: held-out goals (or start seeds) evaluated with every context. self: independent agents."""
    episodes: Count = 1
    """Episodes played after each prompt. Each episode sees the episodes before it."""
    modes: list[Literal["prompted", "self"]] = Field(default=["prompted"], min_length=1)
    """prompted: the context is held-out trajectories. self: the context is the agent's own earlier episodes."""
    self_episodes: Count = 8
    """Episodes that each agent plays in mode self."""
    episode_steps: Count | None = None
    """Steps per episode. None: the task's default."""
    target: Literal["typical"] | Return = "typical"
    """Return that the agent is asked for. typical: the 90th percentile of the training chains' best returns."""
    mesh: MeshConfig = MeshConfig()
    """Device mesh for acting. The KV cache is sharded over its sequence axes."""
    met: list[Chance] = Field(default=[])
    """For tasks with a hidden goal: probabilities that a trajectory of the context has reached the goal, each evaluated
    separately. Empty: random trajectories, or annealed ones where `chain.met` is "annealed"."""
    places: list[Size] = Field(default=[16, 64], min_length=1)
    """Map tasks: numbers of places per world, each evaluated separately. Every place is visited once."""
    seen: list[Fraction] = Field(default=[0.0, 0.25, 0.5, 1.0], min_length=1)
    """Map tasks: shares of the visits, the most recent ones, that the context holds. `contexts` is not used."""
    queries: Size = 4
    """Map tasks: queries per world, all after the same history. `groups` counts the queries of all worlds."""
    memory_gib: Positive = 2.0
    """Map tasks: memory in GiB for the KV caches of the queries that are played at the same time."""
    foreign: bool = False
    """Whether to evaluate a control too: contexts that belong to another goal, which must not help."""
    checkpoint: Literal["newest", "best"] = "newest"
    """newest: the last checkpoint. best: the one of lowest training loss among those kept (`train.keep_best`)."""
    sample: bool = True
    """Whether to sample actions. False: the agent takes the mean of the action distribution."""
    seed: Seed = 0


class WandbConfig(Section):
    mode: Literal["disabled", "offline", "online"] = "disabled"
    project: Text = "rlring"


class Config(Section):
    """One training run and its evaluation."""

    name: RunName
    series: str = ""
    """Runs of one series that differ only in their seed are averaged. Sweeps set it. Empty: the run stands alone."""
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
        """The tasks of the run that hide a goal."""
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
    """Several agents, trained on the same data, evaluated in the same way and drawn in one plot."""

    name: RunName
    title: str = ""
    seeds: list[Seed] = Field(default=[0], min_length=1)
    shared: dict[str, Any]
    """Settings that all runs share (the sections of `Config`)."""
    runs: dict[str, dict[str, Any]] = Field(min_length=1)
    """Settings of each agent by its name in the plot. They take precedence over `shared`."""
    baseline: bool = True
    """Whether to draw the oracle, where the task has one."""

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
        """Returns (agent name, config) of every training run, ordered by agent, then by seed."""
        arms = []
        for agent, changes in self.runs.items():
            for seed in self.seeds:
                settings = merge(merge({}, self.shared), changes)
                settings |= {"name": f"{self.name}/{agent}-{seed}", "series": f"{self.name}/{agent}", "seed": seed}
                arms.append((agent, validate(Config, settings, source=f"runs.{agent}")))
        return arms

    def configs(self) -> list[Config]:
        """Returns the configs of all training runs, ordered as in `arms`."""
        return [config for _, config in self.arms()]
