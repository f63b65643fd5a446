"""The real TPU compiler takes every scheme, and hides the hops of the ring behind their compute.

Needs libtpu and no TPU. What is compiled is compiled in a process of its own: run as a program, this file takes cases
and prints what it found as JSON.
"""

import importlib.util
import json
import os
import subprocess
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from rlring import AttentionConfig, Mask, UsageError, attention, make_mesh
from rlring.mesh import SEQUENCE_AXES
from rlring.plan.hlo_schedule import permutes
from rlring.plan.topology import topology_devices


class Case(NamedTuple):
    topology: str
    scheme: str
    ring: int
    ulysses: int = 1
    data: int = 1
    kernel: str = "jax"
    deterministic: bool = False

    @property
    def devices(self) -> int:
        return self.data * self.ring * self.ulysses


QUICK = (
    Case("v5e:4x4", "ring", 16),
    Case("v5e:4x4", "all_gather", 16),
    Case("v5e:4x4", "ulysses", 1, 16),
    Case("v5e:4x4", "hybrid", 4, 4),
    Case("v5e:4x8", "hybrid", 8, 4),  # the smallest on which the order of the devices decides
    Case("v4:2x2x4", "ring", 8, data=2),
    Case("v6e:4x4", "ring", 16, kernel="splash"),
    Case("v5e:4x4", "ring", 16, deterministic=True),
)
SLOW = (
    Case("v3:4x4", "ring", 32, kernel="auto"),  # which is not splash there
    *(Case(name, "ring", 16) for name in ("v4:2x2x4", "v5p:2x2x4", "v6e:4x4")),
    *(Case(name, scheme, 16, 4) for name in ("v4:4x4x4", "v5p:4x4x4") for scheme in ("hybrid", "all_gather")),
    *(Case(name, "hybrid", 8, 8) for name in ("v5e:8x8", "v6e:8x8")),
    *(Case(name, "ulysses", 1, 16, data=4) for name in ("v4:4x4x4", "v5e:8x8", "v5p:4x4x4", "v6e:8x8")),
    Case("v5e:8x8", "ring", 8, data=8),
    *(Case(name, "ring", 256) for name in ("v5e:16x16", "v6e:16x16")),
    *(Case(name, "ring", 1024) for name in ("v4:8x8x16", "v5p:8x8x16")),
    *(Case(name, "hybrid", 128, 8) for name in ("v4:8x8x16", "v5p:8x8x16")),
    *(Case(name, "ring", 1024, kernel="splash") for name in ("v4:8x8x16", "v5p:8x8x16")),
    *(Case(name, "hybrid", 64, 4, kernel="splash") for name in ("v5e:16x16", "v6e:16x16")),
)


def compiled(case: Case) -> str:
    """Returns the scheduled program of attention, forward and backward, 2,048 tokens a device."""
    devices = topology_devices(case.topology)
    assert len(devices) == case.devices
    mesh = make_mesh(data=case.data, ring=case.ring, ulysses=case.ulysses, devices=devices)
    config = AttentionConfig(case.scheme, kernel=case.kernel, deterministic=case.deterministic)
    split = NamedSharding(mesh, P("data", SEQUENCE_AXES))
    shape = case.data, 2048 * case.ring * case.ulysses
    q = jax.ShapeDtypeStruct((*shape, 16, 128), jnp.bfloat16, sharding=split)
    position = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=split)

    @jax.jit
    def run(q, k, v, d_out, position):
        out, backward = jax.vjp(lambda *qkv: attention(*qkv, Mask.causal(position), config=config, mesh=mesh), q, k, v)
        return out, backward(d_out)

    return run.lower(q, q, q, q, position).compile().as_text()


