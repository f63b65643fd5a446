"""What jax.jvp differentiates and jax.grad does not: a reverse pass is refused, whatever the number of blocks."""

from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float

from rlring.errors import UsageError


def forward_only(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns x; raises UsageError where its gradient is asked for.

    A loop with a number of steps that is known when it runs has no reverse pass, but a single block has no loop.
    """
    return _forward_only.bind(x)


def _refuse(*_):
    raise UsageError(
        "attention with forward_mode=True is differentiated by jax.jvp (jax.jacfwd, jax.linearize); got jax.grad or "
        "jax.vjp. Leave forward_mode out; a Hessian-vector product, jax.jvp of jax.grad, needs no setting."
    )


_forward_only = Primitive("rlring_forward_only")
_forward_only.def_impl(lambda x: x)
_forward_only.def_abstract_eval(lambda x: x)
ad.deflinear2(_forward_only, _refuse)
batching.defvectorized(_forward_only)
mlir.register_lowering(_forward_only, lambda _, x: [x])
