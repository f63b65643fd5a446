"""The settings of an agent: `[agent]`, and a table for each value-based algorithm, such as `[agent.td3]`."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from agents.section import Chance, Count, Fraction, OpenFraction, Positive, Section, Size


class ValueSection(Section):
    """Settings of all agents that learn a value function from transitions."""

    discount: OpenFraction = 0.99
    """Discount factor gamma."""
    target_rate: Chance = 0.01
    """Rate of the target network's update towards the critic (often called tau)."""


class TD3Section(ValueSection):
    """Settings of TD3, with ExoRL's defaults (Yarats et al. 2022)."""

    noise: Positive = 0.2
    """Standard deviation of the policy's Gaussian noise, per action dimension."""
    noise_clip: Positive = 0.3
    """Bound of the noise per action dimension, in training."""


class TD3BCSection(TD3Section):
    """Settings of TD3+BC, with ExoRL's defaults and the alpha of the paper (Fujimoto and Gu 2021)."""

    alpha: Positive = 2.5
    """Weight of the value term relative to the imitation term."""


class CRRSection(TD3Section):
    """Settings of CRR, with ExoRL's defaults; the weight functions are the paper's (Wang et al. 2020)."""

    weight: Literal["indicator", "exp"] = "indicator"
    """Weight of an action in the imitation loss, as a function of its advantage."""
    temperature: Positive = 1.0
    """Temperature of the weight "exp"."""
    samples: Size = 10
    """Number of policy actions whose mean Q value estimates the value of an observation."""


class CQLSection(ValueSection):
    """Settings of CQL (Kumar et al. 2020), with ExoRL's defaults."""

    alpha: Positive = 0.01
    """Weight of the conservative penalty: log-sum-exp of Q over sampled actions, less Q of the data's action."""
    samples: Size = 3
    """Sampled actions of each kind (uniform, pi(s), pi(s')) in the log-sum-exp."""


class IQLSection(ValueSection):
    """Settings of IQL, with the paper's defaults for locomotion (Kostrikov et al. 2021)."""

    target_rate: Chance = 0.005
    expectile: OpenFraction = 0.7
    """Expectile tau of the value regression. 0.5 gives the mean value of the actions in the data; towards 1, the value
    of the best of them."""
    temperature: Positive = 3.0
    """The paper's beta: how strongly actions of higher advantage are preferred. Near 0: behaviour cloning."""


VALUE_KINDS = ("td3", "td3_bc", "crr", "cql", "iql")
"""Agents that learn a value function. Each has a table of settings under its name."""


class AgentConfig(Section):
    kind: Literal[
        "agentic_transformer",
        "algorithm_distillation",
        "decision_transformer",
        "recurrent",
        "bc",
        "td3",
        "td3_bc",
        "crr",
        "cql",
        "iql",
    ]
    """The algorithm. recurrent: the agentic transformer with a recurrent network in place of attention. bc: behaviour
    cloning. td3, td3_bc, crr, cql, iql: actor-critic algorithms, trained on transitions."""
    cell: Literal["delta"] | None = None
    """Cell of the recurrent agent. None: a GRU, whose state has 2 * width entries per layer. delta: the gated delta
    rule, whose state is a matrix of 2 * width by 2 * width per head."""
    tokens: Literal["rsar", "fused"] = "fused"
    """rsar: return, state, action and reward are one token each, as in the papers. fused: one token per timestep, so
    that the same number of tokens holds four times as many timesteps."""
    window: Count | None = None
    """Timesteps that a token attends to, its own included. None: all earlier ones."""
    loss_on: Literal["last", "all", "all+last"] = "all+last"
    """Trajectories whose actions enter the loss. all+last: all, with the last one (by default the best) counted
    twice. In map tasks, the queries count as "last"."""
    loss_elsewhere: Fraction = 0.0
    """With loss_on "last": the loss weight of the other trajectories' actions."""
    top_fraction: Annotated[Fraction, Field(gt=0)] = 0.1
    """bc: share of the timesteps that are imitated, from the trajectories of highest return."""
    mixture: Size | None = None
    """Number of Gaussian components of the action distribution, for multimodal data. None: a single Gaussian. Not
    available for agents that learn a value function."""
    td3: TD3Section | None = None
    """Settings of the kind of the same name. Each of these tables is set for its own kind, and None for all others."""
    td3_bc: TD3BCSection | None = None
    crr: CRRSection | None = None
    cql: CQLSection | None = None
    iql: IQLSection | None = None

    @model_validator(mode="before")
    @classmethod
    def its_table_is_there(cls, settings: Any) -> Any:
        kind = settings.get("kind") if isinstance(settings, dict) else None
        if kind in VALUE_KINDS and settings.get(kind) is None:
            return {**settings, kind: {}}
        return settings

    @model_validator(mode="after")
    def other_tables_are_not(self) -> "AgentConfig":
        for name in VALUE_KINDS:
            if name != self.kind and getattr(self, name) is not None:
                raise ValueError(f"the table {name} goes with kind '{name}'; got kind '{self.kind}'; leave it out")
        if self.kind in VALUE_KINDS and self.mixture is not None:
            raise ValueError(
                f"mixture={self.mixture} goes with agents that predict actions; got kind '{self.kind}'; leave it out"
            )
        if self.kind != "recurrent" and self.cell is not None:
            raise ValueError(f"cell '{self.cell}' goes with kind 'recurrent'; got kind '{self.kind}'; leave it out")
        return self

    @property
    def value_settings(self) -> Any:
        """The settings table of the agent's kind, for agents that learn a value function."""
        return getattr(self, self.kind)
