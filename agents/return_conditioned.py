"""The base class of the return-conditioned agents: timesteps become tokens, a causal Transformer reads them, and a head
predicts a distribution over actions. Each subclass defines its training data and its loss."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Int

from agents.agent import Params, Scales, Timesteps
from agents.config import Config
from agents.gaussian import Distribution
from agents.mixture import action_head
from agents.optimizer import make_optimizer
from agents.tokens import ROPE_FRACTION, TOKENS_PER_TIMESTEP, Tokenizer
from data import ChainBatch
from rlring import AttentionConfig, KVCache, Mask, Transformer, zigzag_order
from rlring.sharding import SMALLEST_SPLIT, STACKED, gathered

SHORTEST_ZIGZAG = 256  # tokens per device; for fewer, zigzag was measured 1.35x slower than the natural order


class Network(nnx.Module):
    """Tokenizer, Transformer and action head."""

    def __init__(
        self, config: Config, scales: Scales, action_size: int, episode_steps: int, attention: AttentionConfig, *, rngs
    ):
        model = config.model
        self.tokenizer = Tokenizer(
            config.agent.tokens,
            scales,
            action_size=action_size,
            width=model.width,
            episode_steps=episode_steps,
            rngs=rngs,
        )
        rope_fraction = ROPE_FRACTION[config.agent.tokens]
        shape = model.transformer_config(rope_fraction=rope_fraction, attention=attention)
        self.transformer = Transformer(shape, rngs=rngs)
        self.head = action_head(model.width, action_size, config.agent.mixture, rngs=rngs)


class Memory(NamedTuple):
    """The memory of an acting agent."""

    cache: KVCache
    position: Int[Array, ""]
    """Index of the next timestep in its chain."""


class ReturnConditionedAgent:
    """A sequence model of actions, conditioned on returns to go (Chen et al. 2021, Decision Transformer)."""

    context = True

    def __init__(self, config: Config, scales: Scales, action_size: int, episode_steps: int, mesh: Mesh | None):
        self.config = config
        self.mesh = mesh
        self.action_size = action_size
        self.longest_episode: int = episode_steps  # every step index has a learnt embedding
        self.observation_size = len(scales.observation_mean)
        self.shards = 1 if mesh is None else mesh.shape["ring"] * mesh.shape["ulysses"]
        self.scales = scales
        self.graph = nnx.split(nnx.eval_shape(self.network, jax.random.key(0)))[0]

    def network(self, key: Array) -> nnx.Module:
        """Returns the network with newly initialised weights."""
        attention = self.config.attention.attention_config(sharded=self.mesh is not None and self.mesh.size > 1)
        return Network(self.config, self.scales, self.action_size, self.longest_episode, attention, rngs=nnx.Rngs(key))

    @property
    def tokens_per_timestep(self) -> int:
        return TOKENS_PER_TIMESTEP[self.config.agent.tokens]

    @property
    def window(self) -> int | None:
        """Number of tokens that a token attends to, itself included. None: all earlier ones."""
        steps = self.config.agent.window
        return None if steps is None else steps * self.tokens_per_timestep

    def visible_inputs(self, timesteps: Timesteps) -> Timesteps:
        """Returns the timesteps as the agent sees them; subclasses may hide fields."""
        return timesteps

    def init(self, key: Array) -> Params:
        return jax.jit(lambda key: nnx.split(self.network(key))[1])(key)

    def optimizer(self) -> optax.GradientTransformation:
        return make_optimizer(self.config)

    def timestep_order(self, timesteps: int) -> np.ndarray | None:
        """Returns the timestep index at each place of the batch (-1: padding), such that the ring's work is balanced.
        None: the natural order, without padding.

        Short shards keep the natural order: each is a single attention block, of which nothing could be skipped.
        """
        ring = 1 if self.mesh is None else self.mesh.shape["ring"]
        balances = ring > 1 and timesteps * self.tokens_per_timestep >= ring * SHORTEST_ZIGZAG
        multiple = 2 * self.shards if balances else self.shards
        length = -(-timesteps // multiple) * multiple
        if length == timesteps and not balances:
            return None
        order = zigzag_order(length, ring) if balances else np.arange(length)
        return np.where(order < timesteps, order, -1)

    def features(self, params: Params, batch: ChainBatch) -> Distribution:
        """Returns the action distribution at every timestep of a batch, [B, M]."""
        network = nnx.merge(self.graph, self._whole(params))
        x, position, segment = network.tokenizer(self.visible_inputs(Timesteps.from_batch(batch)))
        mask = Mask.causal(position, segment, window=self.window)
        y = network.transformer(x, mask, mesh=self.mesh)
        return network.head(network.tokenizer.action_features(y))

    def _whole(self, params: Params) -> Params:
        """Returns the weights gathered from their FSDP shards, except those of the blocks, which gather their own."""
        if self.mesh is None or not self.config.model.fsdp:
            return params

        def one(path, weight):
            is_stacked = STACKED in jax.tree_util.keystr(path)
            return weight if is_stacked else gathered(weight, self.mesh, jnp.float32, smallest=SMALLEST_SPLIT)

        return jax.tree_util.tree_map_with_path(one, params)

    def start(self, params: Params, prompt: ChainBatch, steps: int) -> Memory:
        """Returns the memory after a prompt (ordered by `timestep_order`, or empty) with room for `steps` timesteps."""
        network = nnx.merge(self.graph, params)
        transformer, k = network.transformer, self.tokens_per_timestep
        if self.config.agent.window is not None and prompt.position.shape[1] == 0:
            steps = min(steps, self.config.agent.window + 1)  # old slots are overwritten: memory is bounded
        x, position, segment = network.tokenizer(self.visible_inputs(Timesteps.from_batch(prompt)))
        next_position = jnp.max(jnp.where(prompt.segment >= 0, prompt.position, -1), initial=-1) + 1
        multiple = k * self.shards
        capacity = -(-(x.shape[1] + steps * k) // multiple) * multiple
        if x.shape[1]:
            mask = Mask.causal(position, segment, window=self.window)
            _, cache = transformer.prefill(x, mask, capacity=capacity, mesh=self.mesh)
        else:
            cache = transformer.empty_cache(x.shape[0], capacity=capacity, mesh=self.mesh)
        return Memory(cache, next_position.astype(jnp.int32))

    def act(self, params: Params, memory: Memory, now: Timesteps, key: Array | None) -> tuple[Array, Memory]:
        network = nnx.merge(self.graph, params)
        x, position, segment = network.tokenizer(self.visible_inputs(now.at(memory.position)))
        y, cache = network.transformer.decode(
            x, position, segment, memory.cache, window=self.window, mesh=self.mesh if self.shards > 1 else None
        )
        policy = network.head(network.tokenizer.action_features(y)[:, 0])
        return policy.act(key), Memory(cache, memory.position + 1)
