"""attention(): checks the arguments, picks the scheme and runs it on every shard of the mesh."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from rlring.attention.all_gather import all_gather_attention
from rlring.attention.blocks import Blocks, default_block, pad
from rlring.attention.choose import choose_scheme
from rlring.attention.dense import dense_attention
from rlring.attention.kernels import KERNELS, make_kernel, platform_of
from rlring.attention.local import local_attention
from rlring.attention.mask import Mask, checked
from rlring.attention.ring import ring_attention
from rlring.attention.ring_transport import Transport
from rlring.attention.sparse import SparsePattern, check_mask, sparse_attention
from rlring.attention.ulysses import check_heads, ulysses_attention
from rlring.errors import UsageError
from rlring.mesh import AXES, SEQUENCE_AXES

SCHEMES = ("auto", "dense", "blockwise", "ring", "all_gather", "ulysses", "hybrid", "sparse")


@dataclass(frozen=True)
class AttentionConfig:
    """How attention is computed; what is computed depends on none of it but `sparse`.

    scheme "auto" goes by the rule of choose.choose_scheme.

    Raises:
        UsageError: an unknown scheme or kernel, a block without tokens, or a pattern without its scheme.
    """

    scheme: str = "ring"
    block_q: int | None = None  # tokens; shorter sequences use shorter blocks; None: blocks.default_block()
    block_k: int | None = None
    scores: int = 2**20  # of one block, held at once; more falls out of a CPU's cache, accelerators like 2**24
    kernel: str = "jax"  # what computes a block: kernels.make_kernel; sparse and dense attention are plain JAX
    transport: Transport | None = None  # in which order a ring transfers and computes; None: what suits the platform
    sparse: SparsePattern | None = None  # which blocks of the context each head sees; with scheme "sparse"

    def __post_init__(self):
        if self.scheme not in SCHEMES:
            raise UsageError(f"there is no attention scheme {self.scheme!r}. Choose one of {', '.join(SCHEMES)}.")
        if self.kernel not in KERNELS:
            raise UsageError(f"there is no attention kernel {self.kernel!r}. Choose one of {', '.join(KERNELS)}.")
        for name in ("block_q", "block_k", "scores"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UsageError(
                    f"attention.{name} is at least 1; got {getattr(self, name)}. Leave it out for the default."
                )
        if (self.scheme == "sparse") != (self.sparse is not None):
            raise UsageError(
                f"scheme 'sparse' and attention.sparse go together; got scheme {self.scheme!r} with sparse="
                f"{self.sparse}. Use scheme='sparse' with sparse=SparsePattern(...), or neither of the two."
            )


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Mask,
    *,
    config: AttentionConfig,
    mesh: Mesh | None = None,
) -> Float[Array, "B T N H"]:
    """Returns softmax(q k^T / sqrt(H)) v over the keys that the mask shows, in q's type.

    Arrays are global. On a mesh B is split over "data" and both T and S over ("ring", "ulysses"); lengths that do not
    divide are padded inside. Without a mesh everything runs on one device, whatever the scheme. With N > K each
    key/value head serves N // K neighbouring query heads. A row that sees nothing is 0, and so is its gradient; B, T
    and S may be 0.

    Raises:
        UsageError: shapes that do not fit each other, a scheme that does not fit the mesh or the heads, a kernel that
            cannot run on these devices.
    """
    mask = check_arrays(q, k, v, mask)
    if config.scheme == "sparse":
        check_mask(mask)
    if mesh is not None:
        check_batch(q.shape[0], mesh)
        if config.scheme == "auto":
            config = replace(config, scheme=_chosen(q, k, mesh))
        _check_scheme(q, k, config, mesh)
    if q.size == 0 or k.size == 0:
        return jnp.zeros_like(q)
    if mesh is not None:
        return _on_mesh(q, k, v, mask, config=config, mesh=mesh)
    local = config if config.scheme in ("dense", "sparse") else replace(config, scheme="blockwise")
    return _on_shard(q, k, v, mask, config=local, platform=platform_of(jax.devices()[0]))


@partial(jax.jit, static_argnames=("config", "mesh"))
def _on_mesh(q, k, v, mask: Mask, *, config: AttentionConfig, mesh: Mesh):
    length, shards = q.shape[1], mesh.shape["ring"] * mesh.shape["ulysses"]
    q_pad, k_pad = -q.shape[1] % shards, -k.shape[1] % shards
    if q_pad or k_pad:
        mask = mask.padded(q.shape[1] + q_pad, k.shape[1] + k_pad)
        q, k, v = (pad(x, 1, x.shape[1] + more) for x, more in ((q, q_pad), (k, k_pad), (v, k_pad)))
    tokens = P("data", SEQUENCE_AXES)
    # check_vma off: its types do not pass the loops of the custom VJPs. Every array is split over every axis, so no
    # gradient needs a sum over devices.
    run = partial(_on_shard, config=config, platform=platform_of(mesh.devices.flat[0]), axis="ulysses")
    on_shards = jax.shard_map(run, mesh=mesh, in_specs=(tokens,) * 4, out_specs=tokens, check_vma=False)
    return on_shards(q, k, v, mask)[:, :length]


@partial(jax.jit, static_argnames=("config", "platform", "axis"))
def _on_shard(q, k, v, mask: Mask, *, config: AttentionConfig, platform: str, axis: str | None = None):
    with_kernel = partial(_with_kernel, config, platform)
    one_device, ring = with_kernel(local_attention), with_kernel(_ring(config, platform), "ring")
    match config.scheme:
        case "dense":
            return dense_attention(q, k, v, mask)
        case "blockwise":
            return one_device(q, k, v, mask)
        case "ring":
            return ring(q, k, v, mask)
        case "all_gather":
            return with_kernel(all_gather_attention, SEQUENCE_AXES)(q, k, v, mask)
        case "ulysses":
            return ulysses_attention(q, k, v, mask, axis="ulysses", local=one_device)
        case "hybrid":  # USP, Fang and Zhao 2405.07719
            return ulysses_attention(q, k, v, mask, axis="ulysses", local=ring)
        case "sparse":
            blocks = _blocks(config, platform, is_split=False)
            return sparse_attention(q, k, v, mask, pattern=config.sparse, blocks=blocks, axis=axis)
    raise AssertionError(config.scheme)


def _with_kernel(config: AttentionConfig, platform: str, scheme: Callable, *axes) -> Callable:
    """Returns the scheme with the kernel that the config asks for; axes: over which its sequence is split."""
    blocks = _blocks(config, platform, is_split=bool(axes))

    def run(q, k, v, mask: Mask):
        fitting = blocks.within_halves(q.shape[1], k.shape[1]) if axes else blocks
        of_arrays = {"dtype": q.dtype, "head_size": q.shape[3], "window": mask.window}
        kernel = make_kernel(config.kernel, fitting, platform=platform, **of_arrays)
        return scheme(q, k, v, mask, *axes, kernel)

    return run


def _ring(config: AttentionConfig, platform: str) -> Callable:
    transport = config.transport or Transport.of(platform)
    return lambda q, k, v, mask, axis, kernel: ring_attention(q, k, v, mask, axis, kernel, transport)


def _blocks(config: AttentionConfig, platform: str, *, is_split: bool) -> Blocks:
    default = default_block(platform, is_split=is_split)
    return Blocks(config.block_q or default, config.block_k or default, config.scores)


def check_arrays(q, k, v, mask: Mask) -> Mask:
    """Returns the mask in int32; raises UsageError for arrays that do not fit each other."""
    if not (q.ndim == k.ndim == 4 and k.shape == v.shape and q.shape[0] == k.shape[0] and q.shape[3] == k.shape[3]):
        raise UsageError(
            f"attention needs q[B, T, N, H] and k, v[B, S, K, H]; got q{q.shape}, k{k.shape}, v{v.shape}. "
            "B and H are the same in all three, S and K in k and v."
        )
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise UsageError(
            f"each key/value head serves the same number of query heads; got {q.shape[2]} query heads over "
            f"{k.shape[2]} key/value heads. Make the number of query heads a multiple."
        )
    if not (q.dtype == k.dtype == v.dtype):
        raise UsageError(f"q, k and v share one type; got {q.dtype}, {k.dtype} and {v.dtype}. Cast them with .astype.")
    return checked(mask, q.shape[:2], k.shape[:2])


def check_batch(batch: int, mesh: Mesh) -> None:
    """Raises UsageError for a mesh that is not ours, or over whose data axis the batch cannot be split."""
    if mesh.axis_names != AXES:
        raise UsageError(
            f"attention needs a mesh with the axes {AXES}; got {mesh.axis_names}. Make it with rlring.make_mesh."
        )
    data = mesh.shape["data"]
    if batch % data:
        raise UsageError(f"the batch is split over mesh.data={data} devices; got B={batch}. Use a multiple of {data}.")


def _chosen(q, k, mesh: Mesh) -> str:
    return choose_scheme(
        length=k.shape[1],
        heads=q.shape[2],
        kv_heads=k.shape[2],
        head_size=k.shape[3],
        itemsize=k.dtype.itemsize,
        batch=k.shape[0] // mesh.shape["data"],
        ring=mesh.shape["ring"],
        ulysses=mesh.shape["ulysses"],
    )


def _check_scheme(q, k, config: AttentionConfig, mesh: Mesh) -> None:
    ring, ulysses = mesh.shape["ring"], mesh.shape["ulysses"]
    fits_ring = config.scheme in ("ring", "all_gather", "hybrid")
    fits_ulysses = config.scheme in ("ulysses", "all_gather", "hybrid", "sparse")
    if (ring > 1 and not fits_ring) or (ulysses > 1 and not fits_ulysses):
        wrong = "ring" if ring > 1 and not fits_ring else "ulysses"
        instead = "Use scheme 'hybrid', which splits the sequence both ways, or another mesh."
        if config.scheme == "sparse":
            instead = (
                "Split the sequence over mesh.ulysses, which gives each device the whole sequence for some of the "
                "heads, or use scheme 'ring', 'all_gather' or 'hybrid', which follow no pattern."
            )
        raise UsageError(
            f"attention scheme {config.scheme!r} needs mesh.{wrong}=1; got mesh.{wrong}={mesh.shape[wrong]}. {instead}"
        )
    if config.scheme in ("ulysses", "hybrid", "sparse"):
        check_heads(config.scheme, q.shape[2], k.shape[2], ulysses)
