"""Decode attention: a few queries against a cache that may be split along the sequence.

Every device computes attention over its part of the cache, and the parts are merged by their log-sum-exps in one step
(Flash-Decoding). A ring would have almost no computation to hide its communication behind.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float

from rlring.attention import online_softmax
from rlring.attention.axes import DEFAULT, MeshAxes, size_of, split_explicitly, with_places
from rlring.attention.blocks import pad
from rlring.attention.checks import check_arrays, check_kinds, check_split, check_whole, checked_mod, of_nothing
from rlring.attention.exponential import power_of_two
from rlring.attention.kernel import with_sinks
from rlring.attention.mask import Mask
from rlring.attention.rows import all_rows, rows_of_keys, rows_of_queries, tokens_of_rows
from rlring.attention.score_mod import ScoreMod, Tile
from rlring.attention.softmax import PartialAttention, finite


def decode_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    mask: Mask,
    *,
    mesh: Mesh | None = None,
    axes: MeshAxes = DEFAULT,
    scale: float | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, "N"] | None = None,
    bias: Float[Array, "N"] | Float[Array, "N T S"] | None = None,
    return_lse: bool = False,
) -> Float[Array, "B T N V"] | tuple[Float[Array, "B T N V"], Float[Array, "B T N"]]:
    """Returns attention of a few new queries over a cache k, v, in q's type; the arguments are those of attention().

    Memory is proportional to T * S, so use attention() for a whole prompt. On a mesh B is split over axes.batch, N and
    K over axes.heads, and S over (axes.ring, axes.ulysses); every device gets all T queries. Unwritten slots of the
    cache have segment -1.

    Raises:
        UsageError: arguments that do not fit each other, or the mesh.
    """
    check_kinds(axes=axes, mesh=mesh)
    mask = check_arrays(q, k, v, mask)
    check_whole(mesh, "Call decode_attention outside of it.", q=q, k=k, v=v)
    mod = checked_mod(q, k, scale=scale, soft_cap=soft_cap, sinks=sinks, bias=bias, dropout=None)
    if mesh is not None:
        axes = axes.of(mesh.shape)
        check_split(q, k, axes, mesh)
    if q.size == 0 or k.size == 0:
        return of_nothing(q, v, mod, return_lse)
    if mesh is None:
        return _on_shard(q, k, v, mask, mod, axes=(), return_lse=return_lse)
    return _on_mesh(q, k, v, mask, mod, mesh=mesh, axes=axes, return_lse=return_lse)


@partial(jax.jit, static_argnames=("mesh", "axes", "return_lse"))
def _on_mesh(q, k, v, mask: Mask, mod: ScoreMod, *, mesh: Mesh, axes: MeshAxes, return_lse: bool):
    more = -k.shape[1] % size_of(mesh, axes.sequence)
    if more:
        mask, mod = mask.padded(q.shape[1], k.shape[1] + more), mod.padded(q.shape[1], more)
        k, v = (pad(x, 1, x.shape[1] + more) for x in (k, v))
    every = P(axes.batch or None, None, axes.heads)
    mask_specs = mask.specs(P(*axes.tokens[:2]), queries=P(axes.batch or None))
    run = partial(_on_shard, axes=axes.sequence, return_lse=return_lse)
    specs = (every, axes.tokens, axes.tokens, mask_specs, mod.specs(P(axes.heads), bias=P(axes.heads)))
    on_shards = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=every)
    return on_shards(*split_explicitly((q, k, v, mask, mod), mesh, specs))


@partial(jax.jit, static_argnames=("axes", "return_lse"))
def _on_shard(q, k, v, mask: Mask, mod: ScoreMod, *, axes: tuple[str, ...], return_lse: bool):
    if mod.needs_places:
        mask = with_places(mask, axes)
    out, lse = attend(q, rows_of_keys(k), rows_of_keys(v), mask, mod=mod, axes=axes, shields=True)
    return (out, jnp.swapaxes(lse, 1, 2)) if return_lse else out


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "R S H"],
    v: Float[Array, "R S V"],
    mask: Mask,
    *,
    mod: ScoreMod | None = None,
    axes: tuple[str, ...] = (),
    is_lost: Bool[Array, "B T"] | None = None,
    shields: bool = False,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B N T"]]:
    """Returns attention of a few queries over the rows of keys of all devices of the mesh axes, in q's type, and its
    log-sum-exps.

    Args:
        mask: has B rows, or R.
        is_lost: queries for which it is true on any device become NaN.
        shields: whether NaN and infinity affect only the queries that see them. Otherwise they affect all queries of
            the sequence, which a cache needs for the slots that it marks with NaN.
    """
    mod = ScoreMod.plain(q.shape[3]) if mod is None else mod
    rows = rows_of_queries(q, k.shape[0] // q.shape[0])
    flat = rows.reshape(rows.shape[0], -1, rows.shape[3])
    terms = all_rows(q.shape[0], k.shape[0] // q.shape[0]).terms(mod, 0, q.shape[1], mask.span_of_keys)
    tile = Tile.of(mod, terms, mask, flat, is_masked=True)
    exponent, total, out = online_softmax.attend(flat, k, v, tile, shields=shields)  # there are few queries
    if is_lost is not None:
        each = out.reshape(q.shape[0], -1, *rows.shape[1:3], v.shape[2])
        out = jnp.where(is_lost[:, None, None, :, None], jnp.nan, each).reshape(out.shape)
    if axes:
        # softmax.merge() of the parts of all devices at once. The largest exponent cancels, and has no gradient.
        fade_from, exponent = exponent, finite(lax.pmax(lax.stop_gradient(exponent), axes))
        fade = power_of_two(fade_from, exponent)
        out, total = lax.psum((out * fade[..., None], total * fade), axes)
    numbers = (x.reshape(q.shape[0], q.shape[2], q.shape[1]) for x in (finite(exponent), total))
    whole = PartialAttention(tokens_of_rows(out.reshape(*rows.shape[:3], v.shape[2]), q.shape[0]), *numbers).whole()
    out, lse = whole.out, whole.lse
    if mod.sinks is not None:
        out, lse = with_sinks(out, lse, mod.sinks)
    return out.astype(q.dtype), lse
