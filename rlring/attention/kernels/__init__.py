"""The kernels: one table that says how each is made, what it lacks and where it runs; and the choice among them."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rlring.attention.blocks import Blocks
from rlring.attention.blockwise import BlockwiseKernel
from rlring.attention.kernel import Kernel
from rlring.attention.kernels.cudnn import CudnnTile, unavailable
from rlring.attention.kernels.rectangles import RectangleKernel
from rlring.attention.kernels.refusal import Refusal
from rlring.attention.kernels.splash import DTYPES, SplashKernel
from rlring.attention.mask import Mask
from rlring.attention.score_mod import ScoreMod
from rlring.errors import UsageError


def platform_of(device: jax.Device) -> str:
    """Returns the platform of a device as make_kernel() wants it."""
    # Their matrix unit takes no bfloat16 from a kernel of one's own: the compiler refuses it (libtpu 0.0.52).
    is_old = device.platform == "tpu" and device.device_kind.startswith(("TPU v2", "TPU v3"))
    return "old tpu" if is_old else device.platform


def features(q, v, mask: Mask, mod: ScoreMod, *, needs_lse: bool) -> dict[str, object]:
    """Returns what a kernel may lack, with its value as an error shows it."""
    wanted = {
        mask.kind or "kind of mask": mask.kind and type(mask).__name__,
        "window": mask.window,
        "soft_cap": mod.soft_cap,
        "bias": mod.bias,
        "slopes": mod.slopes,
        "dropout": mod.dropout or None,
        "sinks and log-sum-exp": needs_lse or None,
        "size of values": v.shape[3] if v.shape[3] != q.shape[3] else None,
    }
    shown = {
        name: value if isinstance(value, int | float | tuple | str) else "an array" for name, value in wanted.items()
    }
    return {name: shown[name] for name, value in wanted.items() if value is not None}


class Device(NamedTuple):
    """What a kernel is asked to run on, and the arrays."""

    platform: str  # platform_of()
    dtype: jnp.dtype
    head_size: int


class Row(NamedTuple):
    """A kernel of the table."""

    make: Callable[[Blocks, Kernel], Kernel]  # the second kernel computes the masks that the first one lacks
    lacks: tuple[str, ...] = ()  # of what features() returns
    cannot_run: Callable[[Device], str | None] = lambda device: None  # returns the reason

    def reason(self, device: Device, wanted: Mapping[str, object]) -> str | None:
        """Returns why the kernel cannot compute this, or None."""
        missing = next((feature for feature in self.lacks if feature in wanted), None)
        if (reason := self.cannot_run(device)) or missing is None:
            return reason
        return f"it knows no {missing}; got {missing}={wanted[missing]}. Leave it out"


def _no_splash(device: Device) -> str | None:
    if device.platform != "tpu":
        return f"it needs a TPU from v4 on, and the mesh has {device.platform} devices; run it on one"
    if device.dtype not in DTYPES:
        return f"it computes in float32 and bfloat16; got {device.dtype.name}. Cast q, k and v"
    return None


def _no_cudnn(device: Device) -> str | None:
    if device.platform not in ("gpu", "cuda"):
        return f"it needs an NVIDIA GPU, and the mesh has {device.platform} devices; run it on such a GPU"
    return unavailable(device.dtype, device.head_size)


KINDS = ("mask of a function", "block mask")  # Mask.kind
TABLE = {
    "jax": Row(lambda blocks, other: BlockwiseKernel(blocks)),
    "cudnn": Row(
        lambda blocks, other: RectangleKernel(CudnnTile(), other),
        (*KINDS, "window", "soft_cap", "bias", "slopes", "dropout", "sinks and log-sum-exp", "size of values"),
        _no_cudnn,
    ),
    "splash": Row(
        lambda blocks, other: SplashKernel(blocks),
        (*KINDS, "bias", "slopes", "dropout", "size of values"),
        _no_splash,
    ),
}
KERNELS = ("auto", *TABLE)
BEST_FIRST = ("splash", "cudnn", "jax")  # what "auto" considers


def make_kernel(
    name: str,
    blocks: Blocks,
    *,
    platform: str,
    dtype: jnp.dtype,
    head_size: int,
    wanted: Mapping[str, object] = MappingProxyType({}),
) -> Kernel:
    """Returns the kernel of this name for arrays of this type and head size, and features(), on a platform: "cpu",
    "gpu", "tpu", or "old tpu", before v4.

        jax      plain JAX: every device, type, mask and feature
        splash   TPU from v4 on, float32 and bfloat16: every mask, scale, soft cap, sinks and log-sum-exp
        cudnn    NVIDIA from Ampere on, bfloat16 and float16: masks without a window that are whole rectangles or the
                 causal triangle, as the hops of a ring are over one causal sequence, in its order or in zigzag. Whether
                 a hop is one is known when it runs: what sees a hop that is none (packed sequences, striped or shuffled
                 tokens, padding among the keys that are seen) is NaN, out and gradients
        auto     splash on a TPU that takes the type, cudnn on a GPU where it is available, and jax for the masks and
                 hops that cudnn lacks; else jax

    Raises:
        UsageError: there is no such kernel, it cannot run here, or it lacks a feature. Nothing but "auto" chooses
            another one.
    """
    if name not in KERNELS:
        raise UsageError(f"there is no attention kernel {name!r}. Choose one of {', '.join(KERNELS)}.")
    device = Device(platform, jnp.dtype(dtype), head_size)
    if name == "auto":
        # A window is no reason against cuDNN here: "jax" computes the hops that need it.
        needed = {feature: value for feature, value in wanted.items() if feature != "window"}
        best = next(row for row in map(TABLE.get, BEST_FIRST) if not row.reason(device, needed))
        return best.make(blocks, BlockwiseKernel(blocks))
    if reason := TABLE[name].reason(device, wanted):
        raise UsageError(f"attention kernel {name!r} cannot run: {reason}. Or use kernel 'auto' or 'jax'.")
    return TABLE[name].make(blocks, Refusal())
