"""The settings of an agent: `[agent]`, and a table in it of the algorithms that have settings of their own."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from agents.section import Between, Chance, Count, Fraction, Positive, Section, Size


class ValueSection(Section):
    """Of every agent that learns a value function from transitions."""

    discount: Between = 0.99
    """What the reward of the next step counts."""
    target_rate: Chance = 0.01
    """How far the target network goes towards the critic in an update."""


class TD3Section(ValueSection):
    """ExoRL's (Yarats et al. 2022)."""

    noise: Positive = 0.2
    """Standard deviation of the policy, in each entry of an action."""
    noise_clip: Positive = 0.3
    """The most that noise changes an entry while learning."""


class TD3BCSection(TD3Section):
    """ExoRL's, with the alpha of the paper (Fujimoto and Gu 2021)."""

    alpha: Positive = 2.5
    """How much the value counts beside imitation."""


class CRRSection(TD3Section):
    """ExoRL's; the paper's weights (Wang et al. 2020)."""

    weight: Literal["indicator", "exp"] = "indicator"
    """How much an action is imitated, by its advantage."""
    temperature: Positive = 1.0
    """Of the weight "exp"."""
    samples: Size = 10
    """Actions of the policy whose mean value is the value of an observation."""


class CQLSection(ValueSection):
    """ExoRL's (the algorithm: Kumar et al. 2020)."""

    alpha: Positive = 0.01
    """How much the gap between the values of actions of the policy and of the data counts."""
    samples: Size = 3
    """Actions of each kind by which the largest values are estimated."""


class IQLSection(ValueSection):
    """The paper's for locomotion (Kostrikov et al. 2021)."""

    target_rate: Chance = 0.005
    expectile: Between = 0.7
    """0.5: the mean value of the actions in the data; 1: the value of the best of them."""
    temperature: Positive = 3.0
    """The paper's beta: how much better actions are preferred. Near 0: behaviour cloning."""


VALUE_KINDS = ("td3", "td3_bc", "crr", "cql", "iql")
"""Agents that learn a value function, each with a table of its name."""


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
    """algorithm_distillation: predicts what a learner does next; recurrent: a recurrent cell reads the chains of the
    agentic transformer; bc: behaviour cloning; td3 and those behind it: a policy beside a value function."""
    cell: Literal["delta"] | None = None
    """recurrent: what a layer remembers by. None: gated recurrent units, 2 numbers for each of the width; delta: the
    gated delta rule, in each head a matrix of twice the width squared."""
    tokens: Literal["rsar", "fused"] = "fused"
    """rsar: return, state, action and reward are a token each (the papers'); fused: one token a step, four times the
    context."""
    window: Count | None = None
    """Steps that a token sees, itself included. None: all."""
    loss_on: Literal["last", "all", "all+last"] = "all+last"
    """Trajectories whose actions are learnt. all+last: all, and the best one twice. Of a map, "last" are the
    queries."""
    loss_elsewhere: Fraction = 0.0
    """With loss_on "last": how much the actions of the other trajectories count."""
    top_fraction: Annotated[Fraction, Field(gt=0)] = 0.1
    """bc: share of the time steps kept, from the trajectories of highest return."""
    mixture: Size | None = None
    """Gaussians in the mixture from which an action is drawn, so that several ways to act stay apart. None: one
    Gaussian. (Not of the kinds that learn a value.)"""
    td3: TD3Section | None = None
    """Each of these tables goes with the kind of its name, and there it is never None."""
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
    def value(self) -> Any:
        """The table of an agent that learns a value function."""
        return getattr(self, self.kind)
