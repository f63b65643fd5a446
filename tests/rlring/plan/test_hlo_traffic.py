"""Collectives read from the text of a program. Real ones are counted in tests/rlring/bench/test_traffic.py."""

import re

import pytest

from rlring import UsageError
from rlring.plan.hlo_traffic import Collective, collectives

PROGRAM = """HloModule jit_f, is_scheduled=true, num_partitions=8

%body (state: (s32[], f32[4])) -> (s32[], f32[4]) {
  %sent = f32[4]{0} collective-permute(%x), channel_id=1, source_target_pairs={{0,2},{2,0},{1,3},{3,1}}
  ROOT %state.1 = (s32[], f32[4]{0}) tuple(%i, %sent)
}

%outer (state: (s32[], f32[4])) -> (s32[], f32[4]) {
  ROOT %in = (s32[], f32[4]{0}) while(%s), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"3"}}
}

%much (x: f32[4]) -> f32[4] {
  ROOT %sum = f32[4]{0} all-reduce(%x), replica_groups={{0,1},{2,3}}, to_apply=%add
}

%little (x: f32[4]) -> f32[4] {
  ROOT %same = f32[4]{0} copy(%x)
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %two = (f32[1,6]{1,0}, /*index=1*/f32[1,6]{1,0}) all-to-all(%a, %b), replica_groups=[4,2]<=[8]
  %named = f32[4]{0} all-gather(%x), replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}, dimensions={0}
  %whole = bf16[32]{0} all-gather(%x), replica_groups={}, dimensions={0}
  %part = pred[2]{0} reduce-scatter(%y), replica_groups={{0,1,2,3}}, to_apply=%add
  %loop = (s32[], f32[4]{0}) while(%start), condition=%c, body=%outer, backend_config={"known_trip_count":{"n":"5"}}
  ROOT %some = f32[4]{0} conditional(%p, %x, %x), branch_computations={%little, %much}
}
"""


def test_how_often_each_is_sent_and_to_how_many():
    assert collectives(PROGRAM) == [
        Collective("all-to-all", "f32[1,6]", 2, devices=2, times=1, bytes=48 / 2),
        Collective("all-gather", "f32[4]", 1, devices=4, times=1, bytes=16 * 3 / 4),
        Collective("all-gather", "bf16[32]", 1, devices=8, times=1, bytes=64 * 7 / 8),
        Collective("reduce-scatter", "pred[2]", 1, devices=4, times=1, bytes=2 * 3),
        Collective("collective-permute", "f32[4]", 1, devices=2, times=15, bytes=16),
        Collective("all-reduce", "f32[4]", 1, devices=2, times=1, bytes=2 * 16 / 2),
    ]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (', backend_config={"known_trip_count":{"n":"5"}}', "", r"it has a fixed count; got loop without one. Count a"),
        ("{'a','c'}", "{'a':(1)2}", r"lists or axes of a mesh; got replica_groups=mesh\['a'=2.*. Count a program of"),
        (
            "bf16[32]{0} all-gather(",
            "bf16[32]{0} all-gather-start(",
            r"of CPUs, .*; got all-gather-start. Compile for CPU devices",
        ),
    ],
)
def test_what_cannot_be_counted_is_refused(old, new, message):
    assert old in PROGRAM
    with pytest.raises(UsageError, match=message):
        collectives(re.sub(re.escape(old), new, PROGRAM))
