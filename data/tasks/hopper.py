"""More hopper tasks: `hopper-hop_backward`, `hopper-flip`, `hopper-flip_backward`."""

from dm_control.suite import hopper
from dm_control.utils import rewards

from data.tasks.reward import Builder, OtherReward, Reward, rise, turn, variant

SPEED = 2.0  # m/s
SPIN = 5.0


class Hopper(OtherReward, hopper.Hopper):
    """The suite's hopper with another reward."""


def _stands(physics: hopper.Physics) -> float:
    return rewards.tolerance(physics.height(), (0.6, 2.0))


def _task(reward: Reward) -> Builder:
    return variant("hopper-hop", 20.0, Hopper, reward, hopping=True)


BUILDERS: dict[str, Builder] = {
    "hopper-hop_backward": _task(
        lambda physics: _stands(physics) * rise(-physics.speed(), SPEED, margin=SPEED / 2, least=0.5)
    ),
    "hopper-flip": _task(lambda physics: _stands(physics) * rise(turn(physics), SPIN)),
    "hopper-flip_backward": _task(lambda physics: _stands(physics) * rise(-turn(physics), SPIN)),
}
