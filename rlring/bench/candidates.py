"""The functions that `rlring.bench.timing` measures: the attention schemes, a ring simulated on one device, sparse (S2)
attention, and attention of JAX and torch.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from rlring.attention import AttentionConfig, Mask, SparsePattern, attention, zigzag_order
from rlring.attention.blocks import Blocks, default_block
from rlring.attention.kernels import make_kernel, platform_of
from rlring.attention.kernels.cudnn import unavailable
from rlring.attention.simulated_ring import simulated_ring_attention
from rlring.mesh import SEQUENCE_AXES, make_mesh

EXACT = ("auto", "dense", "blockwise", "ring", "all_gather", "ulysses", "hybrid")  # these compute the same attention
ONE_DEVICE = ("dense", "blockwise")


@dataclass(frozen=True)
class Settings:
    """The settings of a benchmark: the arguments of the command."""

    schemes: tuple[str, ...]
    lengths: tuple[int, ...]
    devices: tuple[int, ...]
    heads: int
    kv_heads: int
    head_size: int
    batch: int
    type: str
    repeats: int
    matmul: int
    kernel: str = "jax"
    blocks: tuple[int, int] | None = None  # None: the defaults of AttentionConfig
    hops: int = 0  # devices of a ring simulated on one device (attention.simulated_ring); 0: not measured
    sparse: tuple[SparsePattern, ...] = ()
    deterministic: bool = False  # whether to measure schemes that support deterministic=True with it as well
    masks: tuple[str, ...] = ()  # names of masks.cases() for the comparison with other libraries


class Run(NamedTuple):
    """A function to be timed; `call` returns when the computation has finished."""

    call: Callable[[], object]
    temporary_bytes: int | None


MATMUL = {"cpu": 2048}  # side of the square matrices whose product measures the peak, by platform
LARGE_MATMUL = 8192  # the same, for other platforms


class Candidate(NamedTuple):
    scheme: str
    devices: int
    ring: int
    ulysses: int
    forward: Run
    forward_backward: Run


def scheme_candidate(
    scheme: str, length: int, devices: int, settings: Settings, *, deterministic: bool = False
) -> Candidate:
    name = f"{scheme}, deterministic" if deterministic else scheme
    say(f"{length} tokens: compiling {name} on {devices} device{'s' * (devices > 1)}")
    ring, ulysses = axes_of(scheme, devices, settings)
    mesh = make_mesh(ring=ring, ulysses=ulysses)
    config = AttentionConfig(scheme, *settings.blocks or (), kernel=settings.kernel, deterministic=deterministic)

    def forward(q, k, v, mask):
        return attention(q, k, v, mask, config=config, mesh=None if scheme in ONE_DEVICE else mesh)

    order = zigzag_order(length, ring) if ring > 1 and not deterministic else range(length)
    arrays = jax.device_put(_arrays(length, settings, order), NamedSharding(mesh, P("data", SEQUENCE_AXES)))
    return Candidate(name, devices, ring, ulysses, *_both(forward, arrays))


def sparse_candidate(pattern: SparsePattern, length: int, settings: Settings) -> Candidate:
    """Returns S2 attention on one device. Its share of the peak counts skipped blocks as if they were computed."""
    kept = pattern.density(length, kv_heads=settings.kv_heads)
    say(f"{length} tokens: compiling sparse, {kept:.1%} of the blocks kept")
    config = AttentionConfig("sparse", *settings.blocks or (), sparse=pattern)

    def forward(q, k, v, mask):
        return attention(q, k, v, mask, config=config)

    runs = _both(forward, _arrays(length, settings, range(length)))
    return Candidate(f"sparse, {kept:.1%} kept", 1, 1, 1, *runs)


def hops_candidates(length: int, settings: Settings) -> list[Candidate]:
    """Returns a ring of `settings.hops` devices simulated on one device; no candidate if `settings.hops` is 0."""
    if not settings.hops:
        return []
    say(f"{length} tokens: compiling {settings.hops} x {settings.hops} hops on 1 device")
    shard = length // settings.hops
    block = default_block(jax.default_backend(), is_split=False)
    blocks = Blocks(*settings.blocks or (block, block), AttentionConfig().scores).within_halves(shard, shard)
    kernel = make_kernel(
        settings.kernel,
        blocks,
        platform=platform_of(jax.devices()[0]),
        dtype=jnp.dtype(settings.type),
        head_size=settings.head_size,
    )

    def forward(q, k, v, mask):
        return simulated_ring_attention(q, k, v, mask, settings.hops, kernel)

    runs = _both(forward, _arrays(length, settings, zigzag_order(length, settings.hops)))
    return [Candidate(f"hops of a ring of {settings.hops}", 1, 1, 1, *runs)]


def jax_candidates(length: int, settings: Settings) -> list[Candidate]:
    """Returns jax.nn.dot_product_attention with cuDNN over the whole sequence; no candidate where that cannot run."""
    dtype = jnp.dtype(settings.type)
    if jax.default_backend() != "gpu" or unavailable(dtype, settings.head_size) is not None:
        return []
    say(f"{length} tokens: compiling jax.nn.dot_product_attention, cuDNN")

    def forward(q, k, v, mask):
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")

    return [Candidate("jax.nn", 1, 1, 1, *_both(forward, _arrays(length, settings, range(length))))]


def _arrays(length: int, settings: Settings, order) -> tuple:
    """Returns q, k, v, the mask, and the gradient of the output; token i has position `order[i]`."""
    mask = Mask.causal(jnp.broadcast_to(jnp.asarray(order, jnp.int32), (settings.batch, length)))
    shapes = [(settings.batch, length, n, settings.head_size) for n in _heads_of(settings)]
    keys = jax.random.split(jax.random.key(0), len(shapes))
    q, k, v, d_out = (jax.random.normal(key, shape, settings.type) for key, shape in zip(keys, shapes, strict=True))
    return q, k, v, mask, d_out


def _both(forward: Callable, arrays: tuple) -> tuple[Run, Run]:
    """Returns the forward pass, and the forward and backward pass together."""

    def forward_backward(q, k, v, mask, d_out):
        out, pull = jax.vjp(lambda q, k, v: forward(q, k, v, mask), q, k, v)
        return out, pull(d_out)

    return _compiled(forward, *arrays[:-1]), _compiled(forward_backward, *arrays)


def axes_of(scheme: str, devices: int, settings: Settings) -> tuple[int, int]:
    """Returns the mesh sizes (ring, ulysses) of a scheme. For "hybrid", ulysses is the largest size that fits the heads
    and, with more than one device, leaves a ring of at least 2."""
    match scheme:
        case "ulysses":
            return 1, devices
        case "hybrid":
            heads, kv_heads = settings.heads, settings.kv_heads
            shares = (n for n in range(max(1, devices // 2), 0, -1) if devices % n == 0 == heads % n)
            ulysses = next(n for n in shares if kv_heads % n == 0 or n % kv_heads == 0)
            return devices // ulysses, ulysses
    return devices, 1


def _heads_of(settings: Settings) -> tuple[int, int, int, int]:
    """Returns the numbers of heads of q, k, v and the gradient of the output."""
    return settings.heads, settings.kv_heads, settings.kv_heads, settings.heads


def _compiled(function: Callable, *arguments) -> Run:
    compiled = jax.jit(function).lower(*arguments).compile()
    memory = compiled.memory_analysis()
    return Run(
        lambda: jax.block_until_ready(compiled(*arguments)), None if memory is None else memory.temp_size_in_bytes
    )


def matmul(devices: int, settings: Settings) -> Run:
    """Returns the matrix product whose speed counts as the peak of `devices` devices."""
    return product(devices, settings.matmul, settings.type)


def product(devices: int, side: int, dtype: str) -> Run:
    """Returns a product of two square matrices of side `side` on every device at the same time."""
    mesh = make_mesh(ring=devices)
    matrices = jax.random.normal(jax.random.key(0), (devices * side, side), dtype)
    matrices = jax.device_put(matrices, NamedSharding(mesh, P("ring")))
    return _compiled(jax.shard_map(jnp.matmul, mesh=mesh, in_specs=P("ring"), out_specs=P("ring")), matrices, matrices)


def matmul_flops(devices: int, settings: Settings) -> float:
    return 2.0 * settings.matmul**3 * devices


def torch_candidates(length: int, settings: Settings) -> list[Candidate]:
    """Returns torch's scaled_dot_product_attention on one device; no candidate where torch cannot run."""
    device = {"cpu": "cpu", "gpu": "cuda"}.get(jax.default_backend())
    if importlib.util.find_spec("torch") is None:
        return []
    torch = importlib.import_module("torch")
    if device is None or (device == "cuda" and not torch.cuda.is_available()):
        say(f"torch sees no {jax.default_backend()}: left out")
        return []
    attend = partial(
        torch.nn.functional.scaled_dot_product_attention,
        is_causal=True,
        enable_gqa=settings.heads != settings.kv_heads,
    )
    make = partial(torch.randn, device=device, dtype=getattr(torch, settings.type))
    q, k, v, d_out = (make(settings.batch, n, length, settings.head_size) for n in _heads_of(settings))
    with_gradient = [x.requires_grad_() for x in (q, k, v)]
    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)

    def forward():
        with torch.no_grad():
            attend(q, k, v)
        wait()

    def forward_backward():
        torch.autograd.grad(attend(*with_gradient), with_gradient, d_out)
        wait()

    return [Candidate("torch", 1, 1, 1, Run(forward, None), Run(forward_backward, None))]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
