"""What is counted in the text of a compiled module."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from subspace_jax import planning, train
from subspace_jax.planning import hlo

MESH = {"data": 1, "fsdp": 4, "tensor": 2}

# In the form that the TPU compiler gives: a loop of 4 with a gather, a matmul written as a dilated convolution, and
# a copy of a slice; an array in memory on the chip; a reduction outside the loop.
TEXT = """HloModule jit_step, is_scheduled=true

%slice_of (p0: f32[4,64,128], p1: s32[]) -> f32[1,64,128] {
  %p0 = f32[4,64,128]{2,1,0:T(8,128)} parameter(0)
  %p1 = s32[]{:T(128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  ROOT %cut = f32[1,64,128]{2,1,0:T(8,128)} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,64,128}
}

%start (q0: bf16[32,128]) -> bf16[128,128] {
  %q0 = bf16[32,128]{1,0} parameter(0)
  ROOT %ag.1 = bf16[128,128]{1,0} all-gather(%q0), channel_id=7, replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}, dimensions={0}
}

%go_on (r0: bf16[32,128]) -> bf16[128,128] {
  %r0 = bf16[32,128]{1,0} parameter(0)
  ROOT %ag.2 = bf16[128,128]{1,0} all-gather(%r0), channel_id=7, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}
}

%body (carry: (s32[], f32[4,64,128], bf16[32,128])) -> (s32[], f32[4,64,128], bf16[32,128]) {
  %carry = (s32[]{:T(128)}, f32[4,64,128]{2,1,0:T(8,128)}, bf16[32,128]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%carry), index=0
  %stack = f32[4,64,128]{2,1,0:T(8,128)} get-tuple-element(%carry), index=1
  %share = bf16[32,128]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%carry), index=2
  %layer = f32[1,64,128]{2,1,0:T(8,128)} fusion(%stack, %i), kind=kLoop, calls=%slice_of
  %began = bf16[128,128]{1,0:S(1)} fusion(%share), kind=kCustom, calls=%start
  %ended = bf16[128,128]{1,0:S(1)} fusion(%share), kind=kCustom, calls=%go_on
  %l = bf16[4,8,8]{2,1,0:S(1)} constant({...})
  %r = bf16[4,8,8]{2,1,0:S(1)} constant({...})
  %product = f32[4,8,8]{2,1,0:S(1)} convolution(%l, %r), window={size=4 stride=3 lhs_dilate=4}, dim_labels=0bf_0oi->0bf
  %permute = bf16[32,128]{1,0:S(1)} collective-permute(%share), channel_id=9, source_target_pairs={{0,1},{2,3},{4,5},{6,7}}
  ROOT %next = (s32[]{:T(128)}, f32[4,64,128]{2,1,0:T(8,128)}, bf16[32,128]{1,0:T(8,128)(2,1)S(1)}) tuple(%i, %stack, %permute)
}

