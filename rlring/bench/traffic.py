"""Counts the bytes that each scheme sends, from the compiled program, and compares them with a formula.

Programs are only compiled, not run, so this works for thousands of devices.

A device holds t = B * T / P tokens. A query has D = N * H numbers and a key E = K * H numbers, of b bytes each. With
ring = r and ulysses = u, P = r * u, a device sends per layer:

    ring                (r - 1) t (2 E b + 8)                     backward: as much, and r t 8 E of gradients in float32
    all_gather          (P - 1) t (2 E b + 8)                     backward: as much, for keys are gathered again, and
                                                                  (P - 1) t 8 E of gradients
    ulysses             (1 - 1 / u) t (2 D + 2 E) b, (u - 1) 8 t  backward: the first term
    hybrid              the sum of ulysses and ring; in the ring's term the tokens of u devices and the heads of one
    Megatron's          4 (P - 1) t D b                           backward: as much

The 8 bytes per token are its position and segment. With as many key/value heads as query heads, and neglecting 1 / P
against 1, this is 4 N h / P for Ulysses (2309.14509, section 3.2, with its N tokens and width h), 4 N h for Megatron's
sequence parallelism (2205.05198: two gathers and two scatters of all activations per layer), and 2 N h for ring and
all_gather. The bytes that a device sends are those on its link to a network of switches. If there are fewer key/value
heads than devices, Ulysses copies heads, and E counts as many heads as devices. Megatron gathers its inputs again in
the backward to save memory: 2 N h more, which the program here does not have.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from rlring.attention import AttentionConfig, Mask, MeshAxes, attention, sharded_attention
from rlring.attention.checks import check_scheme
from rlring.bench.candidates import ONE_DEVICE, Settings, axes_of, say
from rlring.errors import UsageError
from rlring.mesh import SEQUENCE_AXES, make_mesh
from rlring.plan.hlo_traffic import Collective, collectives
from rlring.plan.links import GRADIENT_BYTES

MEGATRON = "Megatron's sequence parallelism"
MARKS = 8  # bytes of a token's position and segment


@dataclass(frozen=True)
class Traffic:
    """The bytes that a device sends per layer, counted and by formula; `refused` has the reason if the scheme does not
    fit the heads or the length."""

    scheme: str
    length: int
    devices: int
    ring: int
    ulysses: int
    refused: str | None = None
    forward: float = 0.0
    forward_formula: float = 0.0
    backward: float = 0.0
    backward_formula: float = 0.0
    forward_collectives: tuple[Collective, ...] = ()
    backward_collectives: tuple[Collective, ...] = ()


class Shape(NamedTuple):
    """The sizes t, D, E and b of the formulas."""

    tokens: float  # t
    width: int  # D
    kv_width: int  # E, with copied heads
    item: int  # b


class Program(NamedTuple):
    function: Callable
    arguments: tuple  # the first `differentiable` of them have gradients
    differentiable: int


def count_traffic(settings: Settings) -> Iterator[Traffic]:
    """Yields the traffic of each scheme and of Megatron's sequence parallelism, for each length and device count.

    Raises:
        UsageError: the scheme "auto", or too few devices.
    """
    if "auto" in settings.schemes:
        raise UsageError("--traffic counts what one scheme sends; got 'auto', which is any. Name the scheme.")
    schemes = [scheme for scheme in settings.schemes if scheme not in ONE_DEVICE]
    for length in settings.lengths:
        for devices in settings.devices:
            for scheme in (*schemes, *[MEGATRON] * bool(schemes)):
                say(f"{length} tokens: compiling {scheme} for {devices} device{'s' * (devices > 1)}")
                one = counted(scheme, length, devices, settings)
                say(f"sent: {one.forward:,.0f} bytes forward, {one.backward:,.0f} backward" if not one.refused else "-")
                yield one


def formulas(scheme: str, here: Shape, ring: int, ulysses: int) -> tuple[float, float]:
    """Returns the bytes that a device sends per layer in the forward and in the backward pass, by formula."""
    t, D, E, b = here
    r, u = ring, ulysses
    if scheme == MEGATRON:
        return (4 * (u - 1) * t * D * b,) * 2
    if scheme == "all_gather":
        gathered = (r * u - 1) * t * (2 * E * b + MARKS)
        return gathered, gathered + (r * u - 1) * t * 2 * E * GRADIENT_BYTES
    across = (1 - 1 / u) * t * (2 * D + 2 * E) * b
    around = (r - 1) * t * (2 * E * b + MARKS * u)
    gradients = r * t * 2 * E * GRADIENT_BYTES if r > 1 else 0.0
    return across + (u - 1) * t * MARKS + around, across + around + gradients


def counted(scheme: str, length: int, devices: int, settings: Settings) -> Traffic:
    """Returns the traffic of one scheme on `devices` devices."""
    ring, ulysses = (1, devices) if scheme == MEGATRON else axes_of(scheme, devices, settings)
    of = Traffic(scheme, length, devices, ring, ulysses)
    if misfit := _misfit(of, settings):
        return replace(of, refused=misfit)
    copies = max(1, ulysses // settings.kv_heads) if scheme in ("ulysses", "hybrid") else 1
    width, kv_width = (heads * settings.head_size for heads in (settings.heads, copies * settings.kv_heads))
    here = Shape(settings.batch * length / devices, width, kv_width, jnp.dtype(settings.type).itemsize)
    make = _megatron if scheme == MEGATRON else _attention
    forward, backward = (tuple(collectives(text)) for text in _compiled(make(of, settings)))
    forward_formula, backward_formula = formulas(scheme, here, ring, ulysses)
    return replace(
        of,
        forward=sum(one.total for one in forward),
        forward_formula=forward_formula,
        backward=sum(one.total for one in backward),
        backward_formula=backward_formula,
        forward_collectives=forward,
        backward_collectives=backward,
    )


def _misfit(of: Traffic, settings: Settings) -> str | None:
    """Returns the reason why the scheme cannot split these heads and tokens; None if it can."""
    if of.length % of.devices:
        return f"{of.length} tokens do not divide by {of.devices} devices."
    if of.scheme == MEGATRON:
        return f"{settings.heads} heads do not divide by {of.devices} devices." if settings.heads % of.devices else None
    try:
        check_scheme(of.scheme, settings.heads, settings.kv_heads, of.ring, of.ulysses)
    except UsageError as misfit:
        return str(misfit)
    return None


def _compiled(program: Program) -> Iterator[str]:
    """Yields the text of the compiled forward and of the compiled backward. They are separate programs, because in a
    model other layers run between them; in a single program XLA would gather the keys once for both."""

    def forward(*arguments):
        some, others = arguments[: program.differentiable], arguments[program.differentiable :]
        return jax.vjp(lambda *some: program.function(*some, *others), *some)

    def placed(x, sharding):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    lowered = jax.jit(forward).lower(*program.arguments)
    compiled = lowered.compile()
    yield compiled.as_text()
    d_out, pull = jax.tree.map(placed, lowered.out_info, compiled.output_shardings)
    yield jax.jit(lambda pull, d_out: pull(d_out)).lower(pull, d_out).compile().as_text()


def _attention(of: Traffic, settings: Settings) -> Program:
    mesh = make_mesh(ring=of.ring, ulysses=of.ulysses)
    config = AttentionConfig(of.scheme, *settings.blocks or ())
    split = NamedSharding(mesh, P("data", SEQUENCE_AXES))

    def array(*shape: int, dtype=settings.type):
        return jax.ShapeDtypeStruct((settings.batch, of.length, *shape), dtype, sharding=split)

    def forward(q, k, v, position, segment):
        return attention(q, k, v, Mask.causal(position, segment), config=config, mesh=mesh)

    q, k = (array(heads, settings.head_size) for heads in (settings.heads, settings.kv_heads))
    marks = array(dtype="int32")
    return Program(forward, (q, k, k, marks, marks), 3)


def _megatron(of: Traffic, settings: Settings) -> Program:
    """Returns a layer with tensor parallelism over heads and feed-forward width, and with tokens split between these
    parts (2205.05198, figure 5). It has as many key/value heads as query heads; heads are not sent."""
    mesh = make_mesh(ulysses=of.devices)
    D, H = settings.heads * settings.head_size, settings.head_size
    config, axes = AttentionConfig("blockwise", *settings.blocks or ()), MeshAxes(ring=None, ulysses=None)

    def gathered(x):
        return lax.all_gather(x, "ulysses", axis=1, tiled=True)

    def scattered(x):
        return lax.psum_scatter(x, "ulysses", scatter_dimension=1, tiled=True)

    def layer(x, query, key, value, out, up, down, position):
        whole = gathered(x)
        q, k, v = (jnp.einsum("btd,dnh->btnh", whole, w) for w in (query, key, value))
        attended = sharded_attention(q, k, v, Mask.causal(position), config=config, axes=axes)
        x = x + scattered(jnp.einsum("btnh,nhd->btd", attended, out))
        return x + scattered(jax.nn.gelu(gathered(x) @ up) @ down)

    arrays = [
        ((settings.batch, of.length, D), P("data", "ulysses")),
        *[((D, settings.heads, H), P(None, "ulysses"))] * 3,
        ((settings.heads, H, D), P("ulysses")),
        ((D, 4 * D), P(None, "ulysses")),
        ((4 * D, D), P("ulysses")),
        ((settings.batch, of.length), P("data")),
    ]
    types = [settings.type] * (len(arrays) - 1) + ["int32"]
    arguments = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
        for (shape, spec), dtype in zip(arrays, types, strict=True)
    ]
    specs = tuple(spec for _, spec in arrays)
    run = jax.shard_map(layer, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=False)
    return Program(run, tuple(arguments), len(arguments) - 1)
