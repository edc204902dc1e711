"""The largest temporaries of a compiled module, and where they come from."""

import pytest

from subspace_jax.planning.hlo import parse_module
from subspace_jax.planning.temporaries import Temporary, largest_temporaries

# In the form of the TPU compiler: a weight that is prefetched, a product, a fusion whose root has no metadata, and a
# result that is copied back to main memory.
TEXT = """HloModule jit_step, is_scheduled=true

FileNames
1 "/home/someone/subspace_jax/subspace_jax/nn/layers/linear.py"
2 "/usr/lib/python3.12/site-packages/optax/_src/base.py"

FunctionNames
1 "linear"

FileLocations
1 {file_name_id=1 function_name_id=1 line=63 end_line=63 column=4 end_column=9}
2 {file_name_id=2 function_name_id=1 line=7 end_line=7 column=4 end_column=9}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}

%zeros () -> bf16[64,128] {
  %zero = f32[] constant(0)
  %wide = f32[64,128]{1,0} broadcast(%zero), dimensions={}, metadata={op_name="jit(step)/zeros" stack_frame_id=2}
  ROOT %narrow = bf16[64,128]{1,0} convert(%wide)
}

ENTRY %main (w: f32[128,128], x: f32[64,128]) -> (f32[64,128], f32[]) {
  %w = f32[128,128]{1,0} parameter(0), metadata={op_name="params[\\'w\\']"}
  %x = f32[64,128]{1,0} parameter(1)
  %fetch = (f32[128,128]{1,0:S(1)}, f32[128,128]{1,0}, u32[]{:S(2)}) copy-start(%w)
  %fetched = f32[128,128]{1,0:S(1)} copy-done(%fetch)
  %y = f32[96,128]{1,0} dot(%x, %fetched), lhs_contracting_dims={1}, metadata={op_name="jit(step)/dot" stack_frame_id=1}
  %filled = bf16[64,128]{1,0} fusion(), kind=kLoop, calls=%zeros
  %copied = f32[128,128]{0,1} copy(%w)
  %other = f32[32,128]{1,0} add(%x, %x)
  %sum = f32[]{:T(128)} reduce(%y, %x), dimensions={0,1}, to_apply=%add
  %made = f32[64,128]{1,0:S(1)} tanh(%y)
  %put = (f32[64,128]{1,0}, f32[64,128]{1,0:S(1)}, u32[]{:S(2)}) copy-start(%made)
  %done = f32[64,128]{1,0} copy-done(%put)
  ROOT %both = (f32[64,128]{1,0}, f32[]) tuple(%done, %sum)
}
"""


def test_largest_temporaries_are_no_arguments_results_or_scalars_and_have_their_sources():
    assert largest_temporaries(parse_module(TEXT), 10) == (
        Temporary("f32[128,128]", 128 * 128 * 4, "params['w']"),
        Temporary("f32[96,128]", 96 * 128 * 4, "jit(step)/dot", "subspace_jax/nn/layers/linear.py:63"),
        Temporary("bf16[64,128]", 64 * 128 * 2, "jit(step)/zeros", "optax/_src/base.py:7"),
        Temporary("f32[32,128]", 32 * 128 * 4, ""),
    )


def test_largest_temporaries_are_at_most_the_number_asked_for():
    assert [t.type for t in largest_temporaries(parse_module(TEXT), 2)] == ["f32[128,128]", "f32[96,128]"]


@pytest.mark.parametrize("section", ["FileNames", "FileLocations", "StackFrames"])
def test_largest_temporaries_have_no_line_where_a_table_is_missing(section):
    found = largest_temporaries(parse_module(TEXT.replace(section, "Others")), 10)
    assert {t.line for t in found} == {""}
    assert found[1].source == "jit(step)/dot"