%condition (carry.1: (s32[], f32[4,64,128], bf16[32,128])) -> pred[] {
  %limit = s32[]{:T(128)} constant(4)
  %carry.1 = (s32[]{:T(128)}, f32[4,64,128]{2,1,0:T(8,128)}, bf16[32,128]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %count = s32[]{:T(128)} get-tuple-element(%carry.1), index=0
  ROOT %less = pred[]{:T(512)} compare(%count, %limit), direction=LT
}

ENTRY %main (a: f32[4,64,128], b: bf16[32,128]) -> f32[3,100] {
  %a = f32[4,64,128]{2,1,0:T(8,128)} parameter(0)
  %b = bf16[32,128]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  %first = s32[]{:T(128)} constant(0)
  %begin = s32[]{:T(128)} copy(%first)
  %all = (s32[]{:T(128)}, f32[4,64,128]{2,1,0:T(8,128)}, /*index=2*/bf16[32,128]{1,0:T(8,128)(2,1)S(1)}) tuple(%begin, %a, %b)
  %loop = (s32[]{:T(128)}, f32[4,64,128]{2,1,0:T(8,128)}, bf16[32,128]{1,0:T(8,128)(2,1)S(1)}) while(%all), condition=%condition, body=%body
  %small = f32[3,100]{1,0:T(8,128)} custom-call(), custom_call_target="AllocateBuffer", metadata={op_name="jit(step)/here"}
  ROOT %sum = f32[3,100]{1,0:T(8,128)} all-reduce(%small), channel_id=3, replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add
}
"""  # noqa: E501


def test_module_cost_counts_a_loop_once_per_iteration_and_a_collective_of_two_fusions_once():
    cost = planning.module_cost(TEXT, MESH)
    found = {(c.kind, c.axis, c.devices): (c.count, c.nbytes) for c in cost.collectives}
    assert found == {
        ("all-gather", "fsdp", 4): (4, 4 * 128 * 128 * 2),
        ("collective-permute", "tensor", 2): (4, 4 * 32 * 128 * 2),
        ("all-reduce", "tensor", 2): (1, 3 * 100 * 4),
    }
    assert cost.open_loops == 0


def test_a_batched_product_written_as_a_dilated_convolution_has_the_flops_of_the_product():
    # Four products of 8 x 8 matrices: the window slides over 16 pairs of matrices, of which 4 meet.
    assert planning.module_cost(TEXT, MESH).flops == 4 * (2 * 4 * 8 * 8 * 8)


def test_a_slice_of_a_stack_reads_the_slice_and_memory_on_the_chip_is_free():
    # Each of 4 rounds reads and writes one layer; the reduction reads and writes; the counter is copied once and read 4
    # times.
    counter = 2 * 4 + 4 * 4
    assert planning.module_cost(TEXT, MESH).memory_bytes == 4 * 2 * 64 * 128 * 4 + 2 * 3 * 100 * 4 + counter


NESTED = """HloModule nested

%inner (p: f32[8,64,128], i: s32[]) -> f32[1,64,128] {
  %p = f32[8,64,128]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %half = bf16[8,64,128]{2,1,0} convert(%p)
  ROOT %cut = bf16[1,64,128]{2,1,0} dynamic-slice(%half, %i, %i, %i), dynamic_slice_sizes={1,64,128}
}

%outer (q: f32[8,64,128], r: f32[8,64,128], j: s32[], gathered: f32[99]) -> (f32[8,64,128], f32[99]) {
  %q = f32[8,64,128]{2,1,0} parameter(0)
  %r = f32[8,64,128]{2,1,0} parameter(1)
  %j = s32[] parameter(2)
  %gathered = f32[99]{0} parameter(3)
  %taken = bf16[1,64,128]{2,1,0} fusion(%q, %j), kind=kLoop, calls=%inner
  %wide = f32[1,64,128]{2,1,0} convert(%taken)
  %put = f32[8,64,128]{2,1,0} dynamic-update-slice(%r, %wide, %j, %j, %j)
  ROOT %both = (f32[8,64,128]{2,1,0}, f32[99]{0}) tuple(%put, %gathered)
}

ENTRY %main (a: f32[8,64,128], b: f32[8,64,128], at: s32[], c: f32[99]) -> f32[8,64,128] {
  %a = f32[8,64,128]{2,1,0} parameter(0)
  %b = f32[8,64,128]{2,1,0} parameter(1)
  %at = s32[] parameter(2)
  %c = f32[99]{0} parameter(3)
  %made = (f32[8,64,128]{2,1,0}, f32[99]{0}) fusion(%a, %b, %at, %c), kind=kLoop, calls=%outer
  ROOT %first = f32[8,64,128]{2,1,0} get-tuple-element(%made), index=0
}
"""


def test_a_fusion_reads_the_slice_that_one_inside_it_takes_and_writes_the_slice_that_it_puts():
    # What it hands on as it came costs nothing; its counter is four bytes.
    assert planning.module_cost(NESTED, MESH).memory_bytes == 2 * 64 * 128 * 4 + 4


def test_large_temporaries_have_the_size_of_whole_tiles_and_a_source():
    largest = planning.module_cost(TEXT, MESH).temporaries
    assert [(t.type, t.nbytes, t.source) for t in largest[:2]] == [
        ("f32[1,64,128]", 64 * 128 * 4, ""),
        ("f32[3,100]", 8 * 128 * 4, "jit(step)/here"),
    ]


def test_a_loop_whose_length_depends_on_data_counts_once_and_is_told():
    text = TEXT.replace("%begin = s32[]{:T(128)} copy(%first)", "%begin = s32[]{:T(128)} add(%first, %first)")
    cost = planning.module_cost(text, MESH)
    assert cost.open_loops == 1
    assert cost.flops == 2 * 4 * 8 * 8 * 8


def test_text_that_is_no_module_is_refused():
    with pytest.raises(ValueError, match="no entry computation"):
        planning.module_cost("ENTRY", MESH)


@pytest.mark.parametrize(
    ("text", "axis"),
    [
        ("replica_groups={{0,2,4,6},{1,3,5,7}}", "fsdp"),
        ("replica_groups=[4,2]<=[8]", "tensor"),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", "fsdp"),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_1','axis_0'}", "fsdp+tensor"),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}", "fsdp"),
        ("replica_groups=mesh['a'=8] {'a':(4)2}", "tensor"),
        ("replica_groups=mesh['a'=8] {'a':(1)4}", "fsdp"),
        # A mesh that takes the devices in another order: 0, 2, 4, 6 in its first row.
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}, dimensions={1}", "fsdp"),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}", "tensor"),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=(0,2,4,6,1,3,5,7) {'b'}", "fsdp"),
        ("replica_groups={}", "all"),
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", "?"),
    ],
)
def test_groups_are_named_by_the_mesh_axes_along_which_they_lie(text, axis):
    assert hlo.axis_of(hlo.replica_groups(text), MESH) == axis


@pytest.mark.eight_devices
def test_what_a_compiled_cpu_step_does_is_what_its_trace_and_its_shards_say():
    mesh = train.make_mesh(**MESH)
    weights = jax.ShapeDtypeStruct((5, 16, 16), jnp.float32, sharding=NamedSharding(mesh, P(None, "fsdp")))
    rows = jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=NamedSharding(mesh, P("fsdp")))

    def layers(w, x):
        return jax.lax.scan(lambda x, one: (jnp.tanh(x @ one), None), x, w)[0]

    traced = jax.jit(layers, out_shardings=rows.sharding).trace(weights, rows)
    counted = planning.count_matmul_flops(traced.jaxpr)
    assert counted.flops == 5 * 2 * 8 * 16 * 16
    assert counted.nbytes == 5 * 4 * (2 * 8 * 16 + 16 * 16)
    cost = planning.module_cost(traced.lower().compile().as_text(), MESH)
    assert cost.flops == counted.flops // 4  # both devices of a pair along tensor do the same
    gathered = [c for c in cost.collectives if c.kind == "all-gather"]
    assert {c.axis for c in gathered} == {"fsdp"}
    assert sum(c.nbytes for c in gathered) == 5 * 16 * 16 * 4
