"""The table of kernels: how each is made, which features it lacks and where it runs. make_kernel() chooses one."""

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
    """Returns the platform of a device by make_kernel()'s names: "cpu", "gpu", "tpu", or "old tpu" (v2 and v3)."""
    # On TPU v2 and v3 the compiler refuses bfloat16 matrix products in custom kernels (libtpu 0.0.52).
    is_old = device.platform == "tpu" and device.device_kind.startswith(("TPU v2", "TPU v3"))
    return "old tpu" if is_old else device.platform


def features(q, v, mask: Mask, mod: ScoreMod, *, needs_lse: bool) -> dict[str, object]:
    """Returns the features that this call needs and that a kernel may lack, with their values for error messages."""
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
    """The platform on which a kernel is to run, and the type and head size of the arrays."""

    platform: str  # from platform_of()
    dtype: jnp.dtype
    head_size: int


class Row(NamedTuple):
    """A kernel of the table."""

    make: Callable[[Blocks, Kernel], Kernel]  # the argument kernel is used for masks that the made kernel lacks
    lacks: tuple[str, ...] = ()  # unsupported features: keys of features()
    cannot_run: Callable[[Device], str | None] = lambda device: None  # returns the reason, or None if it can run

    def reason(self, device: Device, wanted: Mapping[str, object]) -> str | None:
        """Returns the reason why the kernel cannot run on this device with these features; None if it can."""
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


KINDS = ("mask of a function", "block mask")  # values of Mask.kind
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
BEST_FIRST = ("splash", "cudnn", "jax")  # the kernels that "auto" tries, in this order


def make_kernel(
    name: str,
    blocks: Blocks,
    *,
    platform: str,
    dtype: jnp.dtype,
    head_size: int,
    wanted: Mapping[str, object] = MappingProxyType({}),
) -> Kernel:
    """Returns the kernel called `name` for arrays of this type and head size, and for the features() `wanted`.

    The platform is "cpu", "gpu", "tpu", or "old tpu" (before v4).

        jax      plain JAX: every device, type, mask and feature
        splash   TPU from v4 on, float32 and bfloat16: positions, segments and windows (no FunctionMask or BlockMask),
                 scale, soft cap, sinks and log-sum-exp
        cudnn    NVIDIA from Ampere on, bfloat16 and float16: masks without a window that are whole rectangles or the
                 causal triangle. The steps of a ring over one causal sequence, in order or in zigzag order, have such
                 masks. Whether a mask is one is only known at run time: with others (packed sequences, striped or
                 shuffled tokens, padding among visible keys), output and gradients are NaN
        auto     splash on a TPU that supports the type; cudnn on a GPU where it is available, with jax for masks that
                 cudnn lacks; otherwise jax

    Raises:
        UsageError: there is no such kernel, it cannot run here, or it lacks a feature. Only "auto" falls back to
            another kernel.
    """
    if name not in KERNELS:
        raise UsageError(f"there is no attention kernel {name!r}. Choose one of {', '.join(KERNELS)}.")
    device = Device(platform, jnp.dtype(dtype), head_size)
    if name == "auto":
        # A window does not exclude cuDNN here, because "jax" computes the masks where the window matters.
        needed = {feature: value for feature, value in wanted.items() if feature != "window"}
        best = next(row for row in map(TABLE.get, BEST_FIRST) if not row.reason(device, needed))
        return best.make(blocks, BlockwiseKernel(blocks))
    if reason := TABLE[name].reason(device, wanted):
        raise UsageError(f"attention kernel {name!r} cannot run: {reason}. Or use kernel 'auto' or 'jax'.")
    return TABLE[name].make(blocks, Refusal())
