"""The Transformer: pre-norm blocks scanned over layers, rotary positions, attention over a sharded sequence."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Int

from rlring.attention import Mask, attention
from rlring.attention.blocks import pad
from rlring.attention.checks import check_batch
from rlring.attention.mask import checked
from rlring.cache import KeyValue, KVCache
from rlring.errors import UsageError
from rlring.feed_forward import ACTIVATIONS, feed_forward, rms_norm
from rlring.positions import LEARNT_AT, log_keys, rotate
from rlring.remat import BLOCK_INPUT, checkpointed
from rlring.sharding import gathered
from rlring.transformer_config import Layer, TransformerConfig


class Block(nnx.Module):
    """One layer: attention, then a gated feed-forward, each added to the residual stream."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        D, N, K, H, F = config.sizes
        self.config = config

        def weight(shape: tuple[int, ...], fan_in: int, scale: float = 1.0) -> nnx.Param:
            initial = jax.random.truncated_normal(rngs.params(), -2, 2, shape, jnp.float32)
            return nnx.Param(initial * (scale / fan_in**0.5))

        residual = (2 * config.layers) ** -0.5  # the residual stream sums 2 L outputs
        self.attention_norm = nnx.Param(jnp.ones(D))
        self.query = weight((D, N, H), D)
        self.key = weight((D, K, H), D)
        self.value = weight((D, K, H), D)
        if config.qk_norm:
            self.query_norm, self.key_norm = nnx.Param(jnp.ones(H)), nnx.Param(jnp.ones(H))
        if config.log_scaling:
            self.sharpness = nnx.Param(jnp.full(N, 1 / math.log(LEARNT_AT)))
        self.output = weight((N, H, D), N * H, residual)
        self.feed_forward_norm = nnx.Param(jnp.ones(D))
        self.gate = weight((D, F), D)
        self.up = weight((D, F), D)
        self.down = weight((F, D), F, residual)

    def project(
        self, x: Float[Array, "B T D"], mask: Mask, rope_fraction: float | None = None
    ) -> tuple[Array, Array, Array]:
        """Returns queries [B, T, N, H], keys and values [B, T, K, H] of `x`, with rotary positions in queries and keys.

        If rope_fraction is None, it is that of the config.
        """
        position = mask.q_position
        with jax.named_scope("project"):
            normal = rms_norm(x, self.attention_norm[...])
            q_BTNH = jnp.einsum("btd,dnh->btnh", normal, self.query[...].astype(x.dtype))
            k_BTKH = jnp.einsum("btd,dkh->btkh", normal, self.key[...].astype(x.dtype))
            v_BTKH = jnp.einsum("btd,dkh->btkh", normal, self.value[...].astype(x.dtype))
            if self.config.qk_norm:
                q_BTNH, k_BTKH = rms_norm(q_BTNH, self.query_norm[...]), rms_norm(k_BTKH, self.key_norm[...])
            if self.config.log_scaling:
                scale = self.sharpness[...][None, None, :, None] * log_keys(position, mask.reach[0])
                q_BTNH = (q_BTNH.astype(jnp.float32) * scale).astype(x.dtype)
            base, fraction = self.config.rope_base, rope_fraction
            if fraction is None:
                fraction = self.config.rope_fraction
            return rotate(q_BTNH, position, base, fraction), rotate(k_BTKH, position, base, fraction), v_BTKH

    def finish(self, x: Float[Array, "B T D"], attended: Float[Array, "B T N H"], mesh: Mesh | None) -> Array:
        """Returns the block's output [B, T, D] from its input `x` and the output `attended` of attention."""
        with jax.named_scope("output"):
            x = x + jnp.einsum("btnh,nhd->btd", attended, self.output[...].astype(x.dtype))
        with jax.named_scope("feed_forward"):
            weights = (self.feed_forward_norm[...], self.gate[...], self.up[...], self.down[...])
            return x + feed_forward(x, weights, tile=self.config.feed_forward_tile, mesh=mesh)


