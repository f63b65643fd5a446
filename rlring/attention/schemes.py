"""The table of attention schemes: how each is built and what it can split; and AttentionConfig, which chooses one."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np
from jaxtyping import Array

from rlring.attention.all_gather import GatheringKernel
from rlring.attention.axes import MeshAxes
from rlring.attention.blocks import Blocks, default_block
from rlring.attention.dense import dense
from rlring.attention.fixed_order import FixedOrderKernel
from rlring.attention.kernel import Kernel, attend
from rlring.attention.kernels import KERNELS, features, make_kernel
from rlring.attention.mask import Mask
from rlring.attention.ring import RingKernel
from rlring.attention.ring_transport import Transport
from rlring.attention.score_mod import ScoreMod
from rlring.attention.sparse import SparseKernel
from rlring.attention.sparse_pattern import SparsePattern
from rlring.attention.ulysses import ulysses_attention
from rlring.errors import UsageError

DETERMINISTIC = ("ring", "blockwise")
Attend = Callable[[Array, Array, Array, Mask, ScoreMod], tuple[Array, Array]]  # q, k, v -> out, lse


@dataclass(frozen=True)
class AttentionConfig:
    """How attention is computed. Only `sparse` changes the result; the rest changes speed and memory.

    Raises:
        UsageError: an unknown scheme or kernel, a block without tokens, a pattern without scheme "sparse" or the other
            way round, or deterministic=True with a scheme or kernel that is not.
    """

    scheme: str = "ring"
    """A row of SCHEMES, or "auto": a fixed rule on shapes and mesh (choose.choose_scheme)."""
    block_q: int | None = None
    """Tokens in a block of queries; shorter sequences use shorter blocks. None: a default for the platform."""
    block_k: int | None = None
    """Tokens in a block of keys."""
    scores: int = 2**20
    """Scores that are computed at once. A CPU's cache holds no more than the default; accelerators like 2**24."""
    kernel: str = "jax"
    """Name of the kernel that computes a block (kernels.make_kernel). Schemes "dense" and "sparse" use plain JAX."""
    transport: Transport | None = None
    """Whether a ring overlaps transfers with computation (ring_transport). None: a default for the platform."""
    sparse: SparsePattern | None = None
    """With scheme "sparse": which blocks of the context each head sees."""
    forward_mode: bool = False
    """True: differentiable by jax.jvp, not by jax.grad. False: by jax.grad, not by jax.jvp. A Hessian-vector product,
    jax.jvp of jax.grad, needs False."""
    deterministic: bool = False
    """The same bits on a ring of any size: the output, the log-sum-exp and the gradients of q, k, v and of a bias
    [N, T, S] equal those of one device bit for bit. Not the gradients of sinks and slopes, which are sums over devices.

    Needs scheme "ring" or "blockwise" and kernel "jax". Backend, versions, compiler flags, blocks, batch rows and heads
    on a device, and the program around the attention must be the same on all rings. The tokens must be in the same
    order, so not in the zigzag or striped order, which depend on the ring. The share of each device must be a multiple
    of the blocks: 256 tokens on a CPU and 512 elsewhere, unless block_q and block_k are set."""

    def __post_init__(self):
        if self.scheme not in ("auto", *SCHEMES):
            raise UsageError(
                f"there is no attention scheme {self.scheme!r}. Choose one of {', '.join(('auto', *SCHEMES))}."
            )
        if self.kernel not in KERNELS:
            raise UsageError(f"there is no attention kernel {self.kernel!r}. Choose one of {', '.join(KERNELS)}.")
        for name in ("block_q", "block_k", "scores"):
            number = getattr(self, name)
            if number is not None and (not isinstance(number, int | np.integer) or number < 1):
                raise UsageError(
                    f"attention.{name} is a whole number of at least 1; got {number}. Leave it out for the default."
                )
        if (self.scheme == "sparse") != (self.sparse is not None):
            raise UsageError(
                f"scheme 'sparse' and attention.sparse go together; got scheme {self.scheme!r} with sparse="
                f"{self.sparse}. Use scheme='sparse' with sparse=SparsePattern(...), or neither of the two."
            )
        if self.deterministic and self.scheme not in DETERMINISTIC:
            raise UsageError(
                f"attention scheme {self.scheme!r} has no fixed order of blocks; got deterministic=True. Use scheme "
                "'ring' over mesh.ring, or 'blockwise' on one device."
            )
        if self.deterministic and self.kernel != "jax":
            raise UsageError(
                f"attention kernel {self.kernel!r} has no fixed order of blocks; got deterministic=True. "
                "Use kernel 'jax'."
            )

    def blocks(self, platform: str, *, is_split: bool) -> Blocks:
        """Returns the blocks, with the platform's defaults for fields that are None.

        Args:
            is_split: whether the sequence is split over devices.
        """
        default = default_block(platform, is_split=is_split or self.deterministic)
        return Blocks(self.block_q or default, self.block_k or default, self.scores)


