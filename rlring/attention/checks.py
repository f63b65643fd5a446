"""Checks of the arguments of attention before anything is computed; each mistake has its own error message."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rlring.attention.axes import DEFAULT, MeshAxes, size_of
from rlring.attention.mask import Mask, checked
from rlring.attention.schemes import SCHEMES, AttentionConfig
from rlring.attention.score_mod import ScoreMod
from rlring.attention.softmax import accumulator_type
from rlring.errors import UsageError, shown


def check_arrays(q, k, v, mask: Mask) -> Mask:
    """Returns the mask with int32 arrays; raises UsageError for arrays that do not fit each other."""
    fits = all(getattr(x, "ndim", None) == 4 for x in (q, k, v))
    if not (fits and k.shape[:3] == v.shape[:3] and q.shape[0] == k.shape[0] and q.shape[3] == k.shape[3]):
        raise UsageError(
            "attention needs q[B, T, N, H], k[B, S, K, H] and v[B, S, K, V]; got "
            f"q{_shape(q)}, k{_shape(k)}, v{_shape(v)}. B is the same in all three, H in q and k, S and K in k and v."
        )
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise UsageError(
            f"each key/value head serves the same number of query heads; got {q.shape[2]} query heads over "
            f"{k.shape[2]} key/value heads. Make the number of query heads a multiple."
        )
    if not (q.dtype == k.dtype == v.dtype):
        raise UsageError(f"q, k and v share one type; got {q.dtype}, {k.dtype} and {v.dtype}. Cast them with .astype.")
    if not jnp.issubdtype(q.dtype, jnp.floating):
        raise UsageError(f"q, k and v are real numbers with a fraction; got {q.dtype}. Cast them with .astype.")
    if 0 in (q.shape[3], v.shape[3]):
        raise UsageError(f"heads have a size of at least 1; got q{q.shape} and v{v.shape}.")
    return checked(mask, q.shape[:2], k.shape[:2])


def check_kinds(*, axes, mesh=None, **config) -> None:
    """Raises UsageError unless `axes` is a MeshAxes, `mesh` a Mesh or None, and `config`, if given, an
    AttentionConfig."""
    for name, value in {**config, "axes": axes, "mesh": mesh}.items():
        kind = {"config": AttentionConfig, "axes": MeshAxes, "mesh": Mesh}[name]
        if not isinstance(value, kind) and not (name == "mesh" and value is None):
            raise UsageError(f"{name} is an instance of {kind.__name__}; got {shown(value)}.")


def check_whole(mesh: Mesh | None, instead: str, **arrays) -> None:
    """Raises UsageError for a mesh given inside of jax.shard_map, and for explicitly sharded arrays without a mesh.

    `instead` is the advice of the first error.
    """
    mapped = jax.sharding.get_abstract_mesh().manual_axes
    if mesh is not None and mapped:
        raise UsageError(f"mesh goes with arrays of all devices; got it inside jax.shard_map over {mapped}. {instead}")
    for name, x in arrays.items():
        split = tuple(axis for axis in jax.typeof(x).sharding.spec if axis is not None)
        if mesh is None and split:
            raise UsageError(
                f"{name} is split explicitly over the mesh axes {split}; got no mesh. Give that mesh, and in axes what "
                "its axes carry."
            )


def checked_mod(q, k, *, scale, soft_cap, sinks, bias, dropout, keys: int | None = None) -> ScoreMod:
    """Checks the arguments of attention() that modify scores, and returns them as a ScoreMod, without dropout seeds.

    Args:
        keys: S of the whole sequence, if k is a shard of it.
    """
    heads, keys = q.shape[2], k.shape[1] if keys is None else keys
    for name, number in (("scale", scale), ("soft_cap", soft_cap)):
        if number is not None and not (_is_real(number) and abs(number) < np.inf):
            raise UsageError(
                f"{name} is one finite number, known when the program is compiled; got {shown(number)}. Make it a "
                "static argument of jax.jit."
            )
    if soft_cap is not None and soft_cap <= 0:
        raise UsageError(f"soft_cap is greater than 0; got {soft_cap}. Use None for no cap.")
    for name, x in (("sinks", sinks), ("bias", bias)):
        dtype = getattr(x, "dtype", None)
        if x is not None and not (dtype is not None and jnp.issubdtype(dtype, jnp.floating)):
            got = f"a {type(x).__name__}" if dtype is None else dtype
            raise UsageError(f"{name} is an array of real numbers; got {got}. Cast it; what may be seen, a Mask says.")
    if sinks is not None and sinks.shape != (heads,):
        raise UsageError(f"sinks has one logit for each of the {heads} query heads; got shape {sinks.shape}.")
    shapes = (heads,), (heads, q.shape[1], keys)
    if bias is not None and bias.shape not in shapes:
        raise UsageError(
            f"bias is [N, T, S] = {shapes[1]}, or the slopes of each head, [N] = {shapes[0]}; got shape {bias.shape}."
        )
    is_slopes = bias is not None and jnp.ndim(bias) == 1
    return ScoreMod(
        q.shape[3] ** -0.5 if scale is None else float(scale),
        None if soft_cap is None else float(soft_cap),
        0.0 if dropout is None else _rate(dropout),
        slopes=jnp.asarray(bias) if is_slopes else None,
        bias=None if bias is None or is_slopes else jnp.asarray(bias),
        sinks=None if sinks is None else jnp.asarray(sinks),
    )


def _rate(dropout) -> float:
    rate, key = dropout if isinstance(dropout, tuple) and len(dropout) == 2 else (None, None)
    dtype, shape = getattr(key, "dtype", None), getattr(key, "shape", None)
    is_key = dtype is not None and shape == (() if jnp.issubdtype(dtype, jax.dtypes.prng_key) else (2,))
    if not (_is_real(rate) and is_key and 0 <= rate < 1):
        raise UsageError(
            "dropout is a pair (rate, key): a number from 0 to below 1, known when the program is compiled, and a key "
            f"of jax.random; got {shown(dropout if rate is None else rate)}. Use None for no dropout."
        )
    return float(rate)


def seeds(dropout, batch: int, heads: int):
    """Returns the seeds uint32[B, N, 2] of a dropout (rate, key), the same on every mesh; None without dropout."""
    return None if dropout is None or dropout[0] == 0 else jax.random.bits(dropout[1], (batch, heads, 2), jnp.uint32)


def of_nothing(q, v, mod: ScoreMod, return_lse: bool):
    """Returns the result of attention if q or k is empty: zeros, and the log-sum-exps of sinks alone."""
    out = jnp.zeros((*q.shape[:3], v.shape[3]), q.dtype)
    dtype = accumulator_type(q.dtype)
    lse = jnp.full(q.shape[:3], -jnp.inf, dtype)
    lse = lse if mod.sinks is None else jnp.broadcast_to(mod.sinks.astype(dtype), lse.shape)
    return (out, lse) if return_lse else out


def check_split(q, k, axes: MeshAxes, mesh: Mesh) -> None:
    """Raises UsageError if the batch or the heads cannot be split over the mesh."""
    check_batch(q.shape[0], mesh, axes)
    shares = size_of(mesh, axes.heads)
    if q.shape[2] % shares or k.shape[2] % shares:
        raise UsageError(
            f"the heads are split over {_product(mesh, (axes.heads,))} devices; got {q.shape[2]} query heads and "
            f"{k.shape[2]} key/value heads. Use multiples of {shares}."
        )


def check_batch(batch: int, mesh: Mesh, axes: MeshAxes = DEFAULT) -> None:
    """Raises UsageError if the mesh lacks these axes, or the batch cannot be split over its batch axes."""
    axes = axes.of(mesh.shape)
    devices = size_of(mesh, axes.batch)
    if batch % devices:
        raise UsageError(
            f"the batch is split over {_product(mesh, axes.batch)} devices; got B={batch}. Use a multiple of {devices}."
        )


def check_blocks(config: AttentionConfig, queries: int, keys: int, ring: int, platform: str) -> None:
    """Raises UsageError if deterministic=True and the blocks do not divide each device's share of the sequence."""
    if not config.deterministic:
        return
    blocks = config.blocks(platform, is_split=True)
    for name, block, length in (("block_q", blocks.q, queries), ("block_k", blocks.k, keys)):
        if length % (ring * block):
            raise UsageError(
                f"attention.deterministic=True cuts the share of each device into whole blocks; got {length} tokens "
                f"over mesh.ring={ring} in blocks of attention.{name}={block}. Use a multiple of {ring * block} "
                f"tokens, or a {name} that divides the share of each device on every ring that you compare."
            )


