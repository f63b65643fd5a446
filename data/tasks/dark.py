"""Dark tasks: the goal is fixed for an episode and is not in the observation; only the reward depends on it.

The observation is position and velocity, so an agent can find the goal only from past rewards. This is the setting of
Algorithm Distillation's Dark Room (Laskin et al. 2022, arXiv 2210.14215) with dm_control's bodies. Each action is held
for several physics steps, so that an episode has only 16 actions and many whole episodes fit in a context.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float


@dataclass(frozen=True)
class PointMassDark:
    """dm_control's point mass starts in one corner of a square and looks for a goal anywhere in the square.

    A held action of 1 moves the mass at 0.1 m/s and an episode lasts 3.84 s, so every goal can be reached, distant ones
    late. A controller that is given the goal is rewarded for 7.5 of the 16 actions. A random waypoint meets a random
    goal one time in four. (docs/notebook.md discusses a start in the middle.)
    """

    name: str = "point_mass-dark"
    collected_on: str = "point_mass-dark"
    goal_size: int = 2
    sign_size: int = 0
    radius: float = 0.06
    action_steps: int = 12
    episode_steps: int = 16
    goal_reach: float = 0.18
    """Half the side of the square from which goals are drawn, metres. The walls stand at 0.29."""
    start_reach: float = 0.02
    """Half the side of the small square in the corner from which the start is drawn, metres."""

    def reward(self, physics: Float[np.ndarray, "... 4"], goal: Float[np.ndarray, "... 2"]) -> Float[np.ndarray, "..."]:
        """Returns 1 where the mass is within the radius of the goal and 0 elsewhere, float32."""
        return _within(physics[..., :2] - goal, self.radius)

    def hindsight_goal(self, physics: Float[np.ndarray, "... 4"]) -> Float[np.ndarray, "... 2"]:
        """Returns the position of the mass, float64."""
        return np.array(physics[..., :2], np.float64)

    def sample_goal(self, rng: np.random.Generator | np.random.RandomState) -> Float[np.ndarray, " 2"]:
        """Returns a goal drawn uniformly from the square of goals."""
        return rng.uniform(-self.goal_reach, self.goal_reach, 2)

    def sample_start(self, rng: np.random.RandomState) -> Float[np.ndarray, " 2"]:
        """Returns the start position of an episode; the mass starts at rest."""
        return -self.goal_reach + rng.uniform(-self.start_reach, self.start_reach, 2)

    def oracle(
        self, physics: Float[np.ndarray, "... 4"], goal: Float[np.ndarray, "... 2"]
    ) -> Float[np.ndarray, "... 2"]:
        """Returns the action of a proportional-derivative controller. Both components are scaled by one factor, so that
        the mass goes straight to the goal."""
        force = 20.0 * (goal - physics[..., :2]) - 4.0 * physics[..., 2:4]
        return (force / np.maximum(1.0, np.abs(force).max(-1, keepdims=True))).astype(np.float32)


@dataclass(frozen=True)
class ReacherDark:
    """dm_control's two-link arm starts with its elbow bent by about 90 degrees and looks for a goal for its finger."""

    name: str = "reacher-dark"
    collected_on: str = "reacher-dark"
    goal_size: int = 2
    sign_size: int = 0
    radius: float = 0.05
    action_steps: int = 4
    episode_steps: int = 16
    start_reach: float = 0.1
    """Half the range of both start angles around the start pose, radians."""

    def reward(self, physics: Float[np.ndarray, "... 4"], goal: Float[np.ndarray, "... 2"]) -> Float[np.ndarray, "..."]:
        """Returns 1 where the finger is within the radius of the goal and 0 elsewhere, float32."""
        return _within(self.hindsight_goal(physics) - goal, self.radius)

    def hindsight_goal(self, physics: Float[np.ndarray, "... 4"]) -> Float[np.ndarray, "... 2"]:
        """Returns the position of the finger in the plane (forward kinematics of the two 0.12 m links), float64."""
        shoulder = np.asarray(physics[..., 0], np.float64)
        elbow = shoulder + physics[..., 1]
        return _LINK * np.stack([np.cos(shoulder) + np.cos(elbow), np.sin(shoulder) + np.sin(elbow)], -1)

    def sample_goal(self, rng: np.random.Generator | np.random.RandomState) -> Float[np.ndarray, " 2"]:
        """Returns a goal as dm_control's reacher draws its target: any direction, 0.05 to 0.20 m from the shoulder."""
        angle, distance = rng.uniform(0.0, 2.0 * np.pi), rng.uniform(0.05, 0.20)
        return distance * np.array([np.sin(angle), np.cos(angle)])

    def sample_start(self, rng: np.random.RandomState) -> Float[np.ndarray, " 2"]:
        """Returns the two start angles of an episode, radians; the arm starts at rest."""
        return np.array([0.0, np.pi / 2]) + rng.uniform(-self.start_reach, self.start_reach, 2)

    def oracle(
        self, physics: Float[np.ndarray, "... 4"], goal: Float[np.ndarray, "... 2"]
    ) -> Float[np.ndarray, "... 2"]:
        """Returns the action of a proportional-derivative controller of the joint angles that put the finger on the
        goal. Of the two such poses it uses the one whose elbow bends as it does now.
        """
        distance = np.linalg.norm(goal, axis=-1)
        bend = 2.0 * np.arccos(np.clip(distance / (2 * _LINK), 0.0, 1.0)) * np.where(physics[..., 1] < 0, -1.0, 1.0)
        turn = np.arctan2(goal[..., 1], goal[..., 0]) - bend / 2 - physics[..., 0]
        turn = (turn + np.pi) % (2 * np.pi) - np.pi
        error = np.stack([turn, bend - physics[..., 1]], -1)
        return np.clip(1.0 * error - 0.25 * physics[..., 2:4], -1.0, 1.0).astype(np.float32)


_LINK = 0.12  # both links of dm_control's reacher.xml, metres


def _within(offset: Float[np.ndarray, "... 2"], radius: float) -> Float[np.ndarray, "..."]:
    return (offset[..., 0] ** 2 + offset[..., 1] ** 2 <= radius**2).astype(np.float32)
