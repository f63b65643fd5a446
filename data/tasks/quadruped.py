"""More quadruped tasks: ExoRL's `quadruped-stand`, `-jump`, `-roll` and `-roll_fast`; `-escape` without OpenGL."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from dm_control.rl import control
from dm_control.suite import common, quadruped

from data.tasks.reward import Builder, OtherReward, Reward, rise, variant


class Quadruped(OtherReward, quadruped.Move):
    """The suite's quadruped with another reward."""


class TerrainPhysics(quadruped.Physics):
    """Physics whose rendering contexts can be read without creating them."""

    _makes_contexts = True

    @property
    def contexts(self):
        """The contexts of OpenGL and MuJoCo; None within `no_new_contexts` if there are none yet."""
        return super().contexts if self._makes_contexts else self._contexts

    @contextmanager
    def no_new_contexts(self) -> Iterator[None]:
        """Context manager within which reading `contexts` does not create them."""
        self._makes_contexts = False
        try:
            yield
        finally:
            self._makes_contexts = True


class Escape(quadruped.Escape):
    """The suite's `quadruped-escape`, which needs no OpenGL context unless frames are rendered.

    The suite's version uploads its terrain to a renderer at every reset. This one does so only if a renderer exists. A
    renderer that is created later takes the terrain from the model.
    """

    def initialize_episode(self, physics: TerrainPhysics) -> None:
        """Draws the terrain and the start."""
        with physics.no_new_contexts():
            super().initialize_episode(physics)


def _upright(physics: quadruped.Physics) -> float:
    return rise(physics.torso_upright(), 1.0, margin=2.0)


def _jumps(physics: quadruped.Physics) -> float:
    return _upright(physics) * rise(physics.named.data.sensordata["center_of_mass"][2], 1.0, least=0.5)


def _rolls(speed: float) -> Reward:
    return lambda physics: _upright(physics) * rise(np.linalg.norm(physics.torso_velocity()), speed, least=0.5)


def _task(reward: Reward, speed: float = 0.0) -> Builder:
    return variant("quadruped-walk", 20.0, Quadruped, reward, desired_speed=speed)


def _escape() -> control.Environment:
    xml = quadruped.make_model(floor_size=40, terrain=True, rangefinders=True)
    physics = TerrainPhysics.from_xml_string(xml, common.ASSETS)
    return control.Environment(physics, Escape(), time_limit=20, control_timestep=0.02)


BUILDERS: dict[str, Builder] = {
    "quadruped-stand": _task(_upright),
    "quadruped-jump": _task(_jumps),
    "quadruped-roll": _task(_rolls(0.5), 0.5),
    "quadruped-roll_fast": _task(_rolls(5.0), 5.0),
    "quadruped-escape": _escape,
}
