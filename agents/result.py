"""One evaluated episode: what was played, by whom, and what came of it."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from agents.cli import ConfigError

ORACLE = "oracle"  # the agent name of a scripted controller that is told what the others must find out
MODES = ("prompted", "self")
CONTEXTS = ("own", "foreign", "none")


class Goal(NamedTuple):
    """What a training seed was asked: returns of equal goals are paired."""

    seed: int
    evaluation_seed: int
    group: int
    world: int | None

    @property
    def unit(self) -> tuple[int, int]:
        """What a bootstrap draws whole: the queries of one world, which share its history; elsewhere each goal."""
        return self.evaluation_seed, self.group if self.world is None else self.world


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One evaluated episode.

    Attributes:
        seed: Of training.
        evaluation_seed: The goals were drawn from it.
        group: The goal (or chain) of the episode, among those of its evaluation seed. Episodes of one group were played
            one after the other. The same group under another context must be the same goal: the two are paired.
        mode: "prompted" when a context is given, "self" when the agent has its own earlier episodes of the group alone.
        context: What is given: trajectories of the episode's "own" goal, of a "foreign" one (the control), or "none".
        context_trajectories: How much is given before the first episode of the group.
        context_tokens: The same in tokens.
        places: Of the world, where the task is a map; else 0.
        world: Which world it is; None where the task is no map.
        age: Of a map, how many visits ago, 0 the last one, the world was at the place that is asked about: it is in the
            history where that is longer. None for the control, and in older lines.
        met: The chance with which a trajectory of the context had met the goal; 0 where that was left to the data.
        episode_index: Place of the episode within its group, from 0; it sees the episodes before it, in both modes.
        run: The training run that played; the experiment where it is left out.
        series: The seeds of one series are averaged; two series never are. The experiment where it is left out.
        settings_id: Equal for equal settings (`agents.identity`); results of other settings are never pooled. Old lines
            have none.
        settings: The settings that are not the default, by dotted name.
        versions: Of the packages that played.
        trained_with: Of the packages that trained.
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
        """What was asked, and of which training seed."""
        return Goal(self.seed, self.evaluation_seed, self.group, self.world)

    @property
    def player(self) -> tuple[str | int, ...]:
        """Names who played and how: the run, as whose agent it counts, and the settings."""
        return self.experiment, self.series, self.run, self.agent, self.task, self.seed, self.settings_id

    @property
    def key(self) -> tuple[str | int | float, ...]:
        """Names the episode: an evaluation that is started again skips the keys it finds, and of two lines with one key
        the later counts.
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
        """True when no earlier episode could have helped: no prompt, and no episode of the same group before it."""
        return self.episode_index == 0 and (self.mode == "self" or self.context_trajectories == 0)


_COUNTS = (
    *("seed", "context_trajectories", "context_tokens", "places", "evaluation_seed", "group", "episode_index"),
    *("steps", "checkpoint_step"),
)
# Fields that older lines lack.
NEW = {
    *("places", "evaluation_seed", "world", "age", "met", "run", "series", "settings_id", "settings", "trained_with"),
}


def _is_text(value: str) -> bool:
    """Whether a string can be written to a file: JSON may hold half a character, "\\ud800"."""
    return value.encode(errors="ignore").decode() == value


def _shown(value: object) -> str:
    """Returns the value as a message shows it: its beginning, where it is long."""
    text = "a long number" if isinstance(value, int) and value.bit_length() > 1000 else repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
