"""The task's reward instead of an intrinsic one: the episodes are a learning history.

    r   = sum_{i<n} gamma^i r_{t+i}                     as in the replay

The learner is then TD3 as in ExoRL (Fujimoto et al. 2018, arXiv 1802.09477; see `agents.td3`): two critics, noise
on the next action, and a policy that learns in every update.
"""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from agents.explore.bonus import Bonus, Transitions


class TaskReward(Bonus):
    """Rewards what the task rewards, without training anything."""

    def networks(self, rngs: nnx.Rngs) -> nnx.Module:
        return nnx.Module()

    def loss(self, networks: Any, batch: Transitions, key: Array) -> Array:
        return jnp.zeros(())

    def reward(self, networks: Any, memory: Any, batch: Transitions, key: Array) -> tuple[Float[Array, " B"], Any]:
        return batch.reward, memory
