"""Windows of masks: how many positions a query sees back and ahead."""

import operator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int32, UInt32

from rlring.errors import UsageError, shown

MOST = 2**31 - 1  # the largest int32

Window = int | tuple[int | None, int | None]
AnyArray = Array | np.ndarray  # positions may be NumPy arrays, which are constants in a compiled program


def is_within(later: Int32[AnyArray, "..."], earlier: Int32[AnyArray, "..."], reach: int) -> Bool[AnyArray, "..."]:
    """Returns whether later - earlier < reach, without overflow; true if the difference is negative. They broadcast."""
    return (earlier > later) | (_distance(later, earlier) < reach)


def apart(one: Int32[AnyArray, "..."], other: Int32[AnyArray, "..."]) -> UInt32[Array, "..."]:
    """Returns |one - other| without overflow; the two broadcast."""
    return _distance(jnp.maximum(one, other), jnp.minimum(one, other))


def _distance(later: Int32[AnyArray, "..."], earlier: Int32[AnyArray, "..."]) -> UInt32[AnyArray, "..."]:
    """Returns later - earlier for later >= earlier. The difference of two int32 may overflow int32, but fits uint32."""
    return (later - earlier).astype(jnp.uint32)


def narrowed(window: Window | None, back: int) -> Window:
    """Returns the window limited to `back` tokens back, the query included."""
    if not isinstance(window, tuple):
        return back if window is None else min(window, back)
    left, right = window
    return (back - 1 if left is None else min(left, back - 1), right)


def checked_window(window) -> Window | None:
    """Returns the window as Python integers; raises UsageError if it is not a valid window."""
    if window is None:
        return None
    if isinstance(window, tuple | list):
        return _checked_sides(tuple(window))
    number = _whole(window)
    if number is None:
        raise UsageError(
            "a window is how many tokens a query looks back, itself included: one whole number, known when the program "
            f"is compiled, or a pair (left, right); got {shown(window)}. Make it a static argument of jax.jit."
        )
    if not 1 <= number <= MOST:
        raise UsageError(
            f"a window holds at least the token itself, and at most 2**31 - 1; got window={number}. Use None for no "
            "window."
        )
    return number


def _checked_sides(sides: tuple) -> tuple[int | None, int | None] | None:
    numbers = tuple(None if side is None else _whole(side) for side in sides)
    is_lost = any(number is None and side is not None for number, side in zip(numbers, sides, strict=True))
    if len(sides) != 2 or is_lost or any(number is not None and not 0 <= number < MOST for number in numbers):
        raise UsageError(
            "a window (left, right) is how many tokens a query looks back and ahead beside itself: two whole numbers "
            "from 0 to 2**31 - 2, known when the program is compiled, or None for no limit; got "
            f"({', '.join(map(shown, sides))}). Make it a static argument of jax.jit."
        )
    return None if numbers == (None, None) else numbers


def _whole(number) -> int | None:
    """Returns the number as an int; None if it is not an integer, or is traced."""
    if isinstance(number, bool | np.bool_ | jax.core.Tracer):
        return None
    try:
        return operator.index(number)
    except TypeError:
        return None
