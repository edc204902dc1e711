"""Masks and coefficients as a task: the contract, its steps, its configs, and what a run on digits reaches."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from subspace_jax import train
from subspace_jax.merge import subspace_fusion as fusion
from subspace_jax.merge.subspace_fusion import task as module
from tests.train.task_battery import Interrupted, StopAt, TaskContract


def models():
    """A base of one layer and two models."""
    keys = jax.random.split(jax.random.key(0), 3)
    base = {"kernel": jax.random.normal(keys[0], (8, 8)), "bias": jnp.zeros(8)}
    finetuned = tuple(jax.tree.map(lambda x, k=k: x + jax.random.normal(k, x.shape), base) for k in keys[1:])
    return module.Models(base, finetuned, jnp.eye(8)[:, :5])


def apply(params, head, t, x):
    return jnp.matmul(jnp.tanh(jnp.matmul(x, params["kernel"]) + params["bias"][None]), head)


def task_of(*trained, **options):
    shapes = jax.eval_shape(models)
    axes = {"kernel": jax.P("embed", "mlp"), "bias": jax.P("mlp")}
    return module.FusionTask(module.Problem(models, shapes, apply, axes), trained, **options)


def data_of(batch_size=16):
    rng = np.random.default_rng(0)
    examples = {"inputs": rng.standard_normal((48, 2, 8)).astype(np.float32), "labels": rng.integers(5, size=(48, 2))}
    examples["labels"] = examples["labels"].astype(np.int32)
    return train.array_data(examples, batch_size=batch_size, evaluate={"eval": examples}, eval_batch_size=16)


@pytest.mark.slow
class TestMask(TaskContract):
    deterministic = False

    def make(self):
        return task_of("logits"), data_of()


@pytest.mark.slow
class TestCoefficients(TaskContract):
    def make(self):
        return task_of("lam", masked=False), data_of()


@pytest.mark.slow
class TestBoth(TaskContract):
    deterministic = False
    tx = {"lam": optax.sgd(0.1), "logits": optax.sgd(1.0)}  # noqa: RUF012

    def make(self):
        return task_of("lam", "logits"), data_of()


def one_step(task, tx):
    mesh = train.make_mesh(devices=jax.devices()[:1])
    state = train.init_state(task, tx, mesh)
    batch = next(data_of().train(0))
    with jax.numpy_dtype_promotion("standard"):
        new, metrics = train.jit_train_step(task, tx, mesh)(state, train.to_device(batch, train.batch_sharding(mesh)))
    return new, metrics, batch


def test_a_step_on_both_takes_coefficients_from_their_start_and_leaves_them_there():
    task = task_of("lam", "logits")
    state, metrics, _ = one_step(task, {"lam": optax.adam(0.1), "logits": optax.adam(0.01)})
    for lam in jax.tree.leaves(state.params["lam"]):
        np.testing.assert_allclose(lam, np.full(2, 0.3), rtol=1e-6)
    moved = np.concatenate([np.abs(x).reshape(-1) for x in jax.tree.leaves(jax.device_get(state.params["logits"]))])
    assert 0.005 < np.median(moved) < 0.0101
    assert {"loss", "entropy_0", "entropy_1"} <= metrics.keys()


@pytest.mark.slow
def test_a_step_of_the_task_on_coefficients_is_adamerging_step():
    task, txs = task_of("lam", masked=False), fusion.Optimizers(lam=optax.adam(0.1))
    state, metrics, batch = one_step(task, txs.lam)
    taus = fusion.task_vectors(models().base, models().finetuned)
    functions = [lambda params, x: apply(params, models().extra, 0, x)] * 2
    with jax.numpy_dtype_promotion("standard"):
        want, found = jax.jit(
            lambda state, batches: fusion.adamerging_step(
                state,
                batches,
                jax.random.key(0),
                fusion=fusion.Fusion(models().base, taus),
                apply_fns=functions,
                txs=txs,
            )
        )(fusion.concrete_init(taus, txs), [jnp.asarray(batch["inputs"][:, t]) for t in range(2)])
    chex.assert_trees_all_close(state.params["lam"], want.lam, atol=1e-5)
    chex.assert_trees_all_close(metrics["loss"], found["loss"], rtol=1e-5)


def test_configs_are_read_and_outlined_without_data():
    phases = {"concrete": ("mask",), "concrete_adamerging": ("mask", "adaptation"), "adamerging": ("coefficients",)}
    for variant, names in phases.items():
        config = train.load_config(f"merge/digit_views:{variant}")
        run = module.outline(config)
        assert tuple(phase.name for phase in run.phases) == names
        doubled = variant == "concrete_adamerging"
        assert run.phases[0].data.batch["inputs"].shape == (128 if doubled else 64, 4, 64)
    with pytest.raises(ValueError, match="variant: expected one of"):
        train.load_config("merge/digit_views:ties")


@pytest.mark.parametrize(
    ("error", "field"),
    [
        ("model.method: expected one of", "model.method=ties"),
        ("model.mode: expected one of", "model.mode=soft"),
        ("model.temperature: expected a number above 0", "model.temperature=0.0"),
        ("model.adapt_steps: expected", "model.adapt_steps=0"),
        ("model.lam_learning_rate: expected", "model.lam_learning_rate=-1.0"),
    ],
)
def test_fields_that_can_not_serve_are_refused_before_data_are_read(error, field):
    config = train.override(train.load_config("merge/digit_views"), [field])
    with pytest.raises(ValueError, match=error):
        module.build(config)


@pytest.mark.parametrize("trained", [(), ("lam", "mask")])
def test_a_task_refuses_what_can_not_be_trained(trained):
    with pytest.raises(ValueError, match="trained: expected lam, or logits of a mask, or both"):
        task_of(*trained)
    with pytest.raises(ValueError, match="trained: expected"):
        task_of("logits", masked=False)


@pytest.mark.slow
def test_a_run_through_both_phases_resumes_to_the_same_coefficients(tmp_path):
    settings = ["train.steps=3", "model.adapt_steps=3", "train.eval_every=3", "train.checkpoint_every=2"]
    config = train.override(train.load_config("merge/digit_views:concrete_adamerging"), settings)
    with jax.numpy_dtype_promotion("standard"):
        whole = train.run(config, tmp_path / "whole", progress=False)

        first, second = (
            dataclasses.replace(train.build(config), workdir=tmp_path / "cut", progress=False) for _ in range(2)
        )
        with pytest.raises(Interrupted):
            train.fit(first, (StopAt(5),))
        resumed = train.fit(second)
    chex.assert_trees_all_equal(jax.device_get(resumed.state.params), jax.device_get(whole.state.params))