class Setting(NamedTuple):
    """The settings and the mesh axes with which a scheme is built."""

    config: AttentionConfig
    platform: str  # from kernels.platform_of()
    axes: MeshAxes  # the axes that the mesh has
    needs_lse: bool  # whether the log-sum-exp is returned or used, so that it may have a gradient

    def on_kernel(self, of: Callable[[Kernel], Kernel] | None = None) -> Attend:
        """Returns attention with the kernel of the settings. With `of`, with the kernel of(kernel), which works on
        shards of the sequence."""

        def run(q, k, v, mask: Mask, mod: ScoreMod):
            blocks = self.blocks(is_split=of is not None)
            if of and not self.config.deterministic:
                blocks = blocks.within_halves(q.shape[1], k.shape[1])
            wanted = features(q, v, mask, mod, needs_lse=self.needs_lse)
            of_arrays = {"dtype": q.dtype, "head_size": q.shape[3], "wanted": wanted}
            kernel = make_kernel(self.config.kernel, blocks, platform=self.platform, **of_arrays)
            fixed = FixedOrderKernel(kernel) if self.config.deterministic else None
            kernel, now = (kernel, mod) if fixed is None else (fixed, replace(mod, sinks=None))
            out = attend(q, k, v, mask, now, of(kernel) if of else kernel, forward_mode=self.config.forward_mode)
            return out if fixed is None else fixed.with_sinks(*out, mod.sinks)

        return run

    def blocks(self, *, is_split: bool) -> Blocks:
        return self.config.blocks(self.platform, is_split=is_split)

    def by_heads(self, local: Attend) -> Attend:
        """Returns attention that splits the heads over the ulysses axis and calls `local` on each part."""
        if self.axes.ulysses is None:
            return local
        return lambda *arrays: ulysses_attention(*arrays, axis=self.axes.ulysses, local=local)


class Scheme(NamedTuple):
    """An attention scheme of the table."""

    make: Callable[[Setting], Attend]
    splits: tuple[str, ...] = ()  # the fields of MeshAxes over which it can split the sequence
    splits_heads: bool = False  # whether it splits the heads over ulysses


def _ring(here: Setting) -> Attend:
    if here.axes.ring is None:
        return here.on_kernel()
    transport = here.config.transport or Transport.of(here.platform)
    return here.on_kernel(lambda kernel: RingKernel(here.axes.ring, kernel, transport))


def _all_gather(here: Setting) -> Attend:
    return here.on_kernel(lambda kernel: GatheringKernel(here.axes.sequence, kernel) if here.axes.sequence else kernel)


def _sparse(here: Setting) -> Attend:
    def run(q, k, v, mask: Mask, mod: ScoreMod):
        kernel = SparseKernel(here.config.sparse, here.blocks(is_split=False), k.shape[2], here.axes.ulysses)
        local = partial(attend, kernel=kernel, forward_mode=here.config.forward_mode)
        return here.by_heads(local)(q, k, v, mask, mod)

    return run


SCHEMES = {
    "dense": Scheme(lambda here: dense),
    "blockwise": Scheme(lambda here: here.on_kernel()),
    "ring": Scheme(_ring, ("ring",)),
    "all_gather": Scheme(_all_gather, ("ring", "ulysses")),
    "ulysses": Scheme(lambda here: here.by_heads(here.on_kernel()), ("ulysses",), splits_heads=True),
    # USP, Fang and Zhao 2405.07719
    "hybrid": Scheme(lambda here: here.by_heads(_ring(here)), ("ring", "ulysses"), splits_heads=True),
    "sparse": Scheme(_sparse, ("ulysses",), splits_heads=True),
}
