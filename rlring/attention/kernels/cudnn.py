"""The NVIDIA kernel: cuDNN's fused attention, called through JAX's private primitives.

The public jax.nn.dot_product_attention does not suffice: it rounds the log-sum-exp to the compute type, and has no
backward that takes output and log-sum-exp over all keys. Only this file uses private parts of JAX for cuDNN, and
unavailable() returns the reason if they cannot be used.
"""

import inspect
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

# The operands of the primitives, in order.
OPERANDS = ("query", "key", "value", "bias", "q_seqlen", "kv_seqlen", "q_offsets", "kv_offsets")
OPERANDS += ("page_table_k", "page_table_v")
DTYPES = (jnp.bfloat16, jnp.float16)
OLDEST_GPU = 8.0  # compute capability: Ampere
HOPPER = 9.0


class CudnnTile(NamedTuple):
    """A rectangles.Tile computed by cuDNN.

    The lse and all sums are float32. The output, dq, dk and dv of one call are rounded to the compute type.
    """

    def forward(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K H"],
        v: Float[Array, "B S K H"],
        *,
        scale: float,
        is_causal: bool,
    ) -> tuple[Float[Array, "B T N H"], Float32[Array, "B N T"]]:
        from jax._src.cudnn import fused_attention_stablehlo as cudnn

        primitive = cudnn._dot_product_attention_fwd_p_wrapper
        out, lse = primitive.bind(*_operands(q, k, v), is_training=True, **_parameters(scale, is_causal))
        return out, lse

    def backward(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K H"],
        v: Float[Array, "B S K H"],
        out: Float[Array, "B T N H"],
        lse: Float32[Array, "B N T"],
        d_out: Float[Array, "B T N H"],
        *,
        scale: float,
        is_causal: bool,
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K H"]]:
        from jax._src.cudnn import fused_attention_stablehlo as cudnn

        primitive = cudnn._dot_product_attention_bwd_p_wrapper
        dq, dk, dv = primitive.bind(*_operands(q, k, v), lse, out, d_out, **_parameters(scale, is_causal))
        return dq, dk, dv


def unavailable(dtype: DTypeLike, head_size: int) -> str | None:
    """Returns the reason why cuDNN cannot compute attention of this type and head size here; None if it can."""
    if dtype not in DTYPES:
        return f"it computes in bfloat16 and float16, not in {jnp.dtype(dtype).name}: cast q, k and v"
    if not _has_route():
        return f"JAX {jax.__version__} has no route to it that rlring knows: use another version of JAX"
    gpus = [device for device in jax.devices() if device.platform == "gpu"]
    if not gpus or "cuda" not in gpus[0].client.platform_version:
        return (
            f"it needs an NVIDIA GPU, and JAX sees {jax.devices()[0].platform}: install jax[cuda13] on such a machine"
        )
    capability = float(gpus[0].compute_capability)
    if capability < OLDEST_GPU:
        return f"it needs compute capability {OLDEST_GPU}, and {gpus[0].device_kind} has {capability}"
    longest = 256 if capability >= HOPPER else 128
    if head_size % 8 or head_size > longest:
        return f"on {gpus[0].device_kind} its head size is a multiple of 8 up to {longest}, not {head_size}"
    return None


def _has_route() -> bool:
    """Returns whether this version of JAX has the two primitives with the parameters used here."""
    try:
        from jax._src.cudnn import fused_attention_stablehlo as cudnn
    except ImportError:
        return False
    names = ("_dot_product_attention_fwd_p_wrapper", "_dot_product_attention_bwd_p_wrapper")
    names += ("_dot_product_attention_fwd_abstract", "MaskType", "AttentionLayout")
    if not all(hasattr(cudnn, name) for name in names):
        return False
    taken = set(inspect.signature(cudnn._dot_product_attention_fwd_abstract).parameters)
    return set(OPERANDS) | set(_parameters(1.0, True)) - {"score_mod"} <= taken


def _operands(q, k, v) -> tuple[Array, ...]:
    unused = jnp.zeros(0, q.dtype)
    return q, k, v, *[unused] * (len(OPERANDS) - 3)


def _parameters(scale: float, is_causal: bool) -> dict:
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    parameters = {
        "scale": scale,
        "seed": 42,  # unused, because there is no dropout
        "dropout_rate": 0.0,
        "variadic_args": (False, False),  # (has a bias, has a gradient of the bias)
        "mask_type": cudnn.MaskType.CAUSAL if is_causal else cudnn.MaskType.NO_MASK,
        "layout": cudnn.AttentionLayout.BTNH.value,
        "sliding_window_length": 0,
    }
    if "score_mod" in inspect.signature(cudnn._dot_product_attention_fwd).parameters:  # JAX 0.12
        parameters["score_mod"] = None
    return parameters
