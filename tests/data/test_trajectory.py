import numpy as np
import pytest

from data import DataError, Trajectory


def arrays(steps=3):
    return {
        "observation": np.zeros((steps + 1, 2)),
        "action": np.zeros((steps, 1)),
        "reward": np.arange(steps),
        "discount": np.ones(steps),
        "physics": np.zeros((steps + 1, 4)),
    }


def test_keeps_float32_and_physics_float64():
    trajectory = Trajectory(**arrays())
    assert [getattr(trajectory, name).dtype for name in ("observation", "action", "reward", "discount", "physics")] == [
        *[np.float32] * 4,
        np.float64,
    ]
    assert trajectory.length == 3
    assert trajectory.total_reward == 3.0


def test_return_is_summed_in_float64():
    reward = np.full(3, 0.1, np.float32)
    reward[0] = 2**24
    assert Trajectory(**{**arrays(), "reward": reward}).total_reward == 2**24 + 2 * float(np.float32(0.1))


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("observation", (3, 2), r"observation has shape \(3, 2\); expected \(4, O\), because there are 3 actions"),
        ("observation", (4,), r"observation has shape \(4,\); expected \(4, O\)"),
        ("action", (3,), r"action has shape \(3,\); expected \(3, A\)"),
        ("reward", (4,), r"reward has shape \(4,\); expected \(3,\)"),
        ("reward", (3, 1), r"reward has shape \(3, 1\); expected \(3,\)"),
        ("discount", (2,), r"discount has shape \(2,\); expected \(3,\)"),
        ("physics", (3, 4), r"physics has shape \(3, 4\); expected \(4, P\)"),
        ("action", (0, 1), "an episode needs at least one step; got"),
    ],
)
def test_wrong_shape(name, shape, message):
    with pytest.raises(DataError, match=f"tape 7: {message}"):
        Trajectory(**{**arrays(), name: np.zeros(shape)}, source="tape 7")


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e300])
def test_not_finite(bad):
    observation = np.zeros((4, 2))
    observation[2, 1] = bad
    with pytest.raises(DataError, match=r"observation\[2, 1\] is (nan|inf); every value must be finite"):
        Trajectory(**{**arrays(), "observation": observation})


def test_not_numbers():
    with pytest.raises(DataError, match="reward must be real numbers; got dtype <U1"):
        Trajectory(**{**arrays(), "reward": np.array(["a", "b", "c"])})


def test_extras_need_a_row_per_observation():
    Trajectory(**arrays(), extras={"skill": np.zeros((4, 16))})
    with pytest.raises(DataError, match=r"extras\['skill'\] needs a row per observation \(4\); got shape \(3, 16\)"):
        Trajectory(**arrays(), extras={"skill": np.zeros((3, 16))})
