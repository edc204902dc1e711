"""The maps between two models as a task: the contract, its config, and what it measures."""

import functools

import jax
import numpy as np
import pytest

from subspace_jax import train
from subspace_jax.represent import lambda_orthogonality as compat
from subspace_jax.represent.lambda_orthogonality import task as module
from tests.train.task_battery import TaskContract


def sets(d_old=3, d_new=4):
    """Old and new vectors of classes, which a linear map relates but for noise."""
    rng = np.random.default_rng(0)
    mix, centers, found = rng.standard_normal((d_new, d_old)), 2 * rng.standard_normal((4, d_new)), {}
    for name, count in (("train", 48), ("eval", 40)):
        labels = rng.integers(4, size=count).astype(np.int32)
        new = centers[labels] + rng.standard_normal((count, d_new))
        old = new @ mix + 0.1 * rng.standard_normal((count, d_old))
        found[name] = {"old": old.astype(np.float32), "new": new.astype(np.float32), "labels": labels}
    return found


@functools.cache
def problem():
    made = sets()
    own = train.array_data(made["train"], batch_size=16, evaluate=made, eval_batch_size=16)
    return compat.CompatTask(3, 4, compat.CompatSettings(weights=(1.0, 1.0, 0.1, 1.0))), own


@pytest.mark.slow
class TestCompat(TaskContract):
    def make(self):
        return problem()


@pytest.mark.slow
def test_retrieval_measures_every_pairing_and_both_orders():
    task, own = problem()
    mesh = train.make_mesh(devices=jax.devices()[:1])
    state = train.init_state(task, TestCompat.tx, mesh)
    found = train.evaluate(task, state, own.evaluate, mesh=mesh, name="retrieval")
    pairs = ("old", "new", "cross", "kept", "forward")
    assert {f"{name}_{kind}" for name in pairs for kind in ("cmc1", "map")} <= found.keys()
    assert "raw_cmc1" not in found  # vectors of other widths
    assert found["new_cmc1"] > 0.5
    assert found["kept_minus_new"] == pytest.approx(found["kept_cmc1"] - found["new_cmc1"], abs=1e-6)
    assert 0 < found["backfill_area"] <= 1
    assert found["distance_correlation"] < 1


def test_configs_are_read_and_outlined_without_data():
    for variant in ("lam0", "lam05", "lam1", "unconstrained", "strict"):
        config = train.load_config(f"represent/compatible_digits:{variant}")
        (phase,) = module.outline(config).phases
        assert phase.data.batch["new"].shape == (256, 16)
        params, _ = jax.eval_shape(phase.task.init, jax.random.key(0))
        assert set(params["backward"]) == {"skew" if variant == "strict" else "kernel", "bias"}
    with pytest.raises(ValueError, match="variant: expected one of"):
        train.load_config("represent/compatible_digits:lam2")


@pytest.mark.parametrize(
    ("error", "field"),
    [
        ("model.weights: expected four", "model.weights=(1.0, 1.0)"),
        ("model.weights: expected a finite number at least 0", "model.weights=(1.0, 1.0, 1.0, -1.0)"),
        ("model.lam: expected a finite number at least 0", "model.lam=-1.0"),
        ("model.kappa: expected a number above 0", "model.kappa=0.0"),
        ("model.temperature: expected a number above 0", "model.temperature=-0.1"),
    ],
)
def test_fields_that_can_not_serve_are_refused_before_data_are_read(error, field):
    config = train.override(train.load_config("represent/compatible_digits"), [field])
    with pytest.raises(ValueError, match=error):
        module.build(config)


@pytest.mark.slow
def test_a_threshold_of_one_fits_the_old_space_better_than_a_rotation_and_keeps_the_new_one(tmp_path):
    found = {}
    with jax.numpy_dtype_promotion("standard"):
        for variant in ("lam0", "lam1", "unconstrained"):
            config = train.load_config(f"represent/compatible_digits:{variant}")
            found[variant] = train.run(config, tmp_path / variant, progress=False).metrics
    assert abs(found["lam1"]["residual"] - 1) < 0.15
    assert found["lam1"]["retrieval/kept_minus_new"] > -0.03
    assert found["unconstrained"]["retrieval/kept_minus_new"] < found["lam1"]["retrieval/kept_minus_new"]
    assert found["lam1"]["retrieval/cross_cmc1"] > found["lam0"]["retrieval/cross_cmc1"]
