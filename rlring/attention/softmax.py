"""PartialAttention and merge(): softmax attention over a part of the keys, and how parts add up to the Whole."""

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

    The sum of the exponentials of the scores is total * 2**exponent. Its logarithm alone would lose digits: at scores
    of 40,000, rounding the log-sum-exp changes every weight by 0.2 %. A row that sees nothing is 0 in all three.
    """

    out: Float[Array, "B T N H"]
    exponent: Float[Array, "B N T"]  # a whole number
    total: Float[Array, "B N T"]

    @property
    def lse(self) -> Float[Array, "B N T"]:
        """The natural logarithm of the sum of the exponentials of the scores; -inf where nothing is seen."""
        lse = self.exponent * LOG_2 + jnp.log(divisor(self.total))
        return jnp.where(self.total == 0.0, -jnp.inf, lse)


class PartialAttention(NamedTuple):
    """Attention over some of the keys, in the accumulator's type: the parts of a long context are merged many times.

    A row that sees nothing is 0 in all three, the neutral element of merge().
    """

    out: Float[Array, "B T N H"]  # still to be divided by the total
    exponent: Float[Array, "B N T"]  # as those of the Whole
    total: Float[Array, "B N T"]

    @classmethod
    def of(cls, out: Float[Array, "B T N H"], lse: Float[Array, "B N T"]) -> "PartialAttention":
        """Returns what a kernel of the hardware found, which gives its log-sum-exp only."""
        log2 = lse / LOG_2
        exponent = finite(jnp.floor(log2))
        total = power_of_two(log2, exponent)
        return cls(out * by_token(total), exponent, total)

    def whole(self) -> Whole:
        """Returns it as attention over all keys."""
        return Whole(self.out / by_token(divisor(self.total)), self.exponent, self.total)

    def padded(self, length: int) -> "PartialAttention":
        """Returns it with queries that see nothing appended up to the length."""
        more = length - self.out.shape[1]
        numbers = (jnp.pad(x, ((0, 0), (0, 0), (0, more))) for x in (self.exponent, self.total))
        return PartialAttention(jnp.pad(self.out, ((0, 0), (0, more), (0, 0), (0, 0))), *numbers)

    def cut(self, length: int) -> "PartialAttention":
        """Returns it of the first `length` queries."""
        return PartialAttention(self.out[:, :length], self.exponent[:, :, :length], self.total[:, :, :length])


def accumulator_type(dtype: DTypeLike) -> jnp.dtype:
    """Returns the type of scores, sums and gradients until they are returned: at least float32."""
    # By size: JAX refuses to promote where the user has it strict.
    return jnp.dtype(dtype if jnp.dtype(dtype).itemsize > 4 else jnp.float32)


def product(subscripts: str, a: Float[Array, "..."], b: Float[Array, "..."], dtype: jnp.dtype) -> Float[Array, "..."]:
    """Returns einsum, added up in this type, of arrays of any two: the narrower is taken as the wider."""
    wider = max(a.dtype, b.dtype, key=lambda dtype: dtype.itemsize)
    return jnp.einsum(subscripts, a.astype(wider), b.astype(wider), preferred_element_type=dtype)


def nothing(q: Float[Array, "B T N H"], v: Float[Array, "B S K V"]) -> PartialAttention:
    """Returns the PartialAttention over no keys at all."""
    batch, length, heads, _ = q.shape
    dtype = accumulator_type(q.dtype)
    zero = zeros((batch, heads, length), dtype, q)
    return PartialAttention(zeros((batch, length, heads, v.shape[3]), dtype, q), zero, zero)


def zeros(shape: tuple[int, ...], dtype: jnp.dtype, like: Array) -> Float[Array, "..."]:
    """Returns zeros that jax.shard_map takes to differ between the devices between which `like` differs."""
    return lax.pcast(jnp.zeros(shape, dtype), tuple(jax.typeof(like).manual_axis_type.varying), to="varying")


def merge(a: PartialAttention, b: PartialAttention) -> PartialAttention:
    """Returns attention over the union of two disjoint sets of keys. No exponential can overflow."""
    exponents = exponent_or_none(a.exponent, a.total), exponent_or_none(b.exponent, b.total)
    exponent = finite(jnp.maximum(*exponents))
    fade_a, fade_b = (power_of_two(x, exponent) for x in exponents)
    out = a.out * by_token(fade_a) + b.out * by_token(fade_b)
    return PartialAttention(out, exponent, a.total * fade_a + b.total * fade_b)


def by_token(x: Shaped[Array, "B N T"]) -> Shaped[Array, "B T N 1"]:
    """Returns one number a query as what broadcasts against the queries."""
    return jnp.swapaxes(x, 1, 2)[..., None]


def exponent_or_none(exponent: Float[Array, "..."], total: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns the exponent with -inf where nothing is seen, so that any other exponent is greater."""
    return jnp.where(total == 0.0, -jnp.inf, exponent)


def finite(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns x with 0 for -inf, so that what is relative to it in a row that sees nothing is 0 and not NaN."""
    return jnp.where(x == -jnp.inf, 0.0, x)


def divisor(total: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns total with 1 for 0, so that a row that sees nothing is 0 and not NaN."""
    return jnp.where(total == 0.0, 1.0, total)
