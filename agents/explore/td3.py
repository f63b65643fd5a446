"""The task's own reward instead of an intrinsic one: what is left behind is a learning history.

    r_t .. r_(t+n-1)    discounted and added up, as the replay has them

The learner is then TD3 as ExoRL has it (Fujimoto et al. 2018, arXiv 1802.09477; see `agents.td3`): two critics, noise
on the next action, and a policy that learns in every update.
"""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from agents.explore.bonus import Bonus, Transitions


class TaskReward(Bonus):
    """Pays what the task pays. It learns nothing."""

    def networks(self, rngs: nnx.Rngs) -> nnx.Module:
        return nnx.Module()

    def loss(self, networks: Any, batch: Transitions, key: Array) -> Array:
        return jnp.zeros(())

    def reward(self, networks: Any, memory: Any, batch: Transitions, key: Array) -> tuple[Float[Array, " B"], Any]:
        return batch.reward, memory
