"""What the compiled steps of the project's configs send to each other, and how large their largest arrays are."""

import dataclasses
import json

import jax
import pytest

from subspace_jax import planning, train
from subspace_jax.language import finetune
from subspace_jax.train.optimizer import make_optimizer

MIB = 2**20
# config, fields, slice, mesh, (kind, axis) of all collectives, MiB of the largest temporary, KiB of the arrays that are
# gathered as a mean over those of a kind, None where there are none.
CASES = [
    (
        "gcr/digits.py:k8",
        [],
        "v5e:2x4",
        {"data": 2, "fsdp": 2, "tensor": 2},
        {("all-gather", "fsdp"), ("all-gather", "tensor"), ("all-reduce", "data+fsdp"), ("all-reduce", "fsdp"),
         ("all-reduce", "tensor")},
        0.04,
        16,
    ),
    (
        "lm/tiny.py",
        ["adapter.method=dora", "model.dtype=bfloat16", "data.batch_size=64"],
        "v5e:2x4",
        {"fsdp": 4, "tensor": 2},
        # The one over both axes is the norm of the gradient.
        {("all-gather", "fsdp"), ("all-reduce", "fsdp"), ("all-reduce", "tensor"), ("all-reduce", "fsdp+tensor")},
        8.0,
        64,
    ),
    (
        "lm/tiny.py",
        ["data.batch_size=64"],
        "v5e:2x4",
        {"data": 2, "fsdp": 2, "tensor": 2},
        {("all-gather", "fsdp"), ("all-reduce", "data+fsdp"), ("all-reduce", "fsdp"), ("all-reduce", "tensor")},
        8.0,
        64,
    ),
    # Rows split along their length: keys and values are gathered along it, and nothing of theirs along fsdp.
    (
        "lm/tiny.py",
        ["adapter.method=dora", "model.dtype=bfloat16", "data.batch_size=16"],
        "v5e:2x4",
        {"fsdp": 2, "sequence": 4},
        {("all-gather", "sequence"), ("all-reduce", "sequence"), ("all-gather", "fsdp+sequence"),
         ("all-reduce", "fsdp+sequence"), ("all-reduce", "fsdp")},
        1.0,
        512,
    ),
    # Statistics of columns and r x r products of factors that are split by their rank go around too; groups that lie
    # along a part of fsdp have no name.
    (
        "lm/tiny.py",
        ["adapter.method=lora", "optim.name=adaprelora", "optim.kwargs.weight_decay=0.0", "model.dtype=bfloat16",
         "data.batch_size=64"],
        "v5e:2x4",
        {"fsdp": 4, "tensor": 2},
        {("all-gather", "fsdp"), ("all-gather", "?"), ("all-to-all", "fsdp"), ("all-reduce", "fsdp"),
         ("all-reduce", "tensor"), ("all-reduce", "fsdp+tensor")},
        1.0,
        64,
    ),
    # A batch split over all chips, whole weights: nothing but sums of gradients and of batch statistics.
    ("gcr/imagenet_resnet.py:resnet50d_k8", [], "v5e:4x4", {"data": 16}, {("all-reduce", "data")}, 62.5, None),
]  # fmt: skip


def planned(configs, path, fields, topology, mesh):
    config = train.override(train.load_config(f"{configs}/{path}"), fields)
    with jax.numpy_dtype_promotion("standard"):  # Optax raises float32 to int32 powers
        return planning.plan_run(config, topology, mesh, evaluations=False)[0]


@pytest.mark.eight_devices
@pytest.mark.parametrize("method", ["galore", "fira", "apollo", "online_subspace_descent", "coso"])
def test_no_state_of_a_projected_optimizer_lies_whole_on_every_chip(configs, method):
    config = train.load_config(f"{configs}/optim/tiny_gpt.py:{method}")
    mesh = train.make_mesh(data=1, fsdp=8)
    task = finetune.outline(config).phases[0].task
    with jax.numpy_dtype_promotion("standard"):
        abstract, shardings = train.state_shardings(task, make_optimizer(config.optim, 1000), mesh)
    whole = {
        jax.tree_util.keystr(path): x.shape
        for (path, x), sharding in zip(
            jax.tree_util.tree_leaves_with_path(abstract.opt_state), jax.tree.leaves(shardings.opt_state), strict=True
        )
        if x.size > 4096 and sharding.is_fully_replicated
    }
    assert not whole


@pytest.mark.slow
@pytest.mark.parametrize(("path", "fields", "topology", "mesh", "expected", "largest", "gathered"), CASES)
def test_a_config_sends_what_its_sharding_needs_and_no_more(
    configs, path, fields, topology, mesh, expected, largest, gathered
):
    plan = planned(configs, path, fields, topology, mesh)
    print(json.dumps([dataclasses.asdict(c) for c in plan.collectives]), plan.largest[0])
    assert {(c.kind, c.axis) for c in plan.collectives} == expected
    assert plan.largest[0].nbytes <= largest * MIB
    whole = [c.nbytes / c.count for c in plan.collectives if c.kind == "all-gather"]
    assert max(whole, default=0) <= (gathered or 0) * 1024
    # Two moments of each parameter at most, and as large a share of them.
    assert plan.optimizer <= 2.1 * plan.params


@pytest.mark.slow
@pytest.mark.eight_devices
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_the_plan_of_a_step_and_its_program_for_eight_cpu_devices_agree(configs, method):
    # Both compilers take the same sharded step.
    config = train.override(
        train.load_config(f"{configs}/lm/tiny.py"),
        [f"adapter.method={method}", "model.dtype=bfloat16", "data.batch_size=64"],
    )
    plans = {}
    for platform in ("tpu", "cpu"):
        devices = planning.tpu_devices("v5e:2x4") if platform == "tpu" else jax.devices()
        mesh = train.make_mesh(data=1, fsdp=4, tensor=2, devices=devices)
        with jax.numpy_dtype_promotion("standard"):
            phase = finetune.outline(config).phases[0]
            tx = make_optimizer(config.optim, 1000)
            plans[platform] = planning.plan_step(phase.task, tx, phase.data.batch, mesh, "v5e:2x4")
    tpu, cpu = plans["tpu"], plans["cpu"]
    assert (tpu.params, tpu.optimizer, tpu.variables, tpu.batch) == (
        cpu.params,
        cpu.optimizer,
        cpu.variables,
        cpu.batch,
    )
    # But for single numbers, such as the norm of the gradient, which may be summed over two axes at once or in turn.
    sent = {name: {(c.kind, c.axis): c for c in plan.collectives if c.nbytes > 1024} for name, plan in plans.items()}
    assert sent["tpu"].keys() == sent["cpu"].keys()
    if method == "lora":
        # Products are the same to the last one; DoRA's norms are computed by another formula on TPUs.
        assert tpu.flops == cpu.flops
    else:
        # bfloat16 is float32 on a CPU, so activations that are sent there are twice as large; the few float32 numbers
        # beside are not.  LoRA's sums along ``tensor`` are combined by one compiler and not by the other.
        activations = ("all-reduce", "tensor")
        assert sent["cpu"][activations].nbytes == pytest.approx(2 * sent["tpu"][activations].nbytes, rel=1e-3)
