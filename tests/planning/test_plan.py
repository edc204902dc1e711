"""Plans: what they count in a module's text, in a traced step, and in a step compiled for chips that are not there."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from subspace_jax import planning, train
from subspace_jax.cli.main import main
from subspace_jax.planning import chips as plan_chips
from subspace_jax.planning import hlo as plan_hlo
from tests.train.common import classification, make_tx, regression

MESH = {"data": 1, "fsdp": 4, "tensor": 2}

# In the form that the TPU compiler gives: a loop of 4 with a gather, a product written as a dilated convolution, and
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


def test_a_loop_counts_as_often_as_it_runs_and_a_spread_collective_once():
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
    assert plan_hlo.axis_of(plan_hlo.replica_groups(text), MESH) == axis


def test_what_a_compiled_cpu_step_does_is_what_its_trace_and_its_shards_say():
    mesh = train.make_mesh(**MESH)
    weights = jax.ShapeDtypeStruct((5, 16, 16), jnp.float32, sharding=NamedSharding(mesh, P(None, "fsdp")))
    rows = jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=NamedSharding(mesh, P("fsdp")))

    def layers(w, x):
        return jax.lax.scan(lambda x, one: (jnp.tanh(x @ one), None), x, w)[0]

    traced = jax.jit(layers, out_shardings=rows.sharding).trace(weights, rows)
    products = planning.count_products(traced.jaxpr)
    assert products.flops == 5 * 2 * 8 * 16 * 16
    assert products.nbytes == 5 * 4 * (2 * 8 * 16 + 16 * 16)
    cost = planning.module_cost(traced.lower().compile().as_text(), MESH)
    assert cost.flops == products.flops // 4  # both devices of a pair along tensor do the same
    gathered = [c for c in cost.collectives if c.kind == "all-gather"]
    assert {c.axis for c in gathered} == {"fsdp"}
    assert sum(c.nbytes for c in gathered) == 5 * 16 * 16 * 4


def test_the_even_share_counts_branches_kernels_and_convolutions():
    def f(x, w):
        y = jax.lax.cond(x.sum() > 0, lambda: x @ x @ x, lambda: x @ x)
        return y, jax.lax.conv_general_dilated(w, w[:1, :, :3], (1,), "SAME", feature_group_count=1)

    jaxpr = jax.make_jaxpr(f)(jnp.ones((4, 4)), jnp.ones((2, 6, 8)))
    assert planning.count_products(jaxpr).flops == 2 * 2 * 4**3 + 2 * (2 * 1 * 8) * (6 * 3)


def test_what_shard_map_runs_counts_on_each_device():
    mesh = train.make_mesh(2, 2, 2)
    f = jax.shard_map(lambda x, w: x @ w, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"))
    jaxpr = jax.make_jaxpr(f)(jnp.ones((8, 4)), jnp.ones((4, 4)))
    assert planning.count_products(jaxpr).flops == 8 * (2 * 4 * 4 * 4)


PLAN = planning.Plan(
    topology="v5e:2x4", mesh={"data": 1, "fsdp": 4, "tensor": 2}, rows=8, params=4 * 2**30, optimizer=8 * 2**30,
    variables=4, batch=2**20, padding=0, temporaries=2**30, code=2**20, total=13 * 2**30, limit=int(15.75 * 2**30),
    flops=197 * 10**12, needed_flops=197 * 10**12, memory_bytes=819 * 10**8,
    collectives=(planning.Collective("all-gather", "fsdp", 4, 3, 4 * 10**10),),
    largest=(planning.Temporary("f32[8,8]", 4096, "here"),), open_loops=0, time=planning.Roofline(1.0, 0.1, 0.6),
    compile_seconds=1.0,
)  # fmt: skip


def test_a_plan_is_told_in_words_and_numbers():
    text = planning.plan_text(PLAN)
    for words in (
        "13.00 GiB",
        "fits, 2.75 GiB (17 %) free",
        "all-gather",
        "bound by compute: 1.000 s at best, 1.700 s",
    ):
        assert words in text
    assert planning.advice(PLAN) == []
    assert json.loads(json.dumps(PLAN.as_dict()))["time"]["bound"] == "compute"


def test_what_does_not_fit_is_told_with_what_to_change():
    large = dataclasses.replace(PLAN, total=30 * 2**30, refusal="out of memory", time=None, collectives=None)
    text = planning.plan_text(large)
    assert "does not fit, 14.25 GiB too much" in text
    assert "the state takes 12.00 of 15.75 GiB on 8 shares (fsdp x tensor); with 16 shares" in text
    assert "halve data.batch_size" in text
    assert "The compiler refused the program: out of memory" in text


def test_a_sweep_names_the_fastest_that_fits(tmp_path):
    quick = dataclasses.replace(
        PLAN, topology="v5e:4x4", mesh=MESH | {"data": 2}, time=planning.Roofline(0.5, 0.1, 0.6)
    )
    no = dataclasses.replace(quick, mesh=MESH | {"fsdp": 8}, total=2**40, time=planning.Roofline(0.1, 0.1, 0.1))
    assert planning.best_plan([PLAN, quick, no]) is quick
    assert planning.best_plan([no]) is None
    text = planning.sweep_text([PLAN, quick, no])
    assert "Fastest that fits: v5e:4x4 with data=2, fsdp=4, tensor=2, 600.000 ms" in text
    assert "Fewest chip-seconds for a row: v5e:2x4" in text
    planning.plot_sweep([PLAN, quick, no], tmp_path / "plan.png")
    assert (tmp_path / "plan.png").stat().st_size > 1000


def test_rings_are_as_fast_as_their_links():
    v5e, h100 = planning.CHIPS["v5e"], planning.CHIPS["h100"]

    def seconds(kind, chip, devices=16):
        return planning.collective_seconds(chip, planning.Collective(kind, "fsdp", devices, 1, 16 * 10**9))

    # 15 of 16 shares pass each chip, on both links of a closed ring; a ring of 8 is a line on this chip.
    assert seconds("all-gather", v5e) == pytest.approx(15e9 / 100e9)
    assert seconds("all-reduce", v5e) == pytest.approx(2 * 15e9 / 100e9)
    assert seconds("all-gather", v5e, 8) == pytest.approx(14e9 / 50e9)
    assert seconds("collective-permute", v5e) == pytest.approx(16e9 / 50e9)
    assert seconds("all-to-all", h100) == pytest.approx(15e9 / 450e9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology", "v9:2x2"], "topology: no chip 'v9' in 'v9:2x2'; known are v5e: 1x1, 2x2"),
        (["--topology", "v5e:3x5"], "v5e has no slice '3x5'; known are"),
        (["--topology", "v5e:2x4", "--mesh", "fsdp=4,tensor=4"], "has 16 places, v5e:2x4 has 8 chips"),
        (["--topology", "v5e:2x4", "--mesh", "fsdp=three"], "--mesh: expected a form such as"),
        (["--topology", "h100:8", "--mesh", "fsdp=8", "--config.data.batch_size=12"], "12 examples don't divide among 8"),
        (["--topology", "h100:8", "--config.data.batch_sise=12"], "did you mean data.batch_size?"),
        (["--topology", "h100:8", "--examples-per-shard", "-1"], "--examples-per-shard: expected at least 1"),
        (["--topology", "h100:8", "--json", "no/such/plan.json"], "--json: no folder"),
    ],
)
def test_a_plan_that_can_not_be_made_says_why(arguments, message, configs, capsys):
    assert main(["plan", "--config", f"{configs}/lm/tiny.py", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_without_the_tpu_compiler_the_message_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(plan_chips.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"libtpu, which is not installed here; .*python -m pip install libtpu"):
        planning.tpu_devices("v5e:2x2")


def test_a_plan_for_gpus_has_state_and_flops_and_says_what_it_lacks(configs, tmp_path, capsys):
    arguments = ["--topology", "h100:8", "--mesh", "fsdp=4,tensor=2", "--config.model.remat=full"]
    with jax.numpy_dtype_promotion("standard"):  # Optax raises float32 to int32 powers
        out = tmp_path / "plan.json"
        assert main(["plan", "--config", f"{configs}/lm/tiny.py", *arguments, "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "was lowered and not compiled" in printed
    plan = json.loads(out.read_text())
    assert plan["optimizer"] == pytest.approx(2 * plan["params"], rel=1e-3)
    assert plan["temporaries"] is None
    assert plan["time"]["network"] is None
    # Forwards, again, and twice backwards through 12 square matrices in each of 4 layers, on 4 x 256 tokens; besides
    # attention and the vocabulary, which are a third as much here.
    assert plan["flops"] * 8 == pytest.approx(8 * 4 * 12 * 128**2 * 4 * 256, rel=0.5)


def test_a_task_without_an_outline_is_planned_by_its_first_batch(configs):
    config = train.load_config(f"{configs}/gcr/synthetic.py:k2")
    plan = planning.plan_run(config, "h100:4", {"tensor": 2})
    assert plan.mesh == {"data": 2, "fsdp": 1, "tensor": 2}
    assert plan.rows == config.data.batch_size
    assert plan.flops > 0


def test_a_sweep_plans_each_slice_and_leaves_out_what_can_not_be(configs, tmp_path, capsys):
    arguments = ["--topology", "h100:4", "--sweep", "--min-chips", "4", "--max-chips", "8", "--examples-per-shard", "4"]
    files = ["--json", str(tmp_path / "plans.json"), "--plot", str(tmp_path / "plans.png")]
    meshes = ["--mesh", "tensor=2", "--mesh", "fsdp=8"]
    assert main(["plan", "--config", f"{configs}/gcr/synthetic.py:k2", *arguments, *meshes, *files]) == 0
    printed = capsys.readouterr().out
    assert "skipped: h100:4 fsdp=8: mesh: data=-1 x fsdp=8 x tensor=1 has 8 places, h100:4 has 4 chips" in printed
    assert "Fastest that fits: h100:8" in printed
    plans = json.loads((tmp_path / "plans.json").read_text())
    assert [(plan["topology"], plan["rows"]) for plan in plans] == [("h100:4", 8), ("h100:8", 16), ("h100:8", 32)]
    assert (tmp_path / "plans.png").stat().st_size > 1000


@pytest.mark.parametrize("sizes", [{"fsdp": 32, "tensor": 4}, {"fsdp": 64, "tensor": 2}])
def test_a_mesh_on_a_slice_keeps_tensor_inside_a_process(sizes):
    # Four chips of a machine; along the links of the slice four in a row belong to two machines.
    mesh = train.make_mesh(data=1, **sizes, devices=planning.tpu_devices("v5p:4x4x8"))
    assert len(set(mesh.devices.flat)) == 128
    for row in mesh.devices.reshape(-1, sizes["tensor"]):
        assert len({device.process_index for device in row}) == 1
    train.check_batch_size(sizes["fsdp"], mesh)


@functools.cache
def plan_for(platform):
    task, data = classification(features=(), n=128)
    batch = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in next(data.train(0)).items()}
    devices = planning.tpu_devices("v5e:2x4") if platform == "tpu" else jax.devices()
    mesh = train.make_mesh(data=2, fsdp=2, tensor=2, devices=devices)
    tx = make_tx(grassmann="riemannian_adam")
    with jax.numpy_dtype_promotion("standard"):
        return planning.plan_step(task, tx, batch, mesh, "v5e:2x4"), train.state_shardings(task, tx, mesh), batch


@pytest.mark.slow
def test_the_step_for_a_slice_and_for_eight_cpu_devices_reduce_along_the_same_axes():
    kinds = {}
    for platform in ("tpu", "cpu"):
        plan = plan_for(platform)[0]
        print(platform, plan.collectives)
        kinds[platform] = {c.axis for c in plan.collectives if c.kind in ("all-reduce", "reduce-scatter")}
    # Which collectives are merged or split, and what tensor needs, is each compiler's own choice; gradients are summed
    # over the rows of the batch by both.
    for found in kinds.values():
        assert any("data" in axis for axis in found)
        assert any("fsdp" in axis for axis in found)


def test_planned_arguments_are_the_sum_of_the_shards():
    plan, (state, shardings), batch = plan_for("tpu")
    shards = zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True)
    whole = sum(math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize for x, s in shards)
    assert plan.params + plan.optimizer + plan.variables == whole
    assert plan.batch == sum(math.prod(x.shape) * x.dtype.itemsize for x in batch.values()) // 4
    assert plan.padding >= 0
    assert plan.fits
    assert plan.temporaries > 0
    assert plan.time.network > 0


def test_a_program_that_the_compiler_refuses_is_a_plan_that_does_not_fit():
    task, _ = regression()
    task.n = 2**22
    batch = {
        "inputs": jax.ShapeDtypeStruct((2**12, task.n), jnp.float32),
        "labels": jax.ShapeDtypeStruct((2**12,), jnp.float32),
    }
    mesh = train.make_mesh(1, 1, 1, devices=planning.tpu_devices("v5e:1x1"))
    plan = planning.plan_step(task, make_tx(), batch, mesh, "v5e:1x1")
    assert not plan.fits
    assert plan.total > plan.limit
    assert "HBM" in plan.refusal or "hbm" in plan.refusal


@pytest.mark.slow
def test_the_step_of_70_billion_parameters_with_dora_fits_128_chips(configs):
    config = train.load_config(f"{configs}/lm/large.py:llama3-70b")
    config = train.override(config, ["adapter.method=dora", "adapter.rank=384"])
    with jax.numpy_dtype_promotion("standard"):
        plan = planning.plan_run(config, "v5p:4x4x8")
    print(f"\n{planning.plan_text(plan)}\ncompiled in {plan.compile_seconds:.0f} s")
    assert plan.fits
    assert plan.open_loops == 0
    assert plan.compile_seconds < 180
