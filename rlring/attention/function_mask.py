"""FunctionMask: a mask given by a function of the caller."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int32, Shaped

from rlring.attention.block_view import PairsView
from rlring.attention.mask import Mask
from rlring.errors import UsageError, shown


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FunctionMask(Mask):
    """A mask given by a function of positions and segments.

    The function is called for one sequence, or for blocks of one sequence, with arguments that broadcast:

        function(q_position[T, 1], k_position[1, S], q_segment[T, 1], k_segment[1, S], *operands) -> bool[T, S]

    A query sees a key if the function returns True, also across segments, and if the key is in the window, if there is
    one (Mask.within). Segment -1 is always padding. The function must not close over traced arrays. Pass them as
    operands, arrays [B, ...] of which the function gets the row of its sequence. A mask has no gradient.

    Each call of a kernel evaluates the function once for all pairs of its tokens, block by block: blocks that no query
    sees are skipped, and fully visible blocks need no mask. The function is static for jax.jit, so define it once and
    not at every call.

    A prefix of 16 tokens that all tokens see, and a prefix whose length differs between sequences:

        FunctionMask.of(lambda q, k, q_segment, k_segment: (k <= q) | (k < 16), position)
        FunctionMask.of(lambda q, k, q_segment, k_segment, n: (k <= q) | (k < n), position, operands=(length,))

    If keys are other tokens than queries: dataclasses.replace(mask, k_position=..., k_segment=...).
    """

    function: Callable[..., Array] = field(kw_only=True, metadata={"static": True})
    operands: tuple[Shaped[Array, "B ..."], ...] = field(default=(), kw_only=True)

    kind: ClassVar[str | None] = "mask of a function"

    @classmethod
    def of(
        cls,
        function: Callable[..., Array],
        position: Int32[Array, "B T"],
        segment: Int32[Array, "B T"] | None = None,
        operands: tuple[Shaped[Array, "B ..."], ...] = (),
    ) -> "FunctionMask":
        """Returns the mask of self-attention; without `segment` every token is in segment 0.

        Raises:
            UsageError: `function` is not a function, does not return booleans that broadcast to [T, S], or closes over
                a traced array; or operands is not a tuple of arrays with a row for each sequence.
        """
        _check(function, operands, rows=position.shape[0])
        every = Mask.full(position, segment)
        return every.as_kind(cls, function=function, operands=tuple(map(jnp.asarray, operands)))

    def visible(self) -> Bool[Array, "B T S"]:
        def of_sequence(q_position, k_position, q_segment, k_segment, operands) -> Bool[Array, "T S"]:
            of_q, of_k = (x[:, None] for x in (q_position, q_segment)), (x[None] for x in (k_position, k_segment))
            (q_position, q_segment), (k_position, k_segment) = of_q, of_k
            seen = self.function(q_position, k_position, q_segment, k_segment, *operands)
            seen &= self._in_window(q_position, k_position, q_position, k_position)
            return seen & (q_segment >= 0) & (k_segment >= 0)

        tokens = self.q_position, self.k_position, self.q_segment, self.k_segment
        return jax.vmap(of_sequence)(*tokens, self.operands)

    def maybe_needed(self) -> Bool[Array, "B T S"]:
        return (self.q_segment >= 0)[:, :, None] & (self.k_segment >= 0)[:, None]

    def shows_any(self) -> Bool[Array, ""]:
        # Does not evaluate the function: if nothing is visible, evaluating it is all that a kernel does anyway.
        return ((self.q_segment >= 0).any(1) & (self.k_segment >= 0).any(1)).any()

    def view(self, q_size: int, k_size: int) -> PairsView:
        def blocks(x: Int32[Array, "B T"], size: int) -> Int32[Array, "blocks B size"]:
            return jnp.moveaxis(x.reshape(x.shape[0], -1, size), 1, 0)

        of_q, of_k = ((self.q_position, self.q_segment), q_size), ((self.k_position, self.k_segment), k_size)
        q_blocks, k_blocks = (tuple(blocks(x, size) for x in arrays) for arrays, size in (of_q, of_k))
        # One pair of blocks at a time: all pairs of tokens at once would need memory quadratic in the length.
        seen = lax.map(lambda q: lax.map(partial(self._seen, q), k_blocks), q_blocks)
        return PairsView(*(jnp.moveaxis(x, 2, 0) for x in seen))

    def _seen(self, q, k) -> tuple[Bool[Array, "B"], Bool[Array, "B"]]:
        """Returns, for each sequence, whether any query of a block sees any key of a block, and whether all see all."""
        (q_position, q_segment), (k_position, k_segment) = q, k
        tokens = {"q_position": q_position, "q_segment": q_segment, "k_position": k_position, "k_segment": k_segment}
        seen = replace(self, **tokens).visible()
        return seen.any((1, 2)), seen.all((1, 2))


def _check(function, operands, rows: int) -> None:
    if not callable(function):
        raise UsageError(
            "the mask of a function needs one of (q_position, k_position, q_segment, k_segment, *operands); got "
            f"{shown(function)}. Where the mask is an array of blocks it is a BlockMask."
        )
    shapes = [getattr(x, "shape", ()) for x in operands] if isinstance(operands, tuple) else [()]
    if any(shape[:1] != (rows,) for shape in shapes):
        raise UsageError(
            f"the operands of a mask are a tuple of arrays with a row for each of the {rows} sequences; got "
            f"{', '.join(map(str, shapes)) if isinstance(operands, tuple) else shown(operands)}. Broadcast what all "
            "sequences share."
        )
    queries, keys = jax.ShapeDtypeStruct((2, 1), jnp.int32), jax.ShapeDtypeStruct((1, 3), jnp.int32)
    of_sequence = (jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in operands)
    closed, seen = jax.make_jaxpr(function, return_shape=True)(queries, keys, queries, keys, *of_sequence)
    if any(isinstance(x, jax.core.Tracer) for x in closed.consts):
        raise UsageError(
            "the function of a mask closes over a traced array, which the gradient of attention could not reach. Give "
            "it as one of the operands: FunctionMask.of(function, position, segment, operands=(array,))."
        )
    shape, dtype = getattr(seen, "shape", None), getattr(seen, "dtype", None)
    fits = shape is not None and len(shape) <= 2 and jnp.broadcast_shapes(shape, (2, 3)) == (2, 3)
    if not fits or dtype != jnp.bool_:
        raise UsageError(
            "the function of a mask returns booleans that broadcast to [T, S] of q_position[T, 1] and k_position[1, "
            f"S]; got {shown(seen) if shape is None else f'{dtype}{list(shape)} where T=2 and S=3'}. Compare, and "
            "combine with & and |."
        )
