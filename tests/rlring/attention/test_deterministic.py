"""AttentionConfig.deterministic: the bits of out, dq, dk and dv are the same on a ring of any size.

They are compared in a process with XLA's default flags: run as a program, this file takes cases and prints what it
found as JSON. With those of conftest.py, for fast compilation, XLA before jaxlib 0.11 rounds each loop in its own way.
"""

import json
import os
import subprocess
import sys
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlring import AttentionConfig, Mask, UsageError, attention, make_mesh
from rlring.attention.ring_transport import Transport
from rlring.language_model import LanguageModelConfig
from rlring.mesh import request_cpu_devices
from rlring.transformer import TransformerConfig

BLOCK = 8


class Case(NamedTuple):
    """Rings that must agree."""

    rings: tuple[int, ...]
    type: str = "float32"
    is_causal: bool = True
    window: int | tuple[int, int] | None = None
    block_k: int = BLOCK
    options: tuple[str, ...] = ()  # of attention()
    is_closed_over: bool = False
    transport: str | None = None  # of a platform
    length: int = 192  # 24 blocks, which 1, 2, 3, 4 and 8 devices share

    @property
    def masks(self) -> dict[str, Mask]:
        rng = np.random.default_rng(0)
        position = jnp.tile(jnp.arange(self.length, dtype=jnp.int32), (2, 1))
        packed = jnp.asarray(np.sort(rng.integers(0, 4, position.shape)), jnp.int32).at[1, -21:].set(-1)
        shuffled = jnp.asarray(rng.permuted(np.asarray(position), axis=1))
        tokens = {"plain": (position, None), "packed": (position, packed), "shuffled": (shuffled, packed)}
        make = Mask.causal if self.is_causal else Mask.full
        window = tuple(self.window) if isinstance(self.window, list) else self.window
        return {name: make(*where, window) for name, where in tokens.items()}

    def arrays(self):
        """q, k, v and the gradient of the out: two rows, four query heads over two."""
        keys = jax.random.split(jax.random.key(0), 4)
        shapes = [(2, self.length, heads, 8) for heads in (4, 2, 2, 4)]
        return [jax.random.normal(key, shape).astype(self.type) for key, shape in zip(keys, shapes, strict=True)]

    def run(self, ring: int):
        """Returns a function of the arrays and a mask: out, dq, dk, dv."""
        config = AttentionConfig("ring", BLOCK, self.block_k, transport=self.of_platform, deterministic=True)
        mesh = None if ring == 1 else make_mesh(ring=ring, devices=jax.devices()[:ring])
        return self.compiled(config, mesh)

    @property
    def of_platform(self) -> Transport | None:
        return None if self.transport is None else Transport.of(self.transport)

    def compiled(self, config: AttentionConfig, mesh=None):
        how = {"config": config, "mesh": mesh, **self.how}

        def run(q, k, v, d_out, mask):
            out, pull = jax.vjp(lambda *arrays: attention(*arrays, mask, **how), q, k, v)
            return out, *pull(d_out)

        if self.is_closed_over:
            return lambda *arrays: jax.jit(lambda: run(*arrays))()
        return jax.jit(run)

    @property
    def how(self) -> dict:
        every = {
            "soft_cap": 20.0,
            "sinks": jnp.linspace(-1.0, 1.0, 4),
            "bias": jnp.linspace(0.1, 0.4, 4),
            "dropout": (0.2, jax.random.key(3)),
        }
        return {name: every[name] for name in self.options}


def found(case: Case) -> dict[str, list[int]]:
    """Returns, by mask and ring, how many of out, dq, dk, dv differ from those of the first ring, and the errors."""
    arrays, results = case.arrays(), {}
    runs, dense = {ring: case.run(ring) for ring in case.rings}, case.compiled(AttentionConfig("dense"))
    for name, mask in case.masks.items():
        got = {ring: [np.asarray(x) for x in run(*arrays, mask)] for ring, run in runs.items()}
        first = got[case.rings[0]]
        for ring, parts in got.items():
            results[f"{name}, {ring}"] = [int((a != b).sum()) for a, b in zip(first, parts, strict=True)]
        expected = [np.asarray(x, np.float32) for x in dense(*arrays, mask)]
        errors = (np.abs(a - b).max() / np.abs(b).max() for a, b in zip(first, expected, strict=True))
        results[f"{name}, error"] = [float(error) for error in errors]
    return results


def check(*cases: Case) -> None:
    flags = {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    program = [sys.executable, __file__, *(json.dumps(case) for case in cases)]
    ran = subprocess.run(program, env={**os.environ, **flags}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    for case, results in zip(cases, json.loads(ran.stdout), strict=True):
        for name, numbers in results.items():
            if name.endswith("error"):
                assert max(numbers) <= (1e-5 if case.type == "float32" else 2e-2), (case, name, numbers)
            else:
                assert numbers == [0, 0, 0, 0], (case, name, numbers)


def test_the_same_bits_on_rings_of_1_and_3():
    check(Case((1, 3), length=9 * BLOCK))


EVERY = (1, 2, 4, 8, 3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        *(
            Case(EVERY, type, is_causal, window)
            for type in ("float32", "bfloat16")
            for is_causal, window in ((True, None), (False, None), (True, 30), (True, 170), (False, (20, 35)))
        ),
        Case((1, 2, 3), block_k=16),
        Case((1, 2, 4), options=("soft_cap", "sinks", "bias", "dropout")),
        Case((1, 4), is_closed_over=True),
        Case((1, 4, 3), transport="gpu"),
        Case((1, 8), transport="tpu"),
    ],
    ids=str,
)
def test_the_same_bits_on_every_ring(case):
    check(case)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scheme": "hybrid"}, r"scheme 'hybrid' has no fixed order of blocks.*Use scheme 'ring' over mesh\.ring"),
        ({"scheme": "auto"}, r"scheme 'auto' has no fixed order"),
        (
            {"kernel": "splash"},
            r"kernel 'splash' has no fixed order of blocks; got deterministic=True\. Use kernel 'jax'",
        ),
    ],
)
def test_what_has_no_fixed_order(settings, message):
    with pytest.raises(UsageError, match=message):
        AttentionConfig(**settings, deterministic=True)


@pytest.mark.parametrize(("ring", "multiple"), [(1, 256), (2, 512)])
def test_blocks_divide_the_share_of_each_device(ring, multiple):
    x = jnp.zeros((1, 600, 1, 4))
    mask = Mask.causal(jnp.arange(600, dtype=jnp.int32)[None])
    run = partial(attention, x, x, x, mask, mesh=make_mesh(ring=ring))
    message = (
        rf"got 600 tokens over mesh\.ring={ring} in blocks of attention\.block_q=256\. Use a multiple of {multiple}"
    )
    with pytest.raises(UsageError, match=message):
        run(config=AttentionConfig("ring", deterministic=True))
    with pytest.raises(UsageError, match=rf"attention\.block_k=7\. Use a multiple of {7 * ring} tokens, or a block_k"):
        run(config=AttentionConfig("ring", block_q=50, block_k=7, deterministic=True))


def test_a_language_model_moves_its_tokens():
    with pytest.raises(UsageError, match=r"tokens out in the zigzag order.*got attention\.deterministic=True"):
        LanguageModelConfig(transformer=TransformerConfig(attention=AttentionConfig("ring", deterministic=True)))


if __name__ == "__main__":
    request_cpu_devices(8)
    print(json.dumps([found(Case(*json.loads(case))) for case in sys.argv[1:]]))
