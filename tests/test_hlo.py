"""Reading compiled programs: by hand on small ones, and on real ones whose collectives can be counted by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from sr3_jax.planning.hlo import traffic

HEAD = "HloModule jit_f, is_scheduled=true\n\n"


def program(body: str, *, rest: str = "") -> str:
    return f"{HEAD}{rest}\nENTRY %main (p: f32[8,4]) -> f32[8,4] {{\n{body}}}\n"


@pytest.mark.parametrize(
    ("line", "kind", "sent"),
    [
        # 128 bytes given; a group of 4 sends three quarters of it on, once, twice, or all of it three times
        ("f32[8,4]{1,0} all-reduce(%p), replica_groups={{0,1,2,3},{4,5,6,7}}", "all-reduce", 192),
        ("f32[8,4]{1,0} all-reduce(%p), replica_groups=[2,4]<=[8]", "all-reduce", 192),
        ("f32[8,4]{1,0} all-reduce(%p), replica_groups=[2,4]<=[4,2]T(1,0)", "all-reduce", 192),
        ("f32[8,4]{1,0} all-reduce(%p), replica_groups={}, to_apply=%add", "all-reduce", 224),
        (
            "f32[8,4]{1,0} all-reduce(%p), replica_groups=mesh['a'=4,'b'=2], device_ids=([4,2]T(1,0)) {'a'}",
            "all-reduce",
            192,
        ),
        ("f32[32,4]{1,0} all-gather(%p), replica_groups=[2,4]<=[8], dimensions={0}", "all-gather", 384),
        ("f32[2,4]{1,0} reduce-scatter(%p), replica_groups=[2,4]<=[8], dimensions={0}", "reduce-scatter", 96),
        ("f32[8,4]{1,0} all-to-all(%p), replica_groups=[2,4]<=[8], dimensions={0}", "all-to-all", 96),
        (
            "f32[8,4]{1,0} collective-permute(%p), source_target_pairs={{0,1},{1,0}}",
            "collective-permute",
            128,
        ),
        (
            "(f32[8,4]{1,0}, f32[32,4]{1,0}) all-gather-start(%p), replica_groups=[2,4]<=[8]",
            "all-gather",
            384,
        ),
    ],
)
def test_each_collective_by_hand(line, kind, sent):
    found = traffic(program(f"  %p = f32[8,4]{{1,0}} parameter(0)\n  %x = {line}\n"), devices=8)
    assert found.collectives == {kind: [1, sent]}


def test_a_done_is_not_counted_again():
    body = """  %p = f32[8,4]{1,0} parameter(0)
  %s = (f32[8,4]{1,0}, f32[32,4]{1,0}) all-gather-start(%p), replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %d = f32[32,4]{1,0} all-gather-done(%s)
"""
    assert traffic(program(body), devices=8).collectives == {"all-gather": [1, 384]}


BODY = """%body (t: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %t = (s32[], f32[8,4]{1,0}) parameter(0)
  %x = f32[8,4]{1,0} get-tuple-element(%t), index=1
  %r = f32[8,4]{1,0} all-reduce(%x), replica_groups=[2,4]<=[8], to_apply=%add
}