class Transformer(nnx.Module):
    """Maps embedded tokens [B, T, D] to features [B, T, D]; each token attends to the tokens that the mask shows it.

    The tokens may be in any order (zigzag for a balanced ring), because positions and segments are in the mask. On a
    mesh the batch is split over "data" and the sequence over ("ring", "ulysses"); if the devices do not divide the
    length, it is padded inside.

    Raises:
        UsageError: a mask that does not fit x, or a batch that mesh.data does not divide.
    """

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        self.config = config

        @nnx.split_rngs(splits=config.layers)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def stacked_blocks(rngs: nnx.Rngs) -> Block:
            return Block(config, rngs=rngs)

        self.blocks = stacked_blocks(rngs)
        self.norm = nnx.Param(jnp.ones(config.width))

    def __call__(self, x: Float[Array, "B T D"], mask: Mask, *, mesh: Mesh | None = None) -> Float[Array, "B T D"]:
        """Returns the features of every token, in the config's compute_type."""
        x, _ = self._scan(x, mask, mesh, keep=False)
        return x

    def prefill(
        self, x: Float[Array, "B T D"], mask: Mask, *, capacity: int, mesh: Mesh | None = None
    ) -> tuple[Float[Array, "B T D"], KVCache]:
        """Returns the features of a prompt, and a cache for `capacity` tokens that holds the prompt."""
        mask = checked(mask, x.shape[:2], x.shape[:2])
        cache = self.empty_cache(x.shape[0], capacity=capacity, mesh=mesh)
        x, kept = self._scan(x, mask, mesh, keep=True)
        return x, cache.with_prompt(kept, mask, mesh=mesh)

    def empty_cache(self, batch: int, *, capacity: int, mesh: Mesh | None = None) -> KVCache:
        """Returns an empty cache for `capacity` tokens in each of `batch` rows."""
        _, _, K, H, _ = self.config.sizes
        patterns = [layer.attention.sparse for layer in self.config.layer_group()]
        return KVCache.empty(
            batch,
            capacity=capacity,
            patterns=patterns * (self.config.layers // len(patterns)),
            kv_heads=K,
            head_size=H,
            dtype=self.config.compute_type,
            mesh=mesh,
        )

    def decode(
        self,
        x: Float[Array, "B T D"],
        position: Int[Array, "B T"],
        segment: Int[Array, "B T"],
        cache: KVCache,
        *,
        window: int | None = None,
        mask: Mask | None = None,
        mesh: Mesh | None = None,
    ) -> tuple[Float[Array, "B T D"], KVCache]:
        """Returns the features of a few new tokens, and the cache with these tokens added. The new tokens see the cache
        and each other.

        Args:
            mask: a mask whose rule is applied to the new tokens, such as the mask of the prompt. None: causal, with
                `window`.

        Raises:
            UsageError: more tokens than the cache takes in one step, both a window and a mask, or positions and
                segments that do not fit x.
        """
        cache.check(position.shape[1])
        if mask is not None and window is not None:
            raise UsageError(f"the window of new tokens is that of their mask; got window={window} beside mask.")
        now = Mask.causal(position, segment, window) if mask is None else mask.at(position, segment)
        now = checked(now, x.shape[:2], x.shape[:2])
        x, held = x.astype(self.config.compute_type), []
        if x.size == 0:
            return x, cache
        graph, blocks = nnx.split(self.blocks)
        group = self.config.layer_group(mesh)
        for layer in range(self.config.layers):  # a loop, not a scan: XLA would copy the cache as an input of a scan
            # The index adds 0, computed from x, so that slicing the layer's weights waits for x. Otherwise XLA slices
            # the weights of all layers at once, which copies the model. A barrier does not prevent that (jax 0.10).
            index = layer + (jnp.signbit(x[0, 0, 0]).astype(jnp.int32) >> 1)
            block = nnx.merge(graph, at(blocks, index))
            how = group[layer % len(group)]
            seen = how.mask(now)
            q, k, v = block.project(x, seen, how.rope_fraction)
            attended, key_value = cache.attend(layer, q, k, v, seen, mesh=mesh)
            x = block.finish(x, attended, mesh=None)
            held.append(key_value)
        return rms_norm(x, self.norm[...]), cache.with_tokens(held, now, mesh=mesh)

    def _scan(self, x: Array, mask: Mask, mesh: Mesh | None, *, keep: bool) -> tuple[Array, list[KeyValue]]:
        """Returns the features and, with `keep`, the keys and values of each layer."""
        config, layers = self.config, self.config.layer_group(mesh)
        mask, length = checked(mask, x.shape[:2], x.shape[:2]), x.shape[1]
        if mesh is not None:
            check_batch(x.shape[0], mesh)
            padded = length + -length % (mesh.shape["ring"] * mesh.shape["ulysses"])
            x, mask = pad(x, 1, padded), mask.padded(padded, padded)
        graph, blocks = nnx.split(self.blocks)
        fsdp = config.fsdp and mesh is not None

        def layer(x, params, how: Layer):
            x = checkpoint_name(x, BLOCK_INPUT)
            block = nnx.merge(graph, gathered(params, mesh, x.dtype) if fsdp else params)
            seen = how.mask(mask)
            q, k, v = block.project(x, seen, how.rope_fraction)
            with jax.named_scope("attention"):
                attended = attention(q, k, v, seen, config=how.attention, mesh=mesh)
            kept = (k[:, :length], v[:, :length]) if keep else None
            return constrain(block.finish(x, attended, mesh), mesh), kept

        device = None if mesh is None else mesh.devices.flat[0]
        layer = checkpointed(layer, config.remat, fsdp=fsdp, device=device, static_argnums=2)

        def group(x, params):
            kept = []
            for i, how in enumerate(layers):
                x, key_value = layer(x, at(params, i), how)
                kept.append(key_value)
            return x, kept

        groups = jax.tree.map(lambda p: p.reshape(-1, len(layers), *p.shape[1:]), blocks)
        x, kept = jax.lax.scan(group, constrain(x.astype(config.compute_type), mesh), groups)
        x = rms_norm(x[:, :length], self.norm[...])
        if not keep:
            return x, []
        # kept: for each layer of a group, the stacked keys and values of all groups.
        return x, [at(pair, n) for n in range(config.layers // len(layers)) for pair in kept]


def at(stacked, index: Int[Array, ""] | int):
    """Returns entry `index` of every array in a tree of stacked arrays."""
    return jax.tree.map(lambda x: x[index], stacked)


def constrain(x: Float[Array, "B T D"], mesh: Mesh | None) -> Array:
    """Returns `x` with the sharding of activations; without a mesh, `x` itself."""
    return x if mesh is None else jax.lax.with_sharding_constraint(x, NamedSharding(mesh, ACTIVATIONS))
