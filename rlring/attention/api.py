"""attention() checks the arguments, chooses the scheme and runs it on every shard of the mesh."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from rlring.attention.axes import DEFAULT, MeshAxes, index_of, size_of, split_explicitly, varying_alike, with_places
from rlring.attention.blocks import pad
from rlring.attention.checks import (
    check_arrays,
    check_blocks,
    check_kinds,
    check_scheme,
    check_split,
    check_whole,
    checked_mod,
    of_nothing,
    seeds,
)
from rlring.attention.choose import choose_scheme
from rlring.attention.kernels import platform_of
from rlring.attention.mask import Mask
from rlring.attention.schemes import SCHEMES, AttentionConfig, Setting
from rlring.attention.score_mod import ScoreMod
from rlring.attention.sparse_pattern import check_mask
from rlring.errors import UsageError

Dropout = tuple[float, Array]


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    mask: Mask,
    *,
    config: AttentionConfig,
    mesh: Mesh | None = None,
    axes: MeshAxes = DEFAULT,
    scale: float | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, "N"] | None = None,
    bias: Float[Array, "N"] | Float[Array, "N T S"] | None = None,
    dropout: Dropout | None = None,
    return_lse: bool = False,
) -> Float[Array, "B T N V"] | tuple[Float[Array, "B T N V"], Float[Array, "B T N"]]:
    """Returns softmax(q k^T / sqrt(H)) v over the keys that the mask shows, in q's type.

    Arrays are global. On a mesh B is split over axes.batch, N and K over axes.heads, and both T and S over
    (axes.ring, axes.ulysses); if the devices do not divide T or S, they are padded inside. Without a mesh everything
    runs on one device. With N > K each key/value head serves N // K neighbouring query heads. A query that sees no key
    gives 0, and its gradient is 0. B, T and S may be 0.

    Args:
        scale: replaces 1 / sqrt(H).
        soft_cap: logits become cap * tanh(logits / cap) (Gemma 2, 2408.00118).
        sinks: the logit of one more key for each head, whose value is 0 (gpt-oss); counted once on any mesh.
        bias: [N, T, S] is added to the logits, the same for all sequences. [N] are slopes of ALiBi (2108.12409):
            slope * |q_position - k_position| is subtracted from the logits.
        dropout: (rate, key of jax.random). This share of the weights becomes 0, and the others are multiplied by
            1 / (1 - rate). The same weights are dropped on any mesh.
        return_lse: returns (out, lse) with lse[B, T, N], the log-sum-exps of the logits, sinks included, in float32 (in
            float64 for float64 arrays); -inf for a query that sees no key.

    Raises:
        UsageError: arguments that do not fit each other, a scheme that does not fit the mesh or the heads, a kernel
            that cannot run on these devices or lacks a feature, or blocks that do not divide the share of each device
            with deterministic=True.
    """
    check_kinds(config=config, axes=axes, mesh=mesh)
    mask = check_arrays(q, k, v, mask)
    check_whole(mesh, "Call rlring.sharded_attention there, without mesh.", q=q, k=k, v=v)
    mod = checked_mod(q, k, scale=scale, soft_cap=soft_cap, sinks=sinks, bias=bias, dropout=dropout)
    mod = replace(mod, seeds=seeds(dropout, q.shape[0], q.shape[2]))
    _check_sparse(config, mask, mod)
    if mesh is None:
        axes, ring, ulysses = MeshAxes((), None, None), 1, 1
    else:
        axes = axes.of(mesh.shape)
        ring, ulysses = size_of(mesh, axes.ring), size_of(mesh, axes.ulysses)
        check_split(q, k, axes, mesh)
    devices, shares = (1, 1) if mesh is None else (size_of(mesh, axes.batch), size_of(mesh, axes.heads))
    config = _with_scheme(config, q, k, devices, shares, ring, ulysses)
    if q.size == 0 or k.size == 0:
        return of_nothing(q, v, mod, return_lse)
    platform = platform_of(jax.devices()[0] if mesh is None else mesh.devices.flat[0])
    check_blocks(config, q.shape[1], k.shape[1], ring, platform)
    if mesh is not None:
        return _on_mesh(q, k, v, mask, mod, config=config, mesh=mesh, axes=axes, return_lse=return_lse)
    return _on_shard(q, k, v, mask, mod, config=config, platform=platform, axes=axes, return_lse=return_lse)


def sharded_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    mask: Mask,
    *,
    config: AttentionConfig,
    axes: MeshAxes = DEFAULT,
    scale: float | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, "N"] | None = None,
    bias: Float[Array, "N"] | Float[Array, "N T S"] | None = None,
    dropout: Dropout | None = None,
    return_lse: bool = False,
) -> Float[Array, "B T N V"] | tuple[Float[Array, "B T N V"], Float[Array, "B T N"]]:
    """Returns attention() for this device's shards, inside the caller's own jax.shard_map.

    All arrays are this device's shards, split as in attention(). Sinks and slopes are split by heads; a bias [N, T, S]
    is split by heads and queries and has all S keys of the whole sequence. The key of a dropout is the same on all
    devices. A default name of MeshAxes that this shard_map does not map is an axis of size 1.

    Raises:
        UsageError: as attention() does.
    """
    check_kinds(config=config, axes=axes)
    mapped = jax.sharding.get_abstract_mesh()
    sizes = {name: mapped.shape[name] for name in mapped.manual_axes}
    if not sizes:
        raise UsageError("sharded_attention is called inside jax.shard_map; got no mesh axis. Use attention instead.")
    axes = axes.of(sizes)
    ring, ulysses = (1 if name is None else sizes[name] for name in (axes.ring, axes.ulysses))
    mask, keys = check_arrays(q, k, v, mask), k.shape[1] * ring * ulysses
    mod = checked_mod(q, k, scale=scale, soft_cap=soft_cap, sinks=sinks, bias=bias, dropout=dropout, keys=keys)
    mod = replace(mod, seeds=_seeds_here(dropout, q, axes))
    _check_sparse(config, mask, mod)
    config = _with_scheme(config, q, k, 1, 1, ring, ulysses)
    if q.size == 0 or k.size == 0:
        return of_nothing(q, v, mod, return_lse)
    platform = platform_of(jax.devices()[0])
    check_blocks(config, q.shape[1] * ring, keys, ring, platform)
    return _on_shard(q, k, v, mask, mod, config=config, platform=platform, axes=axes, return_lse=return_lse)


def _check_sparse(config: AttentionConfig, mask: Mask, mod: ScoreMod) -> None:
    if config.scheme != "sparse":
        return
    check_mask(mask)
    if mod.bias is not None:
        raise UsageError(
            "attention scheme 'sparse' takes no bias [N, T, S], which has an entry for each key that it leaves out. "
            "Give the slopes of each head, [N], or use another scheme."
        )


def _with_scheme(config: AttentionConfig, q, k, devices: int, shares: int, ring: int, ulysses: int) -> AttentionConfig:
    """Returns the config with "auto" and trivial splits resolved to a scheme, which is checked against the mesh.

    `devices` and `shares`: the numbers of devices over which the batch and the heads of q and k are still to be split.
    """
    if ring * ulysses == 1 and config.scheme not in ("dense", "sparse"):
        return replace(config, scheme="blockwise")
    heads, kv_heads = q.shape[2] // shares, k.shape[2] // shares
    if config.scheme == "auto":
        chosen = choose_scheme(
            length=k.shape[1],
            heads=heads,
            kv_heads=kv_heads,
            head_size=k.shape[3],
            itemsize=k.dtype.itemsize,
            batch=k.shape[0] // devices,
            ring=ring,
            ulysses=ulysses,
        )
        config = replace(config, scheme=chosen)
    check_scheme(config.scheme, heads, kv_heads, ring, ulysses)
    return config


def _seeds_here(dropout: Dropout | None, q, axes: MeshAxes):
    """Returns the dropout seeds of this device's sequences and heads: a part of the seeds that attention() uses."""
    heads_axis = () if axes.heads is None else (axes.heads,)
    batch, heads = (lax.axis_size(names) if names else 1 for names in (axes.batch, heads_axis))
    every = seeds(dropout, q.shape[0] * batch, q.shape[2] * heads)
    if every is None:
        return None
    start = index_of(axes.batch) * q.shape[0], index_of(heads_axis) * q.shape[2], 0
    return lax.dynamic_slice(every, start, (q.shape[0], q.shape[2], 2))


