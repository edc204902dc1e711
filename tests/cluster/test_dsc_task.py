"""The three phases of deep subspace clustering, and clustering of one's own images."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from subspace_jax import metrics, train
from subspace_jax.cluster import dsc
from subspace_jax.cluster.dsc import task as dsc_task
from tests.cluster.test_dsc import close, encoder

N, M = 6, 8


def options(rows, **more):
    return dsc.ExpressionOptions(N, rows, 2, 2, **more)


@jax.jit
def losses(params, batch):
    """The loss and gradient of every phase, for as many rows as the batch has."""
    m = batch["mask"].shape[0]
    coef = jnp.zeros((m, m)).at[:N, :N].set(params["coef"])
    labels = jnp.pad(jnp.arange(N) % 2, (0, m - N), constant_values=-1)
    variables = {"labels": labels, "repeats": jnp.zeros((), jnp.int32)}
    full = {**params, "coef": coef}
    phases = {
        "reconstruction": (encoder(), params["autoencoder"], {}),
        "distances": (encoder(pretrain="distances"), params["autoencoder"], {}),
        "expression": (dsc.SelfExpression(encoder(), options(m, zero_diag=True, l2_coef=0.1)), full, {}),
        "structured": (dsc.Structured(encoder(), options(m)), full, variables),
    }

    def of(task, params, variables):
        return jax.value_and_grad(lambda p: task.loss(p, variables, batch, key=None, step=None)[0])(params)

    return {name: of(*parts) for name, parts in phases.items()}


def test_losses_and_gradients_of_all_phases_leave_out_the_padding():
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((N, 4, 4, 1)).astype(np.float32)
    params = {"autoencoder": encoder().init(jax.random.key(0))[0]}
    # Biases, without which padding of zeros would give layers of zeros.
    params["autoencoder"] = jax.tree.map(lambda x: x + 0.1, params["autoencoder"])
    params["coef"] = jnp.asarray(0.1 * rng.standard_normal((N, N)).astype(np.float32))
    whole = losses(params, {"inputs": inputs, "mask": np.ones(N, np.float32)})
    pad = [(0, M - N)]
    padded = losses(params, {"inputs": np.pad(inputs, pad + [(0, 0)] * 3), "mask": np.pad(np.ones(N, np.float32), pad)})
    for name, (loss, grads) in whole.items():
        close(padded[name][0], loss, rtol=1e-5)
        got = padded[name][1]
        if "coef" in got:
            assert not np.any(got["coef"][N:])
            assert not np.any(got["coef"][:, N:])
            got = {**got, "coef": got["coef"][:N, :N]}
        # Sums in another order: of gradients that cancel, within some roundings of the largest.
        jax.tree.map(lambda a, b: close(a, b, rtol=1e-4, atol=1e-6 * max(1.0, np.max(np.abs(b)))), got, grads)
    diagonal = np.diag(whole["expression"][1]["coef"])
    close(diagonal, 0.2 * np.diag(params["coef"]), rtol=1e-5)  # of the penalty alone


def test_structured_refresh_counts_how_often_labels_stay_the_same():
    task = dsc.Structured(encoder(), options(M))
    _params, variables = jax.eval_shape(task.init, jax.random.key(0))
    labels = iter([[0, 1, 0, 1, 0, 1, -1, -1]] * 3 + [[0, 0, 0, 1, 1, 1, -1, -1]])
    at = train.At((), jax.random.key(0), None, lambda fn, *arrays: np.asarray(next(labels), np.int32))
    zero = jnp.zeros((), jnp.int32)
    variables = {"labels": jnp.full(M, -1, jnp.int32), "repeats": zero}
    state, repeats = train.TrainState(zero, zero, {"coef": zero}, variables, (), zero, zero), []
    for _ in range(4):
        state = task.refresh(state, at)
        repeats.append(int(state.variables["repeats"]))
    assert repeats == [0, 1, 2, 0]


def test_expression_enter_starts_from_given_coefficients_without_those_of_padding():
    start = np.arange(N * N, dtype=np.float32).reshape(N, N)
    task = dsc.SelfExpression(encoder(), options(M, start=lambda: start))
    state = train.TrainState(0, 0, {"any": 1}, {}, (), None, 0)
    params, _, _ = task.enter(state, None)
    close(params["coef"][:N, :N], start)
    assert not np.any(params["coef"][N:])
    assert not np.any(params["coef"][:, N:])
    assert params["autoencoder"] == {"any": 1}


def test_outline_has_the_shapes_of_the_run():
    config = train.override(dsc.default_config(), ["data.num_examples=30", "clusters.keep=3"])
    built, planned = dsc_task.build(config), dsc_task.outline(config)
    for phase, other in zip(built.phases, planned.phases, strict=True):
        assert phase.data.batch == other.data.batch
        assert phase.data.batch["inputs"].shape == (32, 8, 8, 1)
        shapes = [jax.eval_shape(p.task.init, jax.random.key(0)) for p in (phase, other)]
        assert jax.tree.all(jax.tree.map(lambda a, b: a == b, *shapes))


def test_stop_of_the_structured_phase_is_a_settled_loss_or_repeated_labels():
    stop = dsc_task.build(train.override(dsc.default_config(), ["data.num_examples=30"])).phases[2].stop
    falling = [{"split": "train", "loss": 2.0**-i, "repeats": 0.0} for i in range(8)]
    assert not stop(falling)
    assert stop([*falling, {"split": "train", "loss": 1e-9, "repeats": 5.0}])
    assert stop([{"split": "train", "loss": 1.0, "repeats": 0.0}] * 6)


def small(**changes):
    config = dsc.default_config()
    config.model.channels = (4,)
    config.phases.update({"pretrain_steps": 20, "expression_steps": 150, "structured_steps": 10})
    return train.override(config, [f"{name.replace('__', '.')}={value}" for name, value in changes.items()])


@pytest.mark.slow
@jax.numpy_dtype_promotion("standard")
def test_fit_finds_noiseless_orthogonal_subspaces_and_predicts_new_points():
    found, new = dsc.subspace_images(3, 30), dsc.subspace_images(3, 50)
    result = dsc.fit(3 * found.inputs, 3, 9, small())
    assert metrics.clustering_accuracy(found.labels, result.labels) == 1.0
    assert result.coef.shape == result.affinity.shape == (90, 90)
    close(result.affinity, result.affinity.T)
    assert set(result.stopped_at) == {"autoencoder", "expression", "structured"}
    # The subspaces of a seed do not depend on the number of points.
    assert metrics.clustering_accuracy(new.labels, dsc.predict(result, new.inputs, keep=9)) > 0.95
    with pytest.raises(ValueError, match="keep: expected 1 to 90"):
        dsc.predict(result, new.inputs, keep=0)
    with pytest.raises(ValueError, match="ridge: expected more than 0"):
        dsc.predict(result, new.inputs, keep=9, ridge=0.0)
    with pytest.raises(ValueError, match="x: expected images of the size"):
        dsc.predict(result, new.inputs[:, :4], keep=9)
    with pytest.raises(ValueError, match="x: expected finite"):
        dsc.predict(result, new.inputs * np.nan, keep=9)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"expression__init": "lsr", "phases__criterion": "coef"},
        {"phases__pretrain": "distances", "phases__pretrain_steps": 5, "phases__relabel_every": 5},
    ],
)
@jax.numpy_dtype_promotion("standard")
def test_fit_by_other_starts_and_criteria_finds_orthogonal_subspaces(changes):
    found = dsc.subspace_images(4, 20)
    result = dsc.fit(found.inputs, 3, 9, small(**changes))
    assert metrics.clustering_accuracy(found.labels, result.labels) == 1.0


@pytest.mark.slow
@jax.numpy_dtype_promotion("standard")
def test_digits_end_self_expression_by_themselves_with_a_loss_that_falls(tmp_path):
    config = train.override(dsc.default_config(), ["data.draw=first"])
    result = train.run(config, tmp_path, progress=False)
    assert result.summary["stopped"] == 1
    assert result.summary["accuracy"] >= max(0.85, result.summary["kmeans_accuracy"] - 0.02)
    assert result.summary["nmi"] >= 0.83
    losses = [row["loss"] for row in result.rows if row["split"] == "train" and row["phase"] == "expression"]
    assert np.all(np.diff(losses[::50]) < 0)
