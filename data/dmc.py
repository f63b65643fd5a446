"""dm_control's tasks as gymnasium environments: flat float32 observations, actions in [-1, 1], physics states in info.

The rewards equal those of dm_control's own environments (checked in `tests/data/test_dmc.py`), and an episode is a
function of its seed and actions.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import gymnasium
import numpy as np
from dm_control.mujoco import engine
from dm_control.rl import control
from jaxtyping import Float, Float32, Float64

from data import episode_randomization
from data.actions import ROUNDING
from data.errors import DataError
from data.states import outcomes_of, rewards_of
from data.tasks.catalogue import load_task, task_names
from data.tasks.custom import HiddenGoal, SignedPlace

_UNLIMITED = 1e9  # dm_control's action specification has bounds of 1e10 for an actuator without a range
_STEPS_WITHOUT_LIMIT = 1000  # the time limit of dm_control's lqr, which has none of its own


class Environment(gymnasium.Env[Float32[np.ndarray, " O"], Float32[np.ndarray, " A"]]):
    """A task of dm_control's suite or of `data.tasks`, named `domain-task`.

    Observations are dm_control's, flattened in dm_control's order, float32 [O]. An action in [-1, 1] is mapped linearly
    to the actuators' range, as in ExoRL; actuators without a range take it unchanged. At the time limit an episode is
    truncated, with discount 1. An episode terminates only where the task itself ends it, with discount 0.

    `info` holds `physics` (MuJoCo's state: positions, velocities, activations; float64 [P]) and `discount`.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"], "render_fps": 30}

    def __init__(self, task: str, *, episode_steps: int | None = None, render_mode: str | None = None) -> None:
        """Loads the task. `episode_steps` replaces the task's time limit. `render_mode` is "rgb_array" or None.

        DataError when there is no such task, or a setting is invalid.
        """
        if episode_steps is not None and episode_steps < 1:
            raise DataError(f"episode_steps must be at least 1; got {episode_steps}")
        if render_mode not in (None, "rgb_array"):
            raise DataError(f"render_mode {render_mode!r} is unknown; use 'rgb_array' or None")
        environment = load_task(task)
        self.task_name = task
        self.render_mode = render_mode
        self._physics = environment.physics
        self._task = environment.task
        self.substeps = round(environment.control_timestep() / self._physics.timestep())
        self.metadata = {**self.metadata, "render_fps": round(1 / environment.control_timestep())}
        self.episode_steps = episode_steps or _own_steps(environment)
        self._steps_left = 0

        spec = environment.action_spec()
        bounded = (spec.minimum > -_UNLIMITED) & (spec.maximum < _UNLIMITED)
        self._action_low = np.where(bounded, spec.minimum, -1.0)
        self._action_scale = (np.where(bounded, spec.maximum, 1.0) - self._action_low) / 2.0
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, spec.shape, np.float32)
        environment.reset()
        self._task._random = np.random.RandomState()
        shape = self._observe().shape
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, shape, np.float32)

    @property
    def physics(self) -> engine.Physics:
        """dm_control's physics object. Do not change it between steps: `step` continues from the state it left."""
        return self._physics

    @property
    def has_goal(self) -> bool:
        """Whether the task hides a goal. If so, `reset` accepts a goal."""
        return isinstance(self._task, HiddenGoal)

    def reset(
        self, *, seed: int | Sequence[int] | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[Float32[np.ndarray, " O"], dict[str, Any]]:
        """Returns the first observation and info of a new episode.

        The episode depends only on the seed (an integer, or a sequence of integers) and the options. Without a seed the
        random stream continues. `options={"goal": array}` sets the goal [G] of a hidden-goal task and does not change
        the start state. `options={"sign": array}` sets the sign [S] of a map task. DataError for a negative seed, an
        unknown option, and a goal or sign that does not fit the task.
        """
        if seed is not None and np.min(seed) < 0:
            raise DataError(f"{self.task_name}: a seed is not negative; got {seed}")
        super().reset(seed=seed if isinstance(seed, int) else None)
        if seed is not None:
            bits = np.random.MT19937(np.random.SeedSequence(seed))
            self._task._random = np.random.RandomState(bits)
        options = dict(options or {})
        goal, sign = options.pop("goal", None), options.pop("sign", None)
        if options:
            raise DataError(f"reset option {sorted(options)[0]!r} is unknown; there are 'goal' and 'sign'")
        if goal is not None:
            self._give_goal(goal)
        if sign is not None:
            self._give_sign(sign)
        with self._physics.reset_context():
            self._task.initialize_episode(self._physics)
        self._steps_left = self.episode_steps
        return self._observe(), self._info(1.0)

    def step(
        self, action: Float[np.ndarray, " A"]
    ) -> tuple[Float32[np.ndarray, " O"], float, bool, bool, dict[str, Any]]:
        """Returns observation, reward, terminated, truncated and info after one action.

        gymnasium.error.ResetNeeded when the episode is over or no episode was started. DataError for an action that has
        another shape, lies outside [-1, 1] or is NaN.
        """
        if self._steps_left == 0:
            raise gymnasium.error.ResetNeeded(
                f"{self.task_name}: step() was called after the end of an episode (or before the first). "
                "Call reset() to start one"
            )
        self._task.before_step(self.native_action(action), self._physics)
        self._physics.step(self.substeps)
        self._task.after_step(self._physics)
        reward = float(self._task.get_reward(self._physics))
        observation = self._observe()
        self._steps_left -= 1
        truncated = self._steps_left == 0
        # As in dm_control, the last step before the time limit always truncates and never terminates.
        discount = None if truncated else self._task.get_termination(self._physics)
        terminated = discount is not None
        if terminated:
            self._steps_left = 0
        return observation, reward, terminated, truncated, self._info(discount if terminated else 1.0)

    def render(self) -> np.ndarray | None:
        """Returns a frame, uint8 [240, 320, 3], which shows the hidden goal if there is one; None if render_mode is
        None.

        dm_control raises RuntimeError when MUJOCO_GL is "disabled": set it to "egl" or "osmesa".
        """
        if self.render_mode is None:
            return None
        if self.has_goal:
            self._task.show_goal(self._physics)
        return self._physics.render(height=240, width=320, camera_id=0)

    def native_action(self, action: Float[np.ndarray, "*M A"]) -> Float64[np.ndarray, "*M A"]:
        """Returns the actuators' controls for actions in [-1, 1]; rounding errors up to 1e-6 beyond are clipped.

        DataError for another number of action dimensions, actions further outside, and NaN.
        """
        action = np.asarray(action, np.float64)
        if action.shape[-1:] != self._action_low.shape:
            raise DataError(f"{self.task_name}: an action has shape {self._action_low.shape}; got {action.shape}")
        # This form of the comparison also catches NaN.
        outside = ~(np.abs(action) <= 1.0 + ROUNDING).all(axis=-1)
        if outside.any():
            first = action[outside][0]
            raise DataError(f"{self.task_name}: actions lie in [-1, 1]; got {first.tolist()}. Clip it to the range")
        return self._action_low + self._action_scale * (np.clip(action, -1.0, 1.0) + 1.0)

    def physics_state(self) -> Float64[np.ndarray, " P"]:
        """Returns MuJoCo's state: positions, velocities, activations."""
        return self._physics.get_state()

    def set_physics_state(self, state: Float64[np.ndarray, " P"]) -> None:
        """Sets MuJoCo's state, with zero control. The episode's step count and goal do not change."""
        size = self._physics.get_state().size
        if np.shape(state) != (size,):
            raise DataError(f"{self.task_name}: a physics state has {size} numbers; got shape {np.shape(state)}")
        with self._physics.reset_context():
            self._physics.set_state(np.asarray(state, np.float64))

    def rewards_at(
        self, states: Float64[np.ndarray, "M P"], actions: Float[np.ndarray, "M A"] | None
    ) -> Float64[np.ndarray, " M"]:
        """Returns the rewards of M pairs of a state and the action that led to it, in any order.

        If `actions` is None, the control is 0, as in ExoRL. What the task draws for an episode keeps its current value
        (see `set_extras`). Ends the current episode: a reset is needed afterwards. DataError when shapes do not fit.
        """
        physics = self._physics
        size = physics.get_state().size
        if states.shape[1:] != (size,):
            raise DataError(f"{self.task_name}: a physics state has {size} numbers; got shape {states.shape[1:]}")
        controls = np.zeros((len(states), self._action_low.size))
        if actions is not None:
            controls = self.native_action(actions)
        self._steps_left = 0
        return rewards_of(self.task_name, self._task, physics, np.asarray(states, np.float64), controls)

    def outcomes_at(
        self, states: Float64[np.ndarray, "M P"], actions: Float[np.ndarray, "M A"]
    ) -> tuple[Float32[np.ndarray, "M O"], Float64[np.ndarray, " M"]]:
        """Returns the observations of M states, and the rewards of these states and the actions that led to them.

        Only for the tasks in `data.states.SHOWN_AT_ONCE`. Ends the current episode.
        """
        self._steps_left = 0
        return outcomes_of(self.task_name, self._task, self._physics, states, self.native_action(actions))

    def extras(self) -> dict[str, Float64[np.ndarray, " E"]]:
        """Returns the values drawn for this episode that neither actions nor physics states contain, by name.

        These are `goal` of a hidden-goal task, `target` of a suite task that moves its target, and `gains` of
        `point_mass-hard`; other tasks have none.
        """
        if self.has_goal:
            return {"goal": np.array(self._task.goal)}
        return episode_randomization.read(self.task_name, self._physics)

    def set_extras(self, extras: Mapping[str, Float[np.ndarray, " E"]]) -> None:
        """Restores the values that `extras()` returned; DataError when a value is missing or has another size."""
        restored = {}
        for key, present in self.extras().items():
            if key not in extras:
                raise DataError(
                    f"{self.task_name} draws {key!r} anew for every episode, and this one did not keep it "
                    f"(it has {sorted(extras) or 'no extras'}). Collect it with data.collect, which does"
                )
            value = np.asarray(extras[key], np.float64)
            if value.shape != present.shape:
                raise DataError(f"{self.task_name}: extras {key!r} has shape {present.shape}; got {value.shape}")
            restored[key] = value
        if self.has_goal:
            self._task.goal = restored["goal"]
        else:
            episode_randomization.write(self.task_name, self._physics, restored)

    def clone(self) -> "Environment":
        """Returns another environment of the same task, much faster than loading one. Call its reset() first.

        The compiled model is shared unless episodes of the task change it.
        """
        other = copy.copy(self)
        other._physics = self._physics.copy(share_model=not episode_randomization.changes_model(self.task_name))
        other._task = copy.copy(self._task)
        other._task._random = np.random.RandomState()
        other._steps_left = 0
        return other

    def _give_goal(self, goal: Float[np.ndarray, " G"]) -> None:
        if not self.has_goal:
            raise DataError(f"{self.task_name} hides no goal, so reset() cannot be given one")
        self._task.next_goal = self._numbers("goal", np.asarray(goal, np.float64), self._task.goal_task.goal_size)

    def _give_sign(self, sign: Float[np.ndarray, " S"]) -> None:
        if not isinstance(self._task, SignedPlace):
            raise DataError(f"{self.task_name} shows no sign, so reset() cannot be given one")
        self._task.next_sign = self._numbers("sign", np.asarray(sign, np.float32), self._task.goal_task.sign_size)

    def _numbers(self, name: str, numbers: np.ndarray, size: int) -> np.ndarray:
        """Returns `numbers`; raises DataError unless they are `size` finite numbers."""
        if numbers.shape != (size,) or not np.isfinite(numbers).all():
            raise DataError(f"{self.task_name}: a {name} is {size} finite numbers; got {numbers.tolist()}")
        return numbers

    def _observe(self) -> Float32[np.ndarray, " O"]:
        parts = self._task.get_observation(self._physics).values()
        return np.concatenate([np.ravel(part) for part in parts]).astype(np.float32)

    def _info(self, discount: float) -> dict[str, Any]:
        return {"physics": self._physics.get_state(), "discount": discount}


def make(task: str, **options: Any) -> Environment:
    """Returns the environment of a task named `domain-task`; `options` are passed to `Environment`."""
    return Environment(task, **options)


def register() -> None:
    """Registers every task with gymnasium as `rlring/<domain>-<task>-v0`; a second call changes nothing."""
    for task in task_names():
        name = f"rlring/{task}-v0"
        if name not in gymnasium.registry:
            gymnasium.register(id=name, entry_point="data.dmc:make", kwargs={"task": task})


def _own_steps(environment: control.Environment) -> int:
    # dm_control's step limit is a quotient of floats, which rounding may leave slightly above an integer.
    limit = environment._step_limit
    return math.ceil(limit - 1e-6) if math.isfinite(limit) else _STEPS_WITHOUT_LIMIT
