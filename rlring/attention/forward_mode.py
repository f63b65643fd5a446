"""forward_only(): makes jax.grad raise an error for code that only jax.jvp can differentiate."""

from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float

from rlring.errors import UsageError


def forward_only(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns x; differentiating it in reverse mode raises UsageError.

    Attention over several blocks has a loop with a dynamic number of steps, which has no reverse mode, but a single
    block has no loop. So without this function the error would depend on the number of blocks.
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
