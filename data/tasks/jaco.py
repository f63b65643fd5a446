"""ExoRL's tasks `jaco-reach_...`: an arm with six joints moves a hand with three fingers to one of four places.

The task is dm_control's composer task `manipulation.reach` with a site as its target. As in ExoRL, the target is fixed
and is not in the observation.
"""

import warnings

from absl import logging
from dm_control.rl import control
from dm_control.suite import base

from data.tasks.reward import Builder

with warnings.catch_warnings():  # composer would show every DeprecationWarning of the whole process
    from dm_control import composer, mjcf
    from dm_control.manipulation import reach
    from dm_control.manipulation.shared import arenas, constants, observations, robots, workspaces

PLACES = {
    "top_left": (-0.09, 0.09, 0.001),
    "top_right": (0.09, 0.09, 0.001),
    "bottom_left": (-0.09, -0.09, 0.001),
    "bottom_right": (0.09, -0.09, 0.001),
}
SECONDS = 10.0


class SuiteTask(base.Task):
    """Wraps a composer task in the interface of the suite's tasks, without composer's hooks between steps."""

    def __init__(self, task: composer.Task) -> None:
        self._composed = task
        super().__init__(random=0)

    def initialize_episode(self, physics: mjcf.Physics) -> None:
        """Draws positions of the hand and the fingers until the arm can reach the position of the hand."""
        loudness = logging.get_verbosity()
        logging.set_verbosity(logging.ERROR)  # composer warns of every drawn position that the arm cannot reach
        try:
            self._composed.initialize_episode(physics, self.random)
        finally:
            logging.set_verbosity(loudness)

    def get_observation(self, physics: mjcf.Physics) -> dict:
        """Returns the enabled observables, in composer's order."""
        enabled = {name: observable for name, observable in self._composed.observables.items() if observable.enabled}
        return {name: observable(physics, self.random) for name, observable in enabled.items()}

    def get_reward(self, physics: mjcf.Physics) -> float:
        """Returns the composer task's reward."""
        return self._composed.get_reward(physics)


def reach_task(place: tuple[float, float, float]) -> reach.Reach:
    """Returns the composer task with the target at `place` (x, y, z in metres); no observation contains the target."""
    settings = observations.PERFECT_FEATURES
    task = reach.Reach(
        arena=arenas.Standard(),
        arm=robots.make_arm(obs_settings=settings),
        hand=robots.make_hand(obs_settings=settings),
        prop=None,
        obs_settings=settings,
        workspace=reach._SITE_WORKSPACE._replace(target_bbox=workspaces.BoundingBox(place, place)),
        control_timestep=constants.CONTROL_TIMESTEP,
    )
    task.task_observables["target_position"].enabled = False
    return task


def _reach(place: tuple[float, float, float]) -> Builder:
    def build() -> control.Environment:
        task = reach_task(place)
        physics = mjcf.Physics.from_mjcf_model(task.root_entity.mjcf_model)
        return control.Environment(
            physics, SuiteTask(task), time_limit=SECONDS, control_timestep=constants.CONTROL_TIMESTEP
        )

    return build


BUILDERS: dict[str, Builder] = {f"jaco-reach_{name}": _reach(place) for name, place in PLACES.items()}