@partial(jax.jit, static_argnames=("config", "mesh", "axes", "return_lse"))
def _on_mesh(q, k, v, mask: Mask, mod: ScoreMod, *, config: AttentionConfig, mesh: Mesh, axes: MeshAxes, return_lse):
    length, shards = q.shape[1], size_of(mesh, axes.sequence)
    q_pad, k_pad = -q.shape[1] % shards, -k.shape[1] % shards
    if q_pad or k_pad:
        mask = mask.padded(q.shape[1] + q_pad, k.shape[1] + k_pad)
        mod = mod.padded(q.shape[1] + q_pad, k_pad)
        q, k, v = (pad(x, 1, x.shape[1] + more) for x, more in ((q, q_pad), (k, k_pad), (v, k_pad)))
    tokens, seq, heads = axes.tokens, axes.sequence or None, axes.heads
    of_mask = mask.specs(P(axes.batch or None, seq))
    of_mod = mod.specs(P(heads), bias=P(heads, seq), seeds=P(axes.batch or None, heads))
    platform = platform_of(mesh.devices.flat[0])
    run = partial(_on_shard, config=config, platform=platform, axes=axes, return_lse=return_lse)
    # check_vma=False, because its types do not pass through the loops of the custom VJP.
    specs = (tokens, tokens, tokens, of_mask, of_mod)
    on_shards = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=tokens, check_vma=False)
    results = on_shards(*split_explicitly((q, k, v, mask, mod), mesh, specs))
    if q_pad:  # JAX cannot slice an explicitly sharded dimension to a length that the devices do not divide
        results = split_explicitly(results, mesh, P(axes.batch or None, None, heads))
    return jax.tree.map(lambda x: x[:, :length], results)


@partial(jax.jit, static_argnames=("config", "platform", "axes", "return_lse"))
def _on_shard(q, k, v, mask: Mask, mod: ScoreMod, *, config, platform: str, axes: MeshAxes, return_lse: bool):
    if mod.needs_places:
        mask = with_places(mask, axes.sequence)
    q, k, v, mask, mod = varying_alike((q, k, v, mask, mod))
    needs_lse = return_lse or mod.sinks is not None
    out, lse = SCHEMES[config.scheme].make(Setting(config, platform, axes, needs_lse))(q, k, v, mask, mod)
    out = out.astype(q.dtype)
    return (out, jnp.swapaxes(lse, 1, 2)) if return_lse else out
