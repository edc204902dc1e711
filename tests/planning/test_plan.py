"""Plans of runs for chips that are not there."""

import functools
import json
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from subspace_jax import planning, train
from subspace_jax.cli.main import main
from subspace_jax.planning import chips
from tests.planning import phases
from tests.train.common import classification, make_tx, regression


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology", "v9:2x2"], "topology: no chip 'v9' in 'v9:2x2'; known are v5e: 1x1, 2x2"),
        (["--topology", "v5e:3x5"], "v5e has no slice '3x5'; known are"),
        (["--topology", "v5e:2x4", "--mesh", "fsdp=4,tensor=4"], "has 16 devices, v5e:2x4 has 8 chips"),
        (["--topology", "v5e:2x4", "--mesh", "fsdp=three"], "--mesh: expected a form such as"),
        (
            ["--topology", "h100:8", "--mesh", "fsdp=8", "--config.data.batch_size=12"],
            "12 examples don't divide among 8",
        ),
        (["--topology", "h100:8", "--config.data.batch_sise=12"], "did you mean data.batch_size?"),
        (["--topology", "h100:8", "--examples-per-shard", "-1"], "--examples-per-shard: expected at least 1"),
        (["--topology", "h100:8", "--json", "no/such/plan.json"], "--json: no folder"),
    ],
)
def test_a_plan_that_can_not_be_made_says_why(arguments, message, configs, capsys):
    assert main(["plan", "--config", f"{configs}/lm/tiny.py", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_without_the_tpu_compiler_the_message_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(chips.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"libtpu, which is not installed here; .*python -m pip install libtpu"):
        planning.tpu_devices("v5e:2x2")


def test_a_plan_for_gpus_has_state_and_flops_and_says_what_it_lacks(configs, tmp_path, capsys):
    arguments = ["--topology", "h100:8", "--mesh", "fsdp=4,tensor=2", "--config.model.remat=full"]
    with jax.numpy_dtype_promotion("standard"):  # Optax raises float32 to int32 powers
        out = tmp_path / "plan.json"
        assert main(["plan", "--config", f"{configs}/lm/tiny.py", *arguments, "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "was lowered and not compiled" in printed
    plan, evaluation = json.loads(out.read_text())
    assert (plan["program"], evaluation["program"]) == ("step", "evaluation eval")
    assert evaluation["flops"] > 0
    assert plan["optimizer"] == pytest.approx(2 * plan["params"], rel=1e-3)
    assert plan["temporaries"] is None
    assert plan["time"]["network"] is None
    # Forwards, again, and twice backwards through 12 square matrices in each of 4 layers, on 4 x 256 tokens; besides
    # attention and the vocabulary, which are a third as much here.
    assert plan["flops"] * 8 == pytest.approx(8 * 4 * 12 * 128**2 * 4 * 256, rel=0.5)


def test_a_task_without_an_outline_is_planned_by_its_first_batch(configs):
    config = train.load_config(f"{configs}/gcr/synthetic.py:k2")
    (plan,) = planning.plan_run(config, "h100:4", {"tensor": 2}, evaluations=False)
    assert plan.mesh == {"data": 2, "fsdp": 1, "tensor": 2}
    assert plan.examples == config.data.batch_size
    assert plan.flops > 0


@pytest.mark.slow
def test_a_sweep_plans_each_slice_and_leaves_out_what_can_not_be(configs, tmp_path, capsys):
    arguments = ["--topology", "h100:4", "--sweep", "--min-chips", "4", "--max-chips", "8", "--examples-per-shard", "4"]
    files = ["--json", str(tmp_path / "plans.json"), "--plot", str(tmp_path / "plans.png")]
    meshes = ["--mesh", "tensor=2", "--mesh", "fsdp=8"]
    assert main(["plan", "--config", f"{configs}/gcr/synthetic.py:k2", *arguments, *meshes, *files]) == 0
    printed = capsys.readouterr().out
    assert "skipped: h100:4 fsdp=8: mesh: data=-1 x fsdp=8 x tensor=1 has 8 devices, h100:4 has 4 chips" in printed
    assert "Fastest that fits: h100:8" in printed
    plans = json.loads((tmp_path / "plans.json").read_text())
    assert [(plan["topology"], plan["examples"]) for plan in plans] == [("h100:4", 8), ("h100:8", 16), ("h100:8", 32)]
    assert (tmp_path / "plans.png").stat().st_size > 1000


def lm_plan(configs):
    """The step of a small language model whose positions are sharded."""
    config = train.load_config(f"{configs}/lm/tiny.py")
    with jax.numpy_dtype_promotion("standard"):  # Optax raises float32 to int32 powers
        (plan,) = planning.plan_run(config, "v5e:2x4", {"data": 2, "sequence": 4}, evaluations=False)
    return plan


@pytest.mark.slow
def test_plan_run_on_a_host_with_one_device_shards_all_matmuls(configs):
    assert jax.device_count() == 1
    plan = lm_plan(configs)
    assert plan.flops == plan.needed_flops


EIGHT = """
import json, pathlib, sys
import jax
from tests.planning.test_plan import lm_plan
assert jax.device_count() == 8
print(json.dumps(lm_plan(pathlib.Path(sys.argv[1])).as_dict()))
"""


@pytest.mark.slow
def test_plan_run_gives_the_same_plan_on_hosts_with_one_device_and_with_eight(configs):
    env = os.environ | {"JAX_NUM_CPU_DEVICES": "8", "PYTHONPATH": str(configs.parent)}
    done = subprocess.run([sys.executable, "-c", EIGHT, str(configs)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    one, eight = json.loads(json.dumps(lm_plan(configs).as_dict())), json.loads(done.stdout.splitlines()[-1])
    assert one | {"compile_seconds": 0} == eight | {"compile_seconds": 0}


def test_plan_run_plans_every_distinct_step_and_evaluation():
    config = train.default_config()
    config.task = "tests.planning.phases"
    plans = planning.plan_run(config, "h100:4", {"fsdp": 2})
    # The second phase shares task, optimizer and shapes with the first one.
    assert [(plan.program, plan.examples) for plan in plans] == [
        ("step of first", 16),
        ("step of other optimizer", 16),
        ("step of larger batch", 32),
        ("evaluation eval", 8),
        ("evaluation doubled", 8),
        ("evaluation norm", 0),
    ]
    assert [plan.optimizer for plan in plans[:3]] == [0, 4 * 8 // 2, 0]
    # What an evaluator prepares beside the state: parameters times two, of the third; nothing of the others.
    assert [plan.model for plan in plans[3:]] == [0, 4 * 8, 0]


def test_plan_evaluation_holds_the_state_beside_the_program():
    mesh = train.make_mesh(1, 4, 2, devices=planning.tpu_devices("v5e:2x4"))
    task, tx, batch = phases.Measured(), make_tx(), phases.batch(8, mask=True)
    plan = planning.plan_evaluation(task, tx, "doubled", batch, mesh, "v5e:2x4")
    assert plan.total >= plan.arguments
    assert plan.padding >= 0
    assert plan.fits


def test_plan_run_refuses_data_that_depend_on_the_state():
    config = train.default_config()
    config.task, config.seed = "tests.planning.phases", 1
    with pytest.raises(ValueError, match="the data of phase 'late' depend on its state"):
        planning.plan_run(config, "h100:4")


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
@pytest.mark.eight_devices
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
        (plan,) = planning.plan_run(config, "v5p:4x4x8", evaluations=False)
    print(f"\n{planning.plan_text(plan)}\ncompiled in {plan.compile_seconds:.0f} s")
    assert plan.fits
    assert plan.open_loops == 0
