"""The settings of a collector: URLB's values as defaults, and a small preset for two CPU cores."""

import copy
import difflib
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field, model_validator

from agents.cli import ConfigError
from agents.config_file import merge, parse_override, validate
from agents.explore.aps import APS, APSSettings
from agents.explore.bonus import Bonus, NoSettings
from agents.explore.diayn import DIAYN, DIAYNSettings
from agents.explore.disagreement import Disagreement, DisagreementSettings
from agents.explore.icm import ICM, ICMSettings
from agents.explore.icm_apt import ICMAPT, ICMAPTSettings
from agents.explore.proto import Proto, ProtoSettings
from agents.explore.rnd import RND, RNDSettings
from agents.explore.smm import SMM, SMMSettings
from agents.explore.td3 import TaskReward
from agents.section import Chance, Count, Fraction, Positive, Section, Seed, Size, Text, Whole

BONUSES: dict[str, type[Bonus]] = {
    "rnd": RND,
    "icm": ICM,
    "disagreement": Disagreement,
    "icm_apt": ICMAPT,
    "proto": Proto,
    "diayn": DIAYN,
    "smm": SMM,
    "aps": APS,
    "td3": TaskReward,
}
"""The intrinsic reward of each algorithm."""
ALGORITHMS = ("random", *BONUSES)
"""The names of all algorithms. "random" has no reward and learns nothing."""


class LearnerConfig(Section):
    """Settings of DDPG, with URLB's defaults."""

    width: Size = 1024
    """Units of the hidden layers of all networks."""
    batch: Annotated[int, Field(ge=2, le=2**20)] = 1024
    learning_rate: Positive = 1e-4
    target_rate: Chance = 0.01
    """Rate of the target network's update towards the critic (often called tau)."""
    discount: Fraction = 0.99
    nstep: Size = 3
    """Number of steps n of a transition."""
    noise: Positive = 0.2
    """Standard deviation of the action noise."""
    noise_clip: Positive = 0.3
    """Bound of the action noise in the losses."""
    update_every: Size = 2
    """Environment steps per update."""
    updates_per_call: Size = 8
    """Updates per compiled call (URLB: 1). The policy does not change in between."""
    seed_steps: Whole = 4000
    """Steps with uniform actions before the first update."""
    replay: Count = 1_000_000
    """Capacity of the replay buffer in steps, rounded down to whole episodes."""


class ExploreConfig(Section):
    """The settings of one collector."""

    task: Text
    algorithm: Text
    seed: Seed = 0
    episode_steps: Count | None = None
    """Steps per episode. None: the task's default."""
    checkpoint_every: Count = 10
    """Episodes between two checkpoints."""
    learner: LearnerConfig = LearnerConfig()
    rnd: RNDSettings = RNDSettings()
    icm: ICMSettings = ICMSettings()
    disagreement: DisagreementSettings = DisagreementSettings()
    icm_apt: ICMAPTSettings = ICMAPTSettings()
    proto: ProtoSettings = ProtoSettings()
    diayn: DIAYNSettings = DIAYNSettings()
    smm: SMMSettings = SMMSettings()
    aps: APSSettings = APSSettings()

    @property
    def algorithm_settings(self) -> Section:
        return getattr(self, self.algorithm, NoSettings())

    @model_validator(mode="after")
    def algorithm_is_there(self) -> "ExploreConfig":
        if self.algorithm not in ALGORITHMS:
            near = difflib.get_close_matches(self.algorithm, ALGORITHMS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(ALGORITHMS)}"
            raise ValueError(f"algorithm {self.algorithm!r} does not exist; {hint}")
        return self

    @model_validator(mode="after")
    def neighbours_are_in_the_batch(self) -> "ExploreConfig":
        wanted = getattr(self.algorithm_settings, "neighbours", 1)
        if wanted > self.learner.batch:
            raise ValueError(
                f"{self.algorithm}.neighbours={wanted} of a batch of learner.batch={self.learner.batch}; lower the "
                "first, or raise the second"
            )
        return self


PRESETS: dict[str, dict[str, Any]] = {
    "urlb": {},
    "cpu": {
        "learner": {"width": 128, "batch": 128, "update_every": 4},
        "rnd": {"representation": 32},
        "icm_apt": {"representation": 32},
        "proto": {"representation": 32, "projection": 128, "prototypes": 128, "queue": 512},
        "smm": {"code": 16, "units": 64},
    },
}
"""Settings that differ from the defaults, by preset name."""


def make_config(settings: dict[str, Any], preset: str, overrides: Sequence[str] = ()) -> ExploreConfig:
    """Returns the config of a preset, updated with `settings`, then with the overrides `section.key=value`. Raises
    ConfigError for an unknown preset or an invalid setting."""
    if preset not in PRESETS:
        raise ConfigError(f"preset {preset!r} does not exist. Choose one of {', '.join(PRESETS)}.")
    whole = merge(copy.deepcopy(PRESETS[preset]), settings)
    for override in overrides:
        merge(whole, parse_override(override))
    return validate(ExploreConfig, whole, source="agents.explore")
