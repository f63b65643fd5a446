"""More walker tasks: `walker-flip` (ExoRL) rewards turning upright, `walker-spin` (TD-JEPA, metamotivo) any turning."""

from dm_control.rl import control
from dm_control.suite import walker

from data.tasks.reward import Builder, OtherReward, rise, turn, variant

FLIP, SPIN = 5.0, 10.0


class WalkerFlip(walker.PlanarWalker):
    """`walker-flip`: the reward of walker-stand, scaled by the angular momentum of the body."""

    def get_reward(self, physics) -> float:
        """Returns the reward: 1 if upright with an angular momentum of FLIP kg m^2/s, else less."""
        return super().get_reward(physics) * (5 * rise(turn(physics), FLIP) + 1) / 6


class WalkerSpin(OtherReward, walker.PlanarWalker):
    """`walker-spin`: the reward depends only on the angular momentum."""


def _flip() -> control.Environment:
    physics = walker.Physics.from_xml_string(*walker.get_model_and_assets())
    return control.Environment(physics, WalkerFlip(move_speed=0), time_limit=25, control_timestep=0.025)


BUILDERS: dict[str, Builder] = {
    "walker-flip": _flip,
    "walker-spin": variant("walker-stand", 25.0, WalkerSpin, lambda physics: rise(turn(physics), SPIN), move_speed=0),
}
