"""MLC as tasks: the contract of both phases, what enters the second, and the fields of its configs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from subspace_jax import data, train
from subspace_jax.cluster import mlc
from subspace_jax.cluster.mlc import task as module
from tests.train.task_battery import TaskContract

SETTINGS = mlc.MLCSettings(eta=0.3)


def heads(key):
    return mlc.MLCHeads(8, 12, 5, rngs=nnx.Rngs(params=key))


@functools.cache
def sets():
    made = data.union_of_subspaces(0, 3, 8, subspace_dim=2, num_train=96, num_test=40)
    return train.array_data(made.train, batch_size=32, evaluate={"eval": made.test}, eval_batch_size=24)


@pytest.mark.slow
class TestPretrain(TaskContract):
    def make(self):
        return mlc.PretrainTask(heads, mlc.Noise(0.1), 3, SETTINGS, mlc.PretrainSettings()), sets()


@pytest.mark.slow
class TestMLC(TaskContract):
    tx = optax.sgd(0.001)

    def make(self):
        return mlc.MLCTask(heads, mlc.Noise(0.1), 3, SETTINGS), sets()


def losses_of(settings, batch):
    task = mlc.MLCTask(heads, mlc.Noise(0.0), 3, settings)
    params, variables = task.init(jax.random.key(0))
    loss = functools.partial(task.loss, batch=batch, key=jax.random.key(1), step=jnp.int32(0))
    return jax.jit(lambda p, v: loss(p, v))(params, variables)


@pytest.mark.slow
def test_mlc_task_of_groups_is_a_block_diagonal_membership_and_its_norm_adds_to_the_loss():
    batch = next(sets().train(0))
    whole, (_, metrics) = losses_of(SETTINGS, batch)
    np.testing.assert_allclose(whole, (metrics["compress"] - metrics["expand"]) / 2, rtol=1e-5)
    grouped, (_, of_groups) = losses_of(dataclasses.replace(SETTINGS, groups=4), batch)
    np.testing.assert_allclose(of_groups["expand"], metrics["expand"], rtol=1e-5)
    assert of_groups["compress"] < metrics["compress"]  # fewer members of each
    heavy, _ = losses_of(dataclasses.replace(SETTINGS, membership_l2=0.1), batch)
    assert heavy > whole > grouped
    with pytest.raises(ValueError, match="groups: expected a divisor of the batch of 32, got 5"):
        losses_of(dataclasses.replace(SETTINGS, groups=5), batch)


@pytest.mark.slow
def test_second_phase_enters_with_the_feature_head_in_both(tmp_path, configs):
    settings = ["pretrain.steps=2", "mlc.steps=1", "optim.learning_rate=0.0", "model.hidden=16", "model.features=8"]
    settings += ["data.batch_size=32", "pretrain.batch_size=32"]
    config = train.override(train.load_config(f"{configs}/cluster/mlc_digits.py"), settings)
    with jax.numpy_dtype_promotion("standard"):
        found = train.run(config, tmp_path, progress=False)
    params = found.state.params
    np.testing.assert_array_equal(params["cluster_head"]["kernel"], params["feature_head"]["kernel"])
    splits = [(row["phase"], row["split"]) for row in found.rows]
    assert splits.index(("pretrain", "clusters")) < splits.index(("mlc", "train"))
    gain = found.metrics["clusters/kmeans_accuracy"] - found.summary["pretrain/kmeans_accuracy"]
    np.testing.assert_allclose(found.summary["kmeans_gain"], gain)


@pytest.mark.parametrize(
    ("error", "field", "value"),
    [
        (r"data\.name: expected one of .*got 'nowhere'", "data.name", "nowhere"),
        (r"data\.shift: expected a finite number at least 0", "data.shift", "-1.0"),
        (r"data\.scale: expected a number in \[0, 1\)", "data.scale", "1.0"),
        (r"data\.batch_size: expected at most 1797 examples, got 2000", "data.batch_size", "2000"),
        (r"pretrain\.batch_size: expected at least 1", "pretrain.batch_size", "0"),
        (r"pretrain\.steps, mlc\.steps: expected a step of either phase", "mlc.steps", "0"),
        (r"pretrain\.eps_sq: expected a finite number above 0", "pretrain.eps_sq", "0.0"),
        (r"model\.features: expected at least 1", "model.features", "0"),
        (r"mlc\.eps_sq: expected a finite number above 0", "mlc.eps_sq", "0.0"),
        (r"mlc\.eta: expected a finite number above 0", "mlc.eta", "-0.1"),
        (r"mlc\.n_iter: expected at least 1", "mlc.n_iter", "0"),
        (r"mlc\.gamma: expected a finite number at least 0", "mlc.gamma", "-1.0"),
        (r"mlc\.kernel: expected one of", "mlc.kernel", "rbf"),
        (r"mlc\.mass: expected one of", "mlc.mass", "none"),
        (r"mlc\.grad: expected one of", "mlc.grad", "none"),
        (r"mlc\.groups: expected a divisor of data\.batch_size=384, got 7", "mlc.groups", "7"),
    ],
)
def test_build_refuses_fields_before_data_are_read(error, field, value):
    config = module.default_config()
    if field == "mlc.steps":
        config.pretrain.steps = 0
    with pytest.raises(ValueError, match=error):
        module.build(train.override(config, [f"{field}={value}"]))


def test_outline_has_the_shapes_of_build():
    config = module.default_config()
    for outlined, built in zip(module.outline(config).phases, module.build(config).phases, strict=True):
        assert outlined.data.batch == built.data.batch
        assert (outlined.name, outlined.num_steps) == (built.name, built.num_steps)
    assert [phase.name for phase in module.build(train.override(config, ["mlc.steps=0"])).phases] == ["pretrain"]


def test_variants_of_the_configs_are_both_phases_or_the_first(configs):
    for name in ("mlc_digits", "mlc_mnist"):
        whole, first = (train.load_config(f"{configs}/cluster/{name}.py{end}") for end in ("", ":pretrain"))
        assert whole.mlc.steps > first.mlc.steps == 0 < first.pretrain.steps == whole.pretrain.steps
        with pytest.raises(ValueError, match="variant: expected"):
            train.load_config(f"{configs}/cluster/{name}.py:other")
