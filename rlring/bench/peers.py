"""Attention of other libraries, called as in their documentation. A library that cannot run gives the reason."""

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from rlring.attention import AttentionConfig, attention, zigzag_order
from rlring.bench.candidates import ONE_DEVICE, Settings, say
from rlring.bench.masks import Case
from rlring.mesh import SEQUENCE_AXES, make_mesh

# The exceptions that count as a library's lack of a feature. Any other exception is a bug in this benchmark.
LACKS = (NotImplementedError, ValueError, TypeError, AssertionError, RuntimeError, ImportError, AttributeError)


class Inputs(NamedTuple):
    q: Float[Array, "B T N H"]
    k: Float[Array, "B T K H"]
    v: Float[Array, "B T K H"]
    d_out: Float[Array, "B T N H"]


class Peer(NamedTuple):
    """A library's attention with one mask. Both functions return when the computation has finished. `both` returns
    arrays in the order of the tokens."""

    name: str
    devices: int
    forward: Callable[[], object]
    both: Callable[[], tuple]  # out, dq, dk, dv
    temporary_bytes: int | None = None  # of `both`; None if unknown


class Refused(NamedTuple):
    """A library that is not measured with a mask, and why."""

    name: str
    devices: int
    reason: str


def peers(case: Case, inputs: Inputs, settings: Settings) -> Iterator[Peer | Refused]:
    """Yields rlring's schemes, then the other libraries, or the reasons why they cannot run."""
    length = inputs.q.shape[1]
    for scheme in settings.schemes:
        for devices in (1,) if scheme in ONE_DEVICE else settings.devices:
            yield _ours(scheme, devices, case, inputs)
    for name, module, make in LIBRARIES:
        if importlib.util.find_spec(module) is None:
            yield Refused(name, 1, "not installed")
            continue
        for devices in settings.devices if make is _ejkernel else (1,):
            say(f"{length} tokens, {case.name}: {name} on {devices} device{'s' * (devices > 1)}")
            try:
                yield make(name, devices, case, inputs)
            except LACKS as error:
                reason = str(error).strip().splitlines()
                yield Refused(name, devices, f"{type(error).__name__}: {reason[0] if reason else ''}"[:160])


def _ours(scheme: str, devices: int, case: Case, inputs: Inputs) -> Peer:
    say(f"{inputs.q.shape[1]} tokens, {case.name}: rlring {scheme} on {devices} device{'s' * (devices > 1)}")
    mesh, length, config = make_mesh(ring=devices), inputs.q.shape[1], AttentionConfig(scheme)
    order = zigzag_order(length, devices) if devices > 1 else np.arange(length)
    mask = case.ours(np.tile(order.astype(np.int32), (inputs.q.shape[0], 1)))

    def attend(q, k, v):
        return attention(q, k, v, mask, config=config, mesh=None if scheme in ONE_DEVICE else mesh)

    here = NamedSharding(mesh, P("data", SEQUENCE_AXES))
    arrays = Inputs(*(jax.device_put(x[:, order], here) for x in inputs))
    peer, back = _compiled(f"rlring {scheme}", devices, attend, arrays), np.argsort(order)
    return peer._replace(both=lambda: tuple(np.asarray(x)[:, back] for x in peer.both()))


def _compiled(name: str, devices: int, attend: Callable, inputs: Inputs) -> Peer:
    """Compiles `attend(q, k, v)`, a function of JAX arrays, and its backward pass, and returns them as a Peer."""

    def both(q, k, v, d_out):
        out, pull = jax.vjp(attend, q, k, v)
        return out, *pull(d_out)

    forward = jax.jit(attend).lower(*inputs[:3]).compile()
    compiled = jax.jit(both).lower(*inputs).compile()
    memory = compiled.memory_analysis()
    held = None if memory is None else memory.temp_size_in_bytes
    wait = jax.block_until_ready
    return Peer(name, devices, lambda: wait(forward(*inputs[:3])), lambda: wait(compiled(*inputs)), held)


def _jax_nn(name: str, devices: int, case: Case, inputs: Inputs) -> Peer:
    mask = {"is_causal": True} if case.name == "causal" else {"mask": jnp.asarray(case.seen)[None, None]}
    mask = {} if case.name == "full" else mask
    return _compiled(name, devices, partial(jax.nn.dot_product_attention, **mask), inputs)


def _tokamax(name: str, devices: int, case: Case, inputs: Inputs) -> Peer:
    tokamax = importlib.import_module("tokamax")
    importlib.import_module("absl.flags").FLAGS.mark_as_parsed()  # else tokamax would parse this command's arguments
    mask = {"is_causal": True} if case.name == "causal" else {"mask": jnp.asarray(case.seen)[None, None]}
    mask = {} if case.name == "full" else mask
    return _compiled(name, devices, partial(tokamax.dot_product_attention, **mask), inputs)


