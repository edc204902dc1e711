"""Scores of streams of tasks: golden values, definitions, bad input."""

import numpy as np
import pytest

from subspace_jax import metrics

ACC = np.array([[0.9, 0.2, 0.1], [0.7, 0.8, 0.3], [0.8, 0.5, 0.6]])


def test_mtil_metrics_gives_the_golden_values(golden):
    vectors = golden("igsp/mtil_metrics")
    found = metrics.mtil_metrics(vectors.pop("acc"))
    assert set(found) == set(vectors)
    for name, expected in vectors.items():
        np.testing.assert_allclose(found[name], expected, rtol=1e-10)


def test_a_constant_matrix_gives_the_constant_and_no_forgetting():
    found = metrics.mtil_metrics(np.full((4, 4), 0.7))
    for name in ("transfer", "avg", "last"):
        assert found[name] == pytest.approx(0.7)
    assert found["forgetting"] == 0


def test_what_comes_before_training_counts_for_transfer_and_avg_alone():
    changed = ACC + np.triu(np.full((3, 3), 0.05), 1)
    before, after = metrics.mtil_metrics(ACC), metrics.mtil_metrics(changed)
    assert after["transfer"] > before["transfer"]
    assert after["avg"] > before["avg"]
    assert (after["last"], after["forgetting"]) == (before["last"], before["forgetting"])


def test_scores_are_their_definitions():
    assert metrics.final_accuracy(ACC) == pytest.approx((0.8 + 0.5 + 0.6) / 3)
    assert metrics.average_accuracy(ACC) == pytest.approx((0.9 + (0.7 + 0.8) / 2 + (0.8 + 0.5 + 0.6) / 3) / 3)
    assert metrics.forgetting(ACC) == pytest.approx((0.1 + 0.3) / 2)
    assert metrics.backward_transfer(ACC) == pytest.approx((-0.1 - 0.3) / 2)
    assert metrics.forward_transfer(ACC, np.full(3, 0.1)) == pytest.approx((0.1 + 0.2) / 2)


def test_one_task_has_neither_forgetting_nor_transfer():
    one = np.array([[0.5]])
    assert (metrics.forgetting(one), metrics.backward_transfer(one), metrics.forward_transfer(one, [0.1])) == (0, 0, 0)
    assert np.isnan(metrics.mtil_metrics(one)["transfer"])


@pytest.mark.parametrize("bad", [np.ones((2, 3)), np.ones(4), np.zeros((0, 0)), np.array([[1.0, np.nan], [0, 1]])])
def test_scores_of_what_is_no_square_matrix_of_numbers_are_refused(bad):
    for score in (metrics.final_accuracy, metrics.average_accuracy, metrics.forgetting, metrics.mtil_metrics):
        with pytest.raises(ValueError, match="acc: expected"):
            score(bad)


def test_forward_transfer_refuses_a_baseline_of_other_tasks():
    with pytest.raises(ValueError, match="baseline: expected finite"):
        metrics.forward_transfer(ACC, [0.1, 0.1])
