"""Decode attention: a few queries against a cache that may be split along the sequence.

Every device attends to its own share of the cache, and the shares are added by their log-sum-exps in one step
(Flash-Decoding; a ring would wait for each hop with next to no compute to hide it behind).
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float

from rlring.attention import one_block
from rlring.attention.api import check_arrays, check_batch
from rlring.attention.blocks import pad
from rlring.attention.exponential import power_of_two
from rlring.attention.mask import Mask
from rlring.attention.rows import rows_of_keys, rows_of_queries, tokens_of_rows
from rlring.attention.softmax import divisor, finite
from rlring.mesh import SEQUENCE_AXES


def decode_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Mask,
    *,
    mesh: Mesh | None = None,
) -> Float[Array, "B T N H"]:
    """Returns attention of a few new queries over a cache k, v, in q's type.

    Memory is T * S: for a whole prompt use attention(). On a mesh B is split over "data" and S over
    ("ring", "ulysses"); every device gets all T queries. Unwritten places of the cache have segment -1.

    Raises:
        UsageError: shapes that do not fit each other, or the mesh.
    """
    mask = check_arrays(q, k, v, mask)
    if mesh is not None:
        check_batch(q.shape[0], mesh)
    if q.size == 0 or k.size == 0:
        return jnp.zeros_like(q)
    if mesh is None:
        return _on_shard(q, k, v, mask, axes=())
    return _on_mesh(q, k, v, mask, mesh=mesh)


@partial(jax.jit, static_argnames="mesh")
def _on_mesh(q, k, v, mask: Mask, *, mesh: Mesh):
    more = -k.shape[1] % (mesh.shape["ring"] * mesh.shape["ulysses"])
    if more:
        mask = mask.padded(q.shape[1], k.shape[1] + more)
        k, v = (pad(x, 1, x.shape[1] + more) for x in (k, v))
    batch, cache = P("data"), P("data", SEQUENCE_AXES)
    mask_specs = replace(mask, q_position=batch, q_segment=batch, k_position=cache, k_segment=cache)
    on_shards = jax.shard_map(
        partial(_on_shard, axes=SEQUENCE_AXES), mesh=mesh, in_specs=(batch, cache, cache, mask_specs), out_specs=batch
    )
    return on_shards(q, k, v, mask)


@partial(jax.jit, static_argnames="axes")
def _on_shard(q, k, v, mask: Mask, *, axes: tuple[str, ...]):
    return attend(q, rows_of_keys(k), rows_of_keys(v), mask, axes, shields=True)


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "R S H"],
    v: Float[Array, "R S H"],
    mask: Mask,
    axes: tuple[str, ...] = (),
    is_lost: Bool[Array, "B T"] | None = None,
    *,
    shields: bool = False,
) -> Float[Array, "B T N H"]:
    """Returns attention of a few queries over these rows of keys and those of all other devices of the mesh axes.

    The mask has B rows, or R. Queries for which a key is lost on any device are NaN. shields: NaN and infinity reach
    only the queries that see them; else every query of the sequence, as what a cache marks has to.
    """
    rows = rows_of_queries(q, k.shape[0] // q.shape[0])
    flat = rows.reshape(rows.shape[0], -1, rows.shape[3])
    exponent, total, out = one_block.attend(flat, k, v, mask, shields=shields)  # there are few queries
    if is_lost is not None:
        out = jnp.where(is_lost[:, None, None, :, None], jnp.nan, out.reshape(q.shape[0], -1, *rows.shape[1:]))
        out = out.reshape(flat.shape)
    if axes:
        # softmax.merge() of all devices' parts at once. The greatest exponent cancels, and has no gradient.
        fade = power_of_two(exponent, finite(lax.pmax(lax.stop_gradient(exponent), axes)))
        out, total = lax.psum((out * fade[..., None], total * fade), axes)
    out = out / divisor(total)[..., None]
    return tokens_of_rows(out.reshape(rows.shape), q.shape[0]).astype(q.dtype)