%cond (t.1: (s32[], f32[8,4])) -> pred[] {
  %t.1 = (s32[], f32[8,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%t.1), index=0
  %n = s32[] constant(7)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}
"""
LOOP = (
    "  %p = f32[8,4]{1,0} parameter(0)\n  %w = (s32[], f32[8,4]{1,0}) while(%p), condition=%cond, body=%body"
)


@pytest.mark.parametrize(
    ("rest", "tail", "rounds", "unknown"),
    [
        (BODY, "", 7, 0),
        (BODY, ', backend_config={"known_trip_count":{"n":"5"},"init":1}', 5, 0),
        (BODY.replace("constant(7)", "parameter(1)"), "", 1, 1),
        (BODY.replace("direction=LT", "direction=NE"), "", 1, 1),
    ],
)
def test_a_loop_counts_as_often_as_it_runs(rest, tail, rounds, unknown):
    found = traffic(program(LOOP + tail + "\n", rest=rest), devices=8)
    assert found.collectives == {"all-reduce": [rounds, 192 * rounds]}
    assert found.unknown_loops == unknown


def test_what_is_inside_a_fusion_stays_on_the_chip_but_not_a_fused_collective():
    rest = """%all-reduce-scatter.1 (a: f32[8,4]) -> f32[2,4] {
  %a = f32[8,4]{1,0} parameter(0)
  %r = f32[8,4]{1,0} all-reduce(%a), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %s = f32[2,4]{1,0} dynamic-slice(%r, %i), dynamic_slice_sizes={2,4}
}
"""
    body = """  %p = f32[8,4]{1,0} parameter(0)
  ROOT %f = f32[2,4]{1,0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1
"""
    found = traffic(program(body, rest=rest), devices=8)
    assert found.collectives == {"reduce-scatter": [1, 96]}  # half of an all-reduce
    assert found.memory == 128 + 32


def test_memory_traffic_by_hand():
    body = """  %p = f32[8,4]{1,0} parameter(0)
  %q = bf16[8,4]{1,0:S(1)} convert(%p)
  %c = (f32[8,4]{1,0}, f32[8,4]{1,0:S(1)}, u32[]{:S(2)}) copy-start(%p)
  %d = f32[8,4]{1,0:S(1)} copy-done(%c)
  %m = f32[8,4]{1,0} add(%d, %q)
  %v = f32[4,8]{1,0} bitcast(%m)
  ROOT %s = f32[2,4]{1,0} slice(%m), slice={[0:2], [0:4]}
"""
    # convert reads 128 into the chip; the copy reads 128; add writes 128 from the chip; the slice reads and writes 32
    assert traffic(program(body), devices=1).memory == 128 + 128 + 128 + 2 * 32


@pytest.mark.parametrize(
    ("array", "size"),
    [
        ("f32[8,4]{1,0}", 128),
        ("f32[8,4]{1,0:T(8,128)}", 4096),
        ("f32[8,4]{0,1:T(8,128)}", 4 * 8 * 128),
        ("bf16[2,9,200]{2,1,0:T(8,128)(2,1)}", 2 * 2 * 16 * 256),
        ("bf16[9,2,200]{2,0,1:T(8,128)(2,1)}", 2 * 2 * 16 * 256),
        ("f32[100]{0:T(256)}", 1024),
        ("f32[]{:T(128)}", 4),
        ("s8[10]{0}", 10),
        ("pred[10]{0}", 10),
        ("u4[10]{0}", 5),
    ],
)
def test_arrays_take_their_tiles(array, size):
    body = f"  %p = {array} parameter(0)\n  ROOT %n = f32[]{{:T(128)S(1)}} reduce(%p)\n"
    assert traffic(program(body), devices=1).memory == size


def test_one_branch_of_a_conditional_runs():
    rest = """%small (a: f32[2]) -> f32[2] {
  %a = f32[2]{0} parameter(0)
  ROOT %n = f32[2]{0} negate(%a)
}

%large (b: f32[8,4]) -> f32[8,4] {
  %b = f32[8,4]{1,0} parameter(0)
  ROOT %m = f32[8,4]{1,0} negate(%b)
}
"""
    body = (
        "  %p = f32[8,4]{1,0} parameter(0)\n"
        "  ROOT %c = f32[8,4]{1,0} conditional(%i, %p, %p), branch_computations={%small, %large}\n"
    )
    assert traffic(program(body, rest=rest), devices=1).memory == 256


def test_other_text_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        traffic("module {}", devices=1)


def test_a_real_program_on_eight_devices():
    """A matrix gathered over 4 devices in each of 3 rounds, and a sum over all 8."""
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    split, rows = (
        NamedSharding(mesh, PartitionSpec("fsdp")),
        NamedSharding(mesh, PartitionSpec(("data", "fsdp"))),
    )
    whole = NamedSharding(mesh, PartitionSpec())

    def f(weight, x):
        def body(carry, _):
            weight, x = carry
            weight = jax.lax.with_sharding_constraint(
                jnp.sin(weight), split
            )  # so that no round's gather will do
            full = jax.lax.with_sharding_constraint(weight, whole)
            return (weight, jax.lax.with_sharding_constraint(jnp.tanh(x @ full), rows)), None

        (_, x), _ = jax.lax.scan(body, (weight, x), length=3)
        return x.sum()

    weight = jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=split)
    x = jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=rows)
    compiled = jax.jit(f, out_shardings=whole).lower(weight, x).compile()
    found = traffic(compiled.as_text(), devices=8)
    assert found.unknown_loops == 0
    assert found.collectives["all-gather"] == [3, 3 * 3 * 64 * 64 * 4 / 4]
    assert found.collectives["all-reduce"] == [1, 2 * 7 / 8 * 4]
    assert set(found.collectives) == {"all-gather", "all-reduce"}
    assert found.memory > 3 * 64 * 64 * 4
