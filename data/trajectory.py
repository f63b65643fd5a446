"""Trajectory: one episode, with checked shapes and values."""

from dataclasses import dataclass, field

import numpy as np

from data.errors import DataError


@dataclass(frozen=True, eq=False)
class Trajectory:
    """One episode of M steps; `action[t]` leads from `observation[t]` to `observation[t + 1]` and earns `reward[t]`.

    Arrays of any real dtype are accepted and converted to float32 (physics to float64). `discount` is 0 only where the
    episode terminated: the end of the time limit is a truncation and keeps 1. `extras` holds other arrays that came
    with the episode (a hidden goal, a collector's skill), with a row per observation. `source` names the episode in
    error messages. DataError when shapes disagree or a value is NaN or infinite; `extras` are checked for rows only.
    """

    observation: np.ndarray  # f32[M+1, O]
    action: np.ndarray  # f32[M, A]
    reward: np.ndarray  # f32[M]
    discount: np.ndarray  # f32[M]
    physics: np.ndarray | None = None  # f64[M+1, P], MuJoCo's state
    extras: dict[str, np.ndarray] = field(default_factory=dict)
    source: str = "a trajectory in memory"

    def __post_init__(self) -> None:
        steps = len(self.action) if np.ndim(self.action) else 0
        if steps == 0:
            raise DataError(f"{self.source}: an episode needs at least one step; got {np.shape(self.action)} actions")
        self._check("observation", np.float32, rows=steps + 1, rank=2)
        self._check("action", np.float32, rows=steps, rank=2)
        self._check("reward", np.float32, rows=steps, rank=1)
        self._check("discount", np.float32, rows=steps, rank=1)
        if self.physics is not None:
            self._check("physics", np.float64, rows=steps + 1, rank=2)
        for key, values in self.extras.items():
            if np.ndim(values) < 1 or len(values) != steps + 1:
                raise DataError(
                    f"{self.source}: extras[{key!r}] needs a row per observation ({steps + 1}); "
                    f"got shape {np.shape(values)}"
                )

    def _check(self, name: str, dtype: type, *, rows: int, rank: int) -> None:
        values = np.asarray(getattr(self, name))
        if values.dtype.kind not in "fiu":
            raise DataError(f"{self.source}: {name} must be real numbers; got dtype {values.dtype}")
        if values.ndim != rank or len(values) != rows:
            expected = f"({rows}, {name[0].upper()})" if rank == 2 else f"({rows},)"
            raise DataError(
                f"{self.source}: {name} has shape {values.shape}; expected {expected}, because there are "
                f"{len(self.action)} actions (observation and physics have one row more, reward and discount as many)"
            )
        # A float64 beyond float32's range becomes infinite here and is reported just below.
        with np.errstate(over="ignore"):
            values = values.astype(dtype, copy=False)
        finite = np.isfinite(values)
        if not finite.all():
            index = tuple(int(i) for i in np.argwhere(~finite)[0])
            raise DataError(
                f"{self.source}: {name}{list(index)} is {values[index]}; every value must be finite. "
                "Delete the episode or collect it again"
            )
        object.__setattr__(self, name, values)

    @property
    def length(self) -> int:
        """The number of steps M."""
        return len(self.action)

    @property
    def total_reward(self) -> float:
        """The undiscounted return, summed in float64."""
        return float(self.reward.sum(dtype=np.float64))
