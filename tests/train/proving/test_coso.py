"""A stream of three tasks, a phase each: the end of a task in ``enter``, and an accuracy matrix in the summary."""

import chex
import jax
import numpy as np
import pytest

from subspace_jax import train
from subspace_jax.train import loop

from . import coso
from .runs import assert_resumes, assert_survives_kill, fit


@pytest.fixture(scope="module")
def run():
    return coso.build(epochs=5)


@pytest.fixture(scope="module")
def traced():
    """An entry for each time that the loss of the uninterrupted run is traced."""
    return []


@pytest.fixture(scope="module")
def whole(run, traced, tmp_path_factory):
    loss = coso.StreamTask.loss
    with jax.numpy_dtype_promotion("standard"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(coso.StreamTask, "loss", lambda self, *a, **k: traced.append(1) or loss(self, *a, **k))
        patch.setattr(loop, "plot_curves", lambda *arguments: None)
        return fit(run, tmp_path_factory.mktemp("whole"), checkpoint_every=90)


@pytest.mark.slow
def test_coso_keeps_earlier_tasks_and_learns_later_ones(whole):
    assert whole.summary["forgetting"] <= 0.02
    assert whole.summary["final"] >= 0.8
    matrix = coso.accuracy_matrix(whole.rows)
    assert np.all(np.diag(matrix) > 0.8)
    assert whole.summary["average"] == pytest.approx(np.mean([matrix[i, : i + 1].mean() for i in range(3)]))


@pytest.mark.slow
def test_coso_keeps_earlier_tasks_where_adam_in_free_subspaces_forgets_them(run, whole, tmp_path):
    forgetful = fit(coso.without_history(run), tmp_path)
    assert whole.summary["forgetting"] <= 0.02 < 0.08 < forgetful.summary["forgetting"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_coso_reaches_the_accuracy_of_the_reference(seed, tmp_path):
    result = fit(coso.build(epochs=15, seed=seed), tmp_path)
    assert result.summary["final"] >= 0.91
    assert result.summary["forgetting"] <= 0.02


@pytest.mark.slow
def test_coso_adds_directions_to_the_history_at_the_end_of_each_task_but_the_last(whole):
    state = whole.state.opt_state.inner_states["kernels"].inner_state
    assert state.count == 90  # the counter starts anew in every task
    for name in ("kernel0", "kernel1"):
        history, dim = state.history["kernels"][name], int(state.history_dim["kernels"][name])
        assert 2 <= dim < history.shape[1]
        chex.assert_trees_all_close(history[:, :dim].T @ history[:, :dim], np.eye(dim, dtype=np.float32), atol=1e-5)


@pytest.mark.slow
def test_coso_compiles_one_step_for_all_tasks_of_the_stream(whole, traced):
    assert len(traced) == 1


@pytest.mark.slow
@pytest.mark.parametrize("steps", [(130,), (31, 90, 91, 200)])
def test_coso_interrupted_in_a_task_ends_with_the_same_bits(run, whole, steps, tmp_path):
    assert_resumes(run, tmp_path, steps, whole, checkpoint_every=90)


@pytest.mark.slow
@pytest.mark.eight_devices
def test_coso_on_eight_devices_keeps_earlier_tasks_and_resumes(run, tmp_path):
    mesh = train.make_mesh(4, 2)
    sharded = fit(run, tmp_path / "whole", mesh=mesh, checkpoint_every=90)
    assert sharded.summary["forgetting"] <= 0.02
    assert sharded.summary["final"] >= 0.8
    assert_resumes(run, tmp_path, (130,), sharded, mesh=mesh, checkpoint_every=90)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 8])
def test_coso_killed_in_the_second_task_ends_with_the_same_bits(devices, tmp_path):
    assert_survives_kill("coso", tmp_path, devices, 130)
