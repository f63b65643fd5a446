"""Proto-RL (Yarats et al. 2021, arXiv 2102.11271): the distance to examples of learnt prototypes.

    z       = f(s) / |f(s)|,    t = f'(s') / |f'(s')|
    p       = softmax(C g(f(s)) / |g(f(s))| / temperature)      C: the prototypes, vectors of length 1
    q       = sinkhorn(C t / temperature)                       all prototypes get equal shares of the states
    L       = - mean sum_c q_c log p_c
    f'      <- f' + rate (f - f')
    queue   <- for each prototype c, a state of the batch drawn with softmax(C_c z')
    r       = distance of z' to its k-th nearest neighbour in the queue

z' is z of s'. k is the setting `neighbour`. As in URLB, there is no encoder before f, since observations are states and
not pixels.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int
from pydantic import model_validator

from agents.explore.bonus import Bonus, Transitions, directions
from agents.explore.networks import MLP, linear
from agents.explore.particles import neighbours
from agents.section import Chance, Positive, Section, Size


class ProtoSettings(Section):
    representation: Size = 128
    """Size of f(s)."""
    projection: Size = 512
    """Hidden units of g."""
    prototypes: Size = 512
    queue: Size = 2048
    """Number of states in the queue. Every update replaces `prototypes` of them."""
    neighbour: Size = 3
    temperature: Positive = 0.1
    target_rate: Chance = 0.05

    @model_validator(mode="after")
    def the_queue_holds_whole_updates(self) -> "ProtoSettings":
        if self.queue % self.prototypes or self.neighbour > self.queue:
            raise ValueError(
                f"a queue holds a multiple of the prototypes, and as many as the neighbour is far; got queue="
                f"{self.queue}, prototypes={self.prototypes}, neighbour={self.neighbour}"
            )
        return self


class Queue(NamedTuple):
    states: Float[Array, "N U"]
    next: Int[Array, ""]


class Networks(nnx.Module):
    def __init__(self, observation: int, settings: ProtoSettings, *, rngs: nnx.Rngs):
        size = settings.representation
        self.predictor = linear(observation, size, rngs=rngs)
        self.target = linear(observation, size, rngs=rngs)
        self.target.kernel[...] = self.predictor.kernel[...]
        self.projector = MLP((size, settings.projection, size), rngs=rngs)
        self.prototypes = linear(size, settings.prototypes, use_bias=False, rngs=rngs)
        self.prototypes.kernel[...] = directions(self.prototypes.kernel[...].T).T


class Proto(Bonus):
    """Rewards the distance to examples of prototypes. Settings: `proto`."""

    def networks(self, rngs: nnx.Rngs) -> nnx.Module:
        return Networks(self.sizes.observation, self.settings, rngs=rngs)

    def initial_memory(self) -> Queue:
        states = jnp.zeros((self.settings.queue, self.settings.representation))
        return Queue(states, jnp.zeros((), jnp.int32))

    def loss(self, networks: Any, batch: Transitions, key: Array) -> Array:
        projected = directions(networks.projector(networks.predictor(batch.observation)))
        log_p = jax.nn.log_softmax(networks.prototypes(projected) / self.settings.temperature, axis=-1)
        scores = networks.prototypes(directions(networks.target(batch.next_observation)))
        q = jax.lax.stop_gradient(sinkhorn(scores / self.settings.temperature))
        return -(q * log_p).sum(axis=-1).mean()

    def after_update(self, networks: Any) -> None:
        networks.prototypes.kernel[...] = directions(networks.prototypes.kernel[...].T).T
        rate = self.settings.target_rate
        for name in ("kernel", "bias"):
            now, target = getattr(networks.predictor, name), getattr(networks.target, name)
            target[...] = target[...] + rate * (now[...] - target[...])

    def reward(self, networks: Any, memory: Queue, batch: Transitions, key: Array) -> tuple[Array, Queue]:
        z = directions(networks.predictor(batch.next_observation))
        chosen = jax.random.categorical(key, networks.prototypes(z).T, axis=-1)
        states = jax.lax.dynamic_update_slice_in_dim(memory.states, z[chosen], memory.next, axis=0)
        queue = Queue(states, (memory.next + len(chosen)) % len(states))
        return neighbours(z, states, self.settings.neighbour)[:, -1], queue


def sinkhorn(scores: Float[Array, "B C"]) -> Float[Array, "B C"]:
    """Returns soft assignments of B states to C prototypes by their scores. Rows sum to 1, and all columns have about
    the same sum (Cuturi 2013; three rounds of Sinkhorn and Knopp's normalisation of columns and rows)."""
    q = jnp.exp(scores - scores.max())
    rows, columns = scores.shape
    for _ in range(3):
        q = q / (q.sum(axis=0, keepdims=True) * columns)
        q = q / (q.sum(axis=1, keepdims=True) * rows)
    return q / q.sum(axis=1, keepdims=True)
