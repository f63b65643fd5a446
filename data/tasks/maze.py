"""The point mass in a maze: ExoRL's tasks `point_mass_maze-...` and TD-JEPA's tasks `pointmass-...`.

Both use one arena: the suite's, with contacts, and walls in the shape of a cross that make four rooms. An episode
starts in the top left room. Both domains have `loop`, `square` and `fast_slow` (from TD-JEPA and metamotivo). Their
four `reach_...` tasks differ: the reward margin around the target is six times as wide in TD-JEPA as in ExoRL. TD-JEPA
adds `reach_bottom_left_long`, whose target must be reached the long way round.
"""

from collections.abc import Iterable
from functools import partial
from xml.etree import ElementTree

import numpy as np
from dm_control import mujoco
from dm_control.rl import control
from dm_control.suite import point_mass
from dm_control.utils import rewards

from data.tasks.reward import Builder, OtherReward, Reward

SIZE = 0.015  # radius of a target, metres
ROOMS = {
    "top_left": (-0.15, 0.15),
    "top_right": (0.15, 0.15),
    "bottom_left": (-0.15, -0.15),
    "bottom_right": (0.15, -0.15),
}
_NOWHERE = (-1.0, -1.0)


class PointMassMaze(OtherReward, point_mass.PointMass):
    """The suite's point mass, started in the top left room, with another reward."""

    def initialize_episode(self, physics) -> None:
        """Draws the start position from the task's random stream, so that the seed determines it. (ExoRL's code draws
        from NumPy's global stream.)"""
        super().initialize_episode(physics)
        physics.data.qpos[:] = self.random.uniform((-0.29, 0.15), (-0.15, 0.29))


def reach(physics: point_mass.Physics, margin: float) -> float:
    """Returns a reward of 1 at the target and 0.1 at one margin from its edge; large actions cost up to a fifth."""
    small = rewards.tolerance(physics.control(), margin=1, value_at_margin=0, sigmoid="quadratic").mean(axis=0)
    return rewards.tolerance(physics.mass_to_target_dist(), (0, SIZE), margin=margin) * (4 + small) / 5


def loop(physics: mujoco.Physics) -> float:
    """Rewards following the diamond |x| + |y| = 0.24 m clockwise, at 0.06 to 0.1 m/s in x and in y."""
    x, y = physics.position()
    vx, vy = physics.velocity()
    distance = abs(abs(x) + abs(y) - 0.24) / np.sqrt(2)
    speeds = (vx if y >= 0 else -vx), (vy if x <= 0 else -vy)
    near = _linear(distance, (0, 0.02), 0.02)
    return (near + sum(_linear(speed, (0.06, 0.1), 0.01) for speed in speeds)) / 3


def square(physics: mujoco.Physics) -> float:
    """Rewards moving clockwise along a wall, over 0.2 m from the middle: 1 at 0.1 m/s and above, 0 in corners."""
    return _along_one_wall(10 * np.clip(speed, 0, 0.1) for place, speed in _walls(physics) if place > 0.2)


def fast_slow(physics: mujoco.Physics) -> float:
    """Rewards moving anticlockwise at 0.2 to 0.28 m from the middle: at 0.09 to 0.1 m/s along the left and right walls,
    at 0.04 to 0.05 m/s along the other walls; 0 in corners."""
    bounds = ((0.04, 0.05), (0.09, 0.1), (0.09, 0.1), (0.04, 0.05))
    return _along_one_wall(
        _linear(-speed, bound, 0.01)
        for (place, speed), bound in zip(_walls(physics), bounds, strict=True)
        if 0.2 < place < 0.28
    )


def reach_long(physics: point_mass.Physics) -> float:
    """Returns the reward of `reach` near the target. Far from it, rewards moving clockwise along a wall, with a penalty
    20 times as large for moving anticlockwise."""
    there = reach(physics, 6 * SIZE)
    if there >= 0.01:
        return there
    return _along_one_wall(
        np.clip(speed, -0.1, 0.1) * (5 if speed >= 0 else 100) for place, speed in _walls(physics) if place > 0.15
    )


def _walls(physics: mujoco.Physics) -> tuple[tuple[float, float], ...]:
    """Returns, for the top, right, left and bottom wall, the mass's distance from the middle towards the wall (m) and
    its clockwise speed along the wall (m/s)."""
    x, y = physics.position()
    vx, vy = physics.velocity()
    return (y, vx), (x, -vy), (-x, vy), (-y, -vx)


def _along_one_wall(paid: Iterable[float]) -> float:
    present = list(paid)
    return float(present[0]) if len(present) == 1 else 0.0


def _linear(value: float, bounds: tuple[float, float], margin: float) -> float:
    return rewards.tolerance(value, bounds, margin=margin, value_at_margin=0, sigmoid="linear")


def _maze(reward: Reward, target: tuple[float, float] = _NOWHERE) -> Builder:
    """Returns a builder of the maze with its target at `target`: the suite's arena with contacts and a cross of
    walls."""

    def build() -> control.Environment:
        xml, assets = point_mass.get_model_and_assets()
        model = ElementTree.fromstring(xml)
        option, world = model.find("option"), model.find("worldbody")
        option.remove(option.find("flag"))
        for axis, size in (("0 1 0", ".18 .02 .02"), ("1 0 0", ".02 .18 .02")):
            ElementTree.SubElement(world, "geom", type="box", pos="0 0 .02", zaxis=axis, size=size, material="site")
        place = f"{target[0]} {target[1]} .01"
        world.find("geom[@name='target']").attrib.update(pos=place, contype="0", conaffinity="0")
        physics = point_mass.Physics.from_xml_string(ElementTree.tostring(model), assets)
        return control.Environment(physics, PointMassMaze(reward, randomize_gains=False), time_limit=20)

    return build


BUILDERS: dict[str, Builder] = {
    **{
        f"{domain}-reach_{room}": _maze(partial(reach, margin=margin), target)
        for domain, margin in (("point_mass_maze", SIZE), ("pointmass", 6 * SIZE))
        for room, target in ROOMS.items()
    },
    **{
        f"{domain}-{reward.__name__}": _maze(reward)
        for domain in ("point_mass_maze", "pointmass")
        for reward in (loop, square, fast_slow)
    },
    "pointmass-reach_bottom_left_long": _maze(reach_long, ROOMS["bottom_left"]),
}
