"""The training update: the initial state, and the jitted step."""

from collections.abc import Callable
from functools import partial

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from agents.agent import Agent, Batch
from agents.config import Config
from rlring.language_model import TrainState
from rlring.sharding import TOKENS, state_sharding


def new_state(agent: Agent, optimizer: optax.GradientTransformation, key: jax.Array) -> TrainState:
    """Returns the initial state: new weights, and the optimizer state."""
    weights = agent.init(key)
    return TrainState(weights, optimizer.init(weights))


def first_state(config: Config, agent: Agent, optimizer: optax.GradientTransformation, mesh: Mesh | None):
    """Returns the initial state on its devices, and its sharding (one for all arrays, or with FSDP a tree)."""

    init, key = partial(new_state, agent, optimizer), jax.random.key(config.seed)
    if mesh is not None and config.model.fsdp:  # no device and no host ever holds all of it
        sharding = state_sharding(jax.eval_shape(init, key), mesh, fsdp=True)
        return jax.jit(init, out_shardings=sharding)(key), sharding
    sharding = SingleDeviceSharding(jax.devices()[0]) if mesh is None else NamedSharding(mesh, P())
    weights = jax.device_put(jax.tree.map(np.asarray, agent.init(key)), sharding)
    return TrainState(weights, jax.jit(optimizer.init, out_shardings=sharding)(weights)), sharding


def _summed(differentiate: Callable, params, parts: Batch, batch: Batch):
    """Returns the metrics and the gradients of a batch, summed over its micro-batches `parts`."""

    def add(total, part):
        (_, metrics), gradients = differentiate(params, part, batch)
        return jax.tree.map(jax.numpy.add, total, (metrics, gradients)), None

    shapes = jax.eval_shape(lambda: differentiate(params, jax.tree.map(lambda x: x[0], parts), batch))
    zero = jax.tree.map(lambda x: jax.numpy.zeros(x.shape, x.dtype), (shapes[0][1], shapes[1]))
    return jax.lax.scan(add, zero, parts)[0]


def make_update(
    agent: Agent, optimizer: optax.GradientTransformation, mesh: Mesh | None = None, sharding=None, *, accumulate=1
):
    """Returns the jitted step `(TrainState, batch) -> (TrainState, metrics)`, which donates the old state.

    accumulate: number of micro-batches; their gradients add up to those of the whole batch. sharding: sharding of the
    state, as returned by `first_state`.
    """
    differentiate = jax.value_and_grad(agent.loss, has_aux=True)

    def in_parts(x: jax.Array) -> jax.Array:
        # Every micro-batch has rows on each device.
        x = x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1)
        return x if mesh is None else jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(None, *TOKENS)))

    def update(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        if accumulate == 1:
            (_, metrics), gradients = differentiate(state.weights, batch)
        else:
            metrics, gradients = _summed(differentiate, state.weights, jax.tree.map(in_parts, batch), batch)
        state = state.updated(optimizer, gradients)
        norms = {
            "gradient/global_norm": optax.tree.norm(gradients),
            "weights/global_norm": optax.tree.norm(state.weights),
        }
        return state, metrics | norms

    if mesh is None or sharding is None:
        return jax.jit(update, donate_argnums=0)
    return jax.jit(update, donate_argnums=0, out_shardings=(sharding, NamedSharding(mesh, P())))