def check_scheme(scheme: str, heads: int, kv_heads: int, ring: int, ulysses: int) -> None:
    """Raises UsageError if the scheme cannot split the sequence or these heads over `ring` and `ulysses` devices."""
    sizes = {"ring": ring, "ulysses": ulysses}
    unsplit = [name for name, size in sizes.items() if size > 1 and name not in SCHEMES[scheme].splits]
    if unsplit:
        wrong = unsplit[0]
        instead = "Use scheme 'hybrid', which splits the sequence both ways, or another mesh."
        if scheme == "sparse":
            instead = (
                "Split the sequence over mesh.ulysses, which gives each device the whole sequence for some of the "
                "heads, or use scheme 'ring', 'all_gather' or 'hybrid', which follow no pattern."
            )
        raise UsageError(
            f"attention scheme {scheme!r} needs mesh.{wrong}=1; got mesh.{wrong}={sizes[wrong]}. {instead}"
        )
    if SCHEMES[scheme].splits_heads and (heads % ulysses or (kv_heads % ulysses and ulysses % kv_heads)):
        fitting = [n for n in range(1, heads + 1) if heads % n == 0 and (kv_heads % n == 0 or n % kv_heads == 0)]
        raise UsageError(
            f"attention scheme {scheme!r} splits the heads over mesh.ulysses={ulysses} devices; got {heads} query "
            f"heads and {kv_heads} key/value heads. Use mesh.ulysses in {fitting}, or scheme 'ring', which splits no "
            "heads."
        )


def _product(mesh: Mesh, names) -> str:
    return " * ".join(f"mesh.{name}={mesh.shape[name]}" for name in names)


def _is_real(x) -> bool:
    return isinstance(x, float | int | np.floating | np.integer) and not isinstance(x, bool)


def _shape(x) -> tuple[int, ...] | str:
    return getattr(x, "shape", f", a {type(x).__name__}")