def found(cases) -> list[list[dict]]:
    """Returns the permutes of each case."""
    program = [sys.executable, __file__, *(json.dumps(case) for case in cases)]
    ran = subprocess.run(program, env={**os.environ, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads(ran.stdout)


def check(case: Case, transfers: list[dict]) -> None:
    """All hops but the first and the last ones stand in a loop, one permute in each pass, beside the hop's compute.

    In the fixed order the gradients of keys come first, before the compute that adds to them: two permutes a pass.
    """
    if case.scheme in ("all_gather", "ulysses"):
        assert transfers == []
        return
    if case.topology.startswith("v3"):  # its compiler sends nothing while it computes
        assert transfers
        assert not any(x["is_asynchronous"] for x in transfers)
        return
    assert all(x["is_asynchronous"] for x in transfers)
    for is_backward, hops, outside in ((False, case.ring - 2, 1), (True, case.ring - 2, 3)):
        found = [x for x in transfers if x["is_backward"] == is_backward]
        in_loop = [x["is_hidden"] for x in found if x["is_repeated"]]
        in_order = [False] if case.deterministic and is_backward else []
        assert in_loop == ([*in_order, True] if hops > 1 else [])
        assert len(found) - len(in_loop) == outside + (hops == 1)


@pytest.mark.libtpu
def test_hops_are_hidden():
    for case, transfers in zip(QUICK, found(QUICK), strict=True):
        check(case, transfers)


@pytest.mark.libtpu
@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW, ids=lambda case: "-".join(map(str, case)))
def test_hops_are_hidden_on_every_generation(case):
    (transfers,) = found([case])
    check(case, transfers)


def program(first: str, between: str, *, is_scheduled: bool = True) -> str:
    return f"""HloModule jit_f{", is_scheduled=true" if is_scheduled else ""}

%fused (p: f32[8,8]) -> f32[8,8] {{
  %p = f32[8,8]{{1,0:T(8,128)}} parameter(0)
  ROOT %c = f32[8,8]{{1,0:T(8,128)}} convolution(%p, %p), dim_labels=bf_io->bf
}}

ENTRY %main (x: bf16[4,2]) -> bf16[4,2] {{
  %x = bf16[4,2]{{1,0:T(8,128)(2,1)S(1)}} parameter(0)
  %start.1 = (bf16[4,2]{{1,0}}, bf16[4,2]{{1,0}}, u32[]{{:S(2)}}) collective-permute-start({first}), channel_id=1
  %start.10 = (bf16[4,2]{{1,0}}, bf16[4,2]{{1,0}}, u32[]{{:S(2)}}) collective-permute-start(%x), channel_id=2
  %done.10 = bf16[4,2]{{1,0:T(8,128)(2,1)}} collective-permute-done(%start.10)
  {between}
  ROOT %done.1 = bf16[4,2]{{1,0:T(8,128)(2,1)}} collective-permute-done(%start.1), metadata={{op_name="a"}}
}}
"""


@pytest.mark.parametrize(
    ("between", "is_hidden"),
    [
        ("%f = f32[8,8]{1,0} fusion(%y), kind=kOutput, calls=%fused", True),
        ("%w = (f32[8,8]{1,0}, s32[]) while(%y), condition=%none, body=%fused", True),
        ("%w = f32[8,8]{1,0} conditional(%p, %y, %y), branch_computations={%none, %fused}", True),
        ('%k = f32[8]{0} custom-call(%y), custom_call_target="tpu_custom_call"', True),
        ("%f = f32[8,8]{1,0} fusion(%y), kind=kLoop, calls=%none", False),
        ('%k = f32[8]{0} custom-call(%y), custom_call_target="Sharding"', False),
    ],
)
def test_reading_a_schedule(between, is_hidden):
    outer, inner = permutes(program("%x", between))
    assert (outer.bytes, outer.is_asynchronous, outer.is_hidden, outer.is_repeated) == (16, True, is_hidden, False)
    assert not inner.is_hidden
    with pytest.raises(UsageError, match=r"known of a scheduled program; got one that is not"):
        permutes(program("%x", between, is_scheduled=False))


def test_a_synchronous_permute_is_not_hidden():
    mesh = make_mesh(ring=4)
    move = jax.jit(
        jax.shard_map(
            lambda x: jax.lax.ppermute(x @ x, "ring", [(0, 1), (1, 2)]) @ x,
            mesh=mesh, in_specs=P("ring"), out_specs=P("ring"),
        )
    )  # fmt: skip
    (transfer,) = permutes(move.lower(jnp.ones((4 * 8, 8))).compile().as_text())
    assert (transfer.bytes, transfer.is_asynchronous, transfer.is_hidden) == (8 * 8 * 4, False, False)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("h100:8", r"a topology is a generation and how many chips it has along each side; got 'h100:8'\. Write it"),
        pytest.param(
            "v9:4x4", r"the TPU compiler knows no topology 'v9:4x4'.*Use one that exists", marks=pytest.mark.libtpu
        ),
        pytest.param("v5e:3x5", r"the TPU compiler knows no topology 'v5e:3x5'", marks=pytest.mark.libtpu),
    ],
)
def test_unknown_topologies(name, message):
    with pytest.raises(UsageError, match=message):
        topology_devices(name)


def test_without_libtpu(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UsageError, match=r"needs the TPU compiler, .* not installed\. Run `pip install libtpu` \(libtpu="
    ):
        topology_devices("v4:8x8x16")


def test_virtual_devices():
    assert [device.platform for device in topology_devices("cpu:4")] == ["cpu"] * 4


if __name__ == "__main__":
    cases = [Case(*json.loads(case)) for case in sys.argv[1:]]
    print(json.dumps([[x._asdict() | {"is_backward": x.is_backward} for x in permutes(compiled(c))] for c in cases]))
