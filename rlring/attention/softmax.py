"""PartialAttention: softmax attention over a part of the keys; merge() combines parts; Whole is over all keys."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

from rlring.attention.exponential import power_of_two

LOG_2 = float(np.log(2))


class Whole(NamedTuple):
    """Attention over all keys.

    The sum of the exponentials of the logits is total * 2**exponent. Storing only its logarithm would lose digits: at
    logits of 40,000, rounding the log-sum-exp changes every weight by 0.2 %. A query that sees no key has 0 in all
    three arrays.
    """

    out: Float[Array, "B T N H"]
    exponent: Float[Array, "B N T"]  # integer-valued
    total: Float[Array, "B N T"]

    @property
    def lse(self) -> Float[Array, "B N T"]:
        """The log-sum-exp of the logits (natural logarithm); -inf for queries that see no key."""
        lse = self.exponent * LOG_2 + jnp.log(divisor(self.total))
        return jnp.where(self.total == 0.0, -jnp.inf, lse)


class PartialAttention(NamedTuple):
    """Attention over some of the keys, in the accumulator's type, because the parts of a context are merged many times.

    A query that sees no key has 0 in all three arrays, the neutral element of merge().
    """

    out: Float[Array, "B T N H"]  # not yet divided by total
    exponent: Float[Array, "B N T"]  # as in Whole
    total: Float[Array, "B N T"]  # as in Whole

    @classmethod
    def of(cls, out: Float[Array, "B T N H"], lse: Float[Array, "B N T"]) -> "PartialAttention":
        """Returns the PartialAttention for the output and log-sum-exp of a library kernel."""
        log2 = lse / LOG_2
        exponent = finite(jnp.floor(log2))
        total = power_of_two(log2, exponent)
        return cls(out * by_token(total), exponent, total)

    def whole(self) -> Whole:
        """Returns this attention as attention over all keys: divides the output by the total."""
        return Whole(self.out / by_token(divisor(self.total)), self.exponent, self.total)

    def padded(self, length: int) -> "PartialAttention":
        """Returns it with queries that see no key appended up to `length`."""
        more = length - self.out.shape[1]
        numbers = (jnp.pad(x, ((0, 0), (0, 0), (0, more))) for x in (self.exponent, self.total))
        return PartialAttention(jnp.pad(self.out, ((0, 0), (0, more), (0, 0), (0, 0))), *numbers)

    def cut(self, length: int) -> "PartialAttention":
        """Returns it for the first `length` queries."""
        return PartialAttention(self.out[:, :length], self.exponent[:, :, :length], self.total[:, :, :length])


def accumulator_type(dtype: DTypeLike) -> jnp.dtype:
    """Returns the type in which scores, sums and gradients are computed: at least float32."""
    # Compares sizes, because JAX refuses to promote types if the user has set strict promotion.
    return jnp.dtype(dtype if jnp.dtype(dtype).itemsize > 4 else jnp.float32)


def product(subscripts: str, a: Float[Array, "..."], b: Float[Array, "..."], dtype: jnp.dtype) -> Float[Array, "..."]:
    """Returns the einsum of a and b, accumulated in `dtype`; both are cast to the wider of their types."""
    wider = max(a.dtype, b.dtype, key=lambda dtype: dtype.itemsize)
    return jnp.einsum(subscripts, a.astype(wider), b.astype(wider), preferred_element_type=dtype)


def nothing(q: Float[Array, "B T N H"], v: Float[Array, "B S K V"]) -> PartialAttention:
    """Returns the PartialAttention over no keys, for these queries and the head size of these values."""
    batch, length, heads, _ = q.shape
    dtype = accumulator_type(q.dtype)
    zero = zeros((batch, heads, length), dtype, q)
    return PartialAttention(zeros((batch, length, heads, v.shape[3]), dtype, q), zero, zero)


def zeros(shape: tuple[int, ...], dtype: jnp.dtype, like: Array) -> Float[Array, "..."]:
    """Returns zeros with the varying manual axes of `like`, for jax.shard_map."""
    return lax.pcast(jnp.zeros(shape, dtype), tuple(jax.typeof(like).manual_axis_type.varying), to="varying")


def merge(a: PartialAttention, b: PartialAttention) -> PartialAttention:
    """Returns attention over the union of the keys of a and b, which must be disjoint. No exponential can overflow."""
    exponents = exponent_or_none(a.exponent, a.total), exponent_or_none(b.exponent, b.total)
    exponent = finite(jnp.maximum(*exponents))
    fade_a, fade_b = (power_of_two(x, exponent) for x in exponents)
    out = a.out * by_token(fade_a) + b.out * by_token(fade_b)
    return PartialAttention(out, exponent, a.total * fade_a + b.total * fade_b)


def by_token(x: Shaped[Array, "B N T"]) -> Shaped[Array, "B T N 1"]:
    """Returns an array of one number per query in a shape that broadcasts against arrays of queries."""
    return jnp.swapaxes(x, 1, 2)[..., None]


def exponent_or_none(exponent: Float[Array, "..."], total: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns the exponent, with -inf for queries that see no key, so that any other exponent is greater."""
    return jnp.where(total == 0.0, -jnp.inf, exponent)


def finite(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns x with -inf replaced by 0, so that differences from it give 0 and not NaN for queries that see no key."""
    return jnp.where(x == -jnp.inf, 0.0, x)


def divisor(total: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns total with 0 replaced by 1, so that the output of a query that sees no key is 0 and not NaN."""
    return jnp.where(total == 0.0, 1.0, total)
