"""The tasks of ExoRL (Yarats et al. 2022) that dm_control lacks, on the suite's own bodies.

Rewards and arenas are those of its `custom_dmc_tasks`: its datasets can be relabelled and its tasks evaluated. Nothing
of it is vendored: its models include a file by an absolute path of its authors' machine. Not here: jaco.
"""

from collections.abc import Callable
from xml.etree import ElementTree

import numpy as np
from dm_control import mujoco, suite
from dm_control.rl import control
from dm_control.suite import cheetah, hopper, point_mass, quadruped, walker
from dm_control.utils import rewards

Reward = Callable[[mujoco.Physics], float]


class OtherReward:
    """Mixed in before one of the suite's task classes, whose reward it replaces."""

    def __init__(self, reward: Reward, **options) -> None:
        self._reward = reward
        super().__init__(**options)

    def get_reward(self, physics) -> float:
        """Returns what the given function pays."""
        return self._reward(physics)


class Cheetah(OtherReward, cheetah.Cheetah):
    """`cheetah-run_backward`, `cheetah-flip`, `cheetah-flip_backward`."""


class Hopper(OtherReward, hopper.Hopper):
    """`hopper-hop_backward`, `hopper-flip`, `hopper-flip_backward`."""


class Quadruped(OtherReward, quadruped.Move):
    """`quadruped-stand`, `quadruped-jump`, `quadruped-roll`, `quadruped-roll_fast`."""


class WalkerFlip(walker.PlanarWalker):
    """`walker-flip`: walker-stand's reward, scaled by how fast the torso turns."""

    def get_reward(self, physics) -> float:
        """Returns up to 1, upright with an angular momentum of 5."""
        return super().get_reward(physics) * (5 * _rise(_turn(physics), 5.0) + 1) / 6


class PointMassMaze(point_mass.PointMass):
    """`point_mass_maze-...`: point_mass-easy with its target in one of four rooms, started in the top left one."""

    def initialize_episode(self, physics) -> None:
        """Sets the start. ExoRL's own draws it from NumPy's global stream, so its seeds do not fix it; ours do."""
        super().initialize_episode(physics)
        physics.data.qpos[:] = self.random.uniform((-0.29, 0.15), (-0.15, 0.29))


def _rise(value: float, target: float, *, margin: float | None = None, least: float = 0.0) -> float:
    """Returns 1 from the target upwards; below, a line through `least` at one margin (or the target), and 0 at last."""
    margin = target if margin is None else margin
    return rewards.tolerance(value, (target, np.inf), margin=margin, value_at_margin=least, sigmoid="linear")


def _turn(physics: mujoco.Physics) -> float:
    # MuJoCo computes every subtree's momentum because the models have a velocity sensor of the torso's.
    return physics.named.data.subtree_angmom["torso"][1]


def _stands(physics: hopper.Physics) -> float:
    return rewards.tolerance(physics.height(), (0.6, 2.0))


def _upright(physics: quadruped.Physics) -> float:
    return _rise(physics.torso_upright(), 1.0, margin=2.0)


def _variant(task: str, task_class: type, reward: Reward, **options) -> Callable[[], control.Environment]:
    """Returns a builder of a suite task with another reward."""

    def build() -> control.Environment:
        environment = suite.load(*task.split("-"), task_kwargs={"random": 0})
        seconds = {"cheetah": 10.0, "hopper": 20.0, "quadruped": 20.0}[task.split("-")[0]]
        return control.Environment(
            environment.physics,
            task_class(reward, **options),
            time_limit=seconds,
            control_timestep=environment.control_timestep(),
        )

    return build


def _walker_flip() -> control.Environment:
    physics = walker.Physics.from_xml_string(*walker.get_model_and_assets())
    return control.Environment(physics, WalkerFlip(move_speed=0), time_limit=25, control_timestep=0.025)


def _maze(x: float, y: float) -> Callable[[], control.Environment]:
    """Returns a builder of the maze with the target at (x, y): the suite's arena with contacts and a cross of walls."""

    def build() -> control.Environment:
        xml, assets = point_mass.get_model_and_assets()
        model = ElementTree.fromstring(xml)
        option, world = model.find("option"), model.find("worldbody")
        option.remove(option.find("flag"))
        for axis, size in (("0 1 0", ".18 .02 .02"), ("1 0 0", ".02 .18 .02")):
            ElementTree.SubElement(world, "geom", type="box", pos="0 0 .02", zaxis=axis, size=size, material="site")
        world.find("geom[@name='target']").attrib.update(pos=f"{x} {y} .01", contype="0", conaffinity="0")
        physics = point_mass.Physics.from_xml_string(ElementTree.tostring(model), assets)
        return control.Environment(physics, PointMassMaze(randomize_gains=False), time_limit=20)

    return build


BUILDERS: dict[str, Callable[[], control.Environment]] = {
    "cheetah-run_backward": _variant("cheetah-run", Cheetah, lambda physics: _rise(-physics.speed(), 10.0)),
    "cheetah-flip": _variant("cheetah-run", Cheetah, lambda physics: _rise(_turn(physics), 5.0)),
    "cheetah-flip_backward": _variant("cheetah-run", Cheetah, lambda physics: _rise(-_turn(physics), 5.0)),
    "hopper-hop_backward": _variant(
        "hopper-hop",
        Hopper,
        lambda physics: _stands(physics) * _rise(-physics.speed(), 2.0, margin=1.0, least=0.5),
        hopping=True,
    ),
    "hopper-flip": _variant(
        "hopper-hop", Hopper, lambda physics: _stands(physics) * _rise(_turn(physics), 5.0), hopping=True
    ),
    "hopper-flip_backward": _variant(
        "hopper-hop", Hopper, lambda physics: _stands(physics) * _rise(-_turn(physics), 5.0), hopping=True
    ),
    "point_mass_maze-reach_top_left": _maze(-0.15, 0.15),
    "point_mass_maze-reach_top_right": _maze(0.15, 0.15),
    "point_mass_maze-reach_bottom_left": _maze(-0.15, -0.15),
    "point_mass_maze-reach_bottom_right": _maze(0.15, -0.15),
    "quadruped-stand": _variant("quadruped-walk", Quadruped, _upright, desired_speed=0.0),
    "quadruped-jump": _variant(
        "quadruped-walk",
        Quadruped,
        lambda physics: _upright(physics) * _rise(physics.named.data.sensordata["center_of_mass"][2], 1.0, least=0.5),
        desired_speed=0.0,
    ),
    **{
        f"quadruped-{name}": _variant(
            "quadruped-walk",
            Quadruped,
            lambda physics, speed=speed: (
                _upright(physics) * _rise(np.linalg.norm(physics.torso_velocity()), speed, least=0.5)
            ),
            desired_speed=speed,
        )
        for name, speed in (("roll", 0.5), ("roll_fast", 5.0))
    },
    "walker-flip": _walker_flip,
}
