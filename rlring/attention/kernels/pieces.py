"""Attention over more keys than one call of a kernel supports: computed piece by piece."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from rlring.attention.blocks import joined, pad
from rlring.attention.kernel import Gradients
from rlring.attention.mask import Mask
from rlring.attention.softmax import PartialAttention, merge, nothing


def forward_by_pieces(
    forward: Callable[[Array, Array, Mask], PartialAttention],
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    mask: Mask,
    before: PartialAttention | None,
    length: int,
) -> PartialAttention:
    """Returns the merged results of forward(k, v, mask) for pieces of `length` keys, and of `before` if given."""
    if k.shape[1] <= length:
        here = forward(k, v, mask)
        return here if before is None else merge(before, here)

    def add(total: PartialAttention, piece) -> tuple[PartialAttention, None]:
        return merge(total, forward(*piece)), None

    return lax.scan(add, nothing(q, v) if before is None else before, _cut(k, v, mask, length))[0]


def backward_by_pieces(
    backward: Callable[[Array, Array, Mask], Gradients],
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    mask: Mask,
    before: Gradients | None,
    length: int,
) -> Gradients:
    """Returns the gradients from backward(k, v, mask) for pieces of `length` keys, added to `before` if given."""
    if k.shape[1] <= length:
        here = backward(k, v, mask)
    else:

        def add(dq, piece):
            found = backward(*piece)
            return dq + found.dq, (found.dk, found.dv)

        dq, parts = lax.scan(add, jnp.zeros(q.shape, jnp.float32), _cut(k, v, mask, length))
        here = Gradients(dq, *(joined(part, 1)[:, : k.shape[1]] for part in parts))
    return here if before is None else jax.tree.map(jnp.add, before, here)


def _cut(k, v, mask: Mask, length: int) -> tuple[Array, Array, Mask]:
    """Returns k, v and the mask as stacks [pieces, ...]; the last piece is filled up with padding."""
    count = -(-k.shape[1] // length)
    mask = mask.padded(mask.q_position.shape[1], count * length)

    def cut(x):
        x = pad(x, 1, count * length)
        return jnp.moveaxis(x.reshape(x.shape[0], count, length, *x.shape[2:]), 1, 0)

    return cut(k), cut(v), mask.map_queries(lambda x: jnp.stack([x] * count)).map_keys(cut)
