"""The walker that turns: `walker-flip` (ExoRL) stays upright, `walker-spin` (TD-JEPA, metamotivo) does not have to."""

from dm_control.rl import control
from dm_control.suite import walker

from data.tasks.reward import Builder, OtherReward, rise, turn, variant

FLIP, SPIN = 5.0, 10.0


class WalkerFlip(walker.PlanarWalker):
    """`walker-flip`: walker-stand's reward, scaled by how fast the torso turns."""

    def get_reward(self, physics) -> float:
        """Returns up to 1, upright with an angular momentum of FLIP."""
        return super().get_reward(physics) * (5 * rise(turn(physics), FLIP) + 1) / 6


class WalkerSpin(OtherReward, walker.PlanarWalker):
    """`walker-spin`: paid for turning alone."""


def _flip() -> control.Environment:
    physics = walker.Physics.from_xml_string(*walker.get_model_and_assets())
    return control.Environment(physics, WalkerFlip(move_speed=0), time_limit=25, control_timestep=0.025)


BUILDERS: dict[str, Builder] = {
    "walker-flip": _flip,
    "walker-spin": variant("walker-stand", 25.0, WalkerSpin, lambda physics: rise(turn(physics), SPIN), move_speed=0),
}