def _flash_attn_jax(name: str, devices: int, case: Case, inputs: Inputs) -> Peer:
    if jax.default_backend() != "gpu":
        raise NotImplementedError("it needs an NVIDIA GPU")
    flash = importlib.import_module("flash_attn_jax").flash_mha
    return _compiled(name, devices, partial(flash, **_window(case)), inputs)


def _transformer_engine(name: str, devices: int, case: Case, inputs: Inputs) -> Peer:
    raise NotImplementedError("it needs an NVIDIA GPU, and a call of its own for each mask: not measured here")


def _window(case: Case) -> dict:
    """Returns a mask as keyword arguments of libraries that support only causal masks and windows.

    NotImplementedError for other masks.
    """
    length = len(case.seen)
    wide, narrow = max(1, length // 8), max(1, length // 16)
    of = {"full": {}, "causal": {"is_causal": True}, "two-sided window": {"window_size": (narrow, narrow)}}
    of["window"] = {"is_causal": True, "window_size": (wide - 1, 0)}
    if case.name not in of:
        raise NotImplementedError("it takes causal masks and windows only")
    return of[case.name]


def _ejkernel(name: str, devices: int, case: Case, inputs: Inputs) -> Peer:
    """Returns ejkernel's ring attention, called as in its docstring; its window is (tokens back, tokens ahead)."""
    ring = importlib.import_module("ejkernel.modules").ring_attention
    here = _window(case)
    window = {"sliding_window": here["window_size"]} if "window_size" in here else {}
    causal = {"causal_block_size": 1} if here.get("is_causal") else {}
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]), ("sp",))
    tokens = P(None, "sp")
    split = {"mesh": mesh, "in_specs": (*[tokens] * 3, None, None, None), "out_specs": tokens, "axis_name": "sp"}

    def attend(q, k, v):
        return ring(q, k, v, **causal, **window, **split if devices > 1 else {}, platform="xla")

    arrays = Inputs(*(jax.device_put(x, NamedSharding(mesh, tokens)) for x in inputs))
    return _compiled(name, devices, attend, arrays)


def _torch(name: str, devices: int, case: Case, inputs: Inputs) -> Peer:
    torch, device = importlib.import_module("torch"), {"cpu": "cpu", "gpu": "cuda"}.get(jax.default_backend())
    if device is None or (device == "cuda" and not torch.cuda.is_available()):
        raise NotImplementedError(f"torch sees no {jax.default_backend()}")
    arrays = [torch.from_numpy(np.array(x, np.float32)).transpose(1, 2).contiguous() for x in inputs]
    arrays = [x.to(device, getattr(torch, str(inputs.q.dtype))) for x in arrays]
    attend = (_flex if "Flex" in name else _sdpa)(torch, case, device)
    with_gradient = [x.requires_grad_() for x in arrays[:3]]
    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)

    def forward():
        with torch.no_grad():
            attend(*arrays[:3])
        wait()

    def both():
        out = attend(*with_gradient)
        found = out.detach(), *torch.autograd.grad(out, with_gradient, arrays[3])
        wait()
        return tuple(x.transpose(1, 2).float().cpu().numpy() for x in found)

    return Peer(name, devices, forward, both)


def _sdpa(torch, case: Case, device: str) -> Callable:
    mask = {"is_causal": True} if case.name == "causal" else {"attn_mask": torch.from_numpy(case.seen).to(device)}
    mask = {} if case.name == "full" else mask
    return partial(torch.nn.functional.scaled_dot_product_attention, enable_gqa=True, **mask)


def _flex(torch, case: Case, device: str) -> Callable:
    """Returns FlexAttention without torch.compile."""
    flex, length = importlib.import_module("torch.nn.attention.flex_attention"), len(case.seen)
    seen = torch.from_numpy(case.seen).to(device)
    blocks = flex.create_block_mask(lambda b, h, q, k: seen[q, k], None, None, length, length, device=device)
    return partial(flex.flex_attention, block_mask=blocks, enable_gqa=True)


LIBRARIES = (  # name, module, function that makes the Peer
    ("jax.nn.dot_product_attention", "jax", _jax_nn),
    ("torch SDPA", "torch", _torch),
    ("torch FlexAttention", "torch", _torch),
    ("tokamax", "tokamax", _tokamax),
    ("ejkernel ring", "ejkernel", _ejkernel),
    ("flash-attn-jax", "flash_attn_jax", _flash_attn_jax),
    ("transformer_engine", "transformer_engine", _transformer_engine),
)
