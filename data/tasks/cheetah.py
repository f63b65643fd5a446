"""More cheetah tasks: `cheetah-walk`, `-walk_backward`, `-run_backward`, `-flip`, `-flip_backward`."""

from dm_control.suite import cheetah

from data.tasks.reward import Builder, OtherReward, Reward, rise, turn, variant

WALK, RUN = 2.0, 10.0  # m/s
SPIN = 5.0


class Cheetah(OtherReward, cheetah.Cheetah):
    """The suite's cheetah with another reward."""


def _task(reward: Reward) -> Builder:
    return variant("cheetah-run", 10.0, Cheetah, reward)


BUILDERS: dict[str, Builder] = {
    "cheetah-walk": _task(lambda physics: rise(physics.speed(), WALK)),
    "cheetah-walk_backward": _task(lambda physics: rise(-physics.speed(), WALK)),
    "cheetah-run_backward": _task(lambda physics: rise(-physics.speed(), RUN)),
    "cheetah-flip": _task(lambda physics: rise(turn(physics), SPIN)),
    "cheetah-flip_backward": _task(lambda physics: rise(-turn(physics), SPIN)),
}
