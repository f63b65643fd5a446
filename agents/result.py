"""The record of one evaluated episode: the task, the agent, the context and the return."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from agents.cli import ConfigError

ORACLE = "oracle"  # the agent name of the scripted controller that is given the hidden goal
MODES = ("prompted", "self")
CONTEXTS = ("own", "foreign", "none")


class Goal(NamedTuple):
    """A goal as evaluated with one training seed. Returns of equal goals are paired."""

    seed: int
    evaluation_seed: int
    group: int
    world: int | None

    @property
    def unit(self) -> tuple[int, int]:
        """The unit that a bootstrap resamples: a world, whose queries share its history; without worlds, the goal."""
        return self.evaluation_seed, self.group if self.world is None else self.world


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One evaluated episode.

    Attributes:
        experiment: Name of the experiment (the run, or the sweep).
        agent: Name of the agent.
        task: Name of the task.
        seed: Seed of training.
        evaluation_seed: Seed that the goals were drawn from.
        group: Index of the goal (or start) among those of its evaluation seed. The episodes of a group are played one
            after the other. Under every context, the same group must have the same goal: they are paired.
        mode: "prompted" when a context is given; "self" when the context is only the agent's earlier episodes of the
            group.
        context: Trajectories of the episode's "own" goal, of a "foreign" goal (the control), or "none".
        context_trajectories: Number of trajectories in the context before the first episode of the group.
        context_tokens: The same in tokens.
        places: Number of places of the world in map tasks; 0 elsewhere.
        world: Index of the world in map tasks; None elsewhere.
        age: In map tasks, number of visits after the one to the queried place (0: it was visited last). The history
            holds that visit if it has more visits than this. None for the control, and in older files.
        met: Probability with which each trajectory of the context has reached the goal; 0 where it was not set.
        episode_index: Index of the episode in its group, from 0. In both modes it sees the episodes before it.
        return_: Sum of the rewards of the episode.
        steps: Number of steps of the episode.
        checkpoint_step: Number of updates of the checkpoint.
        run: Name of the training run. Default: the experiment.
        series: Name of the series. The seeds of one series are averaged; different series never are. Default: the
            experiment.
        settings_id: Identifier of the settings (`agents.identity`). Results of different settings are never pooled.
            Empty in older files.
        settings: Settings that differ from their default, by dotted name.
        versions: Versions of the packages used in evaluation.
        trained_with: Versions of the packages used in training.
    """

    experiment: str
    agent: str
    task: str
    seed: int
    context_trajectories: int
    context_tokens: int
    mode: str
    context: str
    group: int
    episode_index: int
    return_: float
    steps: int
    checkpoint_step: int
    versions: Mapping[str, str]
    places: int = 0
    evaluation_seed: int = 0
    world: int | None = None
    age: int | None = None
    met: float = 0.0
    run: str = ""
    series: str = ""
    settings_id: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    trained_with: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("experiment", "agent", "task", "run", "series", "settings_id"):
            value = getattr(self, name)
            if not isinstance(value, str) or not _is_text(value) or not (value or name in NEW):
                raise ConfigError(f"a result's {name} must be a name; got {_shown(value)}")
        for name in ("run", "series"):
            if not getattr(self, name):
                object.__setattr__(self, name, self.experiment)
        for name in (*_COUNTS, *(name for name in ("world", "age") if getattr(self, name) is not None)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
                limit = " and below 2^63" if isinstance(value, int) and value > 0 else ""
                raise ConfigError(f"a result's {name} must be a whole number of 0 or more{limit}; got {_shown(value)}")
        if (self.world is None) != (self.places == 0):
            raise ConfigError(
                f"a result of a map has places and a world, and no other has; got places={self.places}, "
                f"world={self.world}"
            )
        if not isinstance(self.met, int | float) or not 0 <= self.met <= 1:
            raise ConfigError(f"a result's met must be a chance, from 0 to 1; got {_shown(self.met)}")
        if self.mode not in MODES:
            raise ConfigError(f"a result's mode must be one of {', '.join(MODES)}; got {_shown(self.mode)}")
        if self.context not in CONTEXTS:
            raise ConfigError(f"a result's context must be one of {', '.join(CONTEXTS)}; got {_shown(self.context)}")
        if self.context == "none" and self.context_trajectories:
            raise ConfigError(
                f"a result without context has 0 context_trajectories; got {self.context_trajectories}. "
                "Write context 'own' or 'foreign'."
            )
        if not isinstance(self.return_, int | float) or not abs(self.return_) <= sys.float_info.max:
            raise ConfigError(f"a result's return must be a finite number; got {_shown(self.return_)}")
        for name in ("versions", "settings", "trained_with"):
            value = getattr(self, name)
            if not isinstance(value, Mapping):
                raise ConfigError(f"a result's {name} must map names to values; got {_shown(value)}")

    @property
    def goal(self) -> Goal:
        """The goal of the episode, and the training seed."""
        return Goal(self.seed, self.evaluation_seed, self.group, self.world)

    @property
    def player(self) -> tuple[str | int, ...]:
        """Identifies the agent that played: run, series, agent, task, seed and settings."""
        return self.experiment, self.series, self.run, self.agent, self.task, self.seed, self.settings_id

    @property
    def key(self) -> tuple[str | int | float, ...]:
        """Identifies the episode. A repeated evaluation skips the keys already present; of two lines with the same key,
        the later one counts.
        """
        return (
            *self.player,
            self.mode,
            self.context,
            self.context_trajectories,
            self.places,
            self.met,
            self.evaluation_seed,
            self.group,
            self.episode_index,
            self.checkpoint_step,
        )

    @property
    def context_free(self) -> bool:
        """Whether the episode had no context: no prompt, and no earlier episode of the same group."""
        return self.episode_index == 0 and (self.mode == "self" or self.context_trajectories == 0)


_COUNTS = (
    *("seed", "context_trajectories", "context_tokens", "places", "evaluation_seed", "group", "episode_index"),
    *("steps", "checkpoint_step"),
)
# Fields that lines in older files may lack.
NEW = {
    *("places", "evaluation_seed", "world", "age", "met", "run", "series", "settings_id", "settings", "trained_with"),
}


def _is_text(value: str) -> bool:
    """Whether a string can be encoded as UTF-8: JSON may hold a lone surrogate, "\\ud800"."""
    return value.encode(errors="ignore").decode() == value


def _shown(value: object) -> str:
    """Returns the value as shown in messages, shortened where it is long."""
    text = "a long number" if isinstance(value, int) and value.bit_length() > 1000 else repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
