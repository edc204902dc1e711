"""The balanced accuracy of a fresh linear probe."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score

from subspace_jax import metrics


def mixture(seed, shift, count=400):
    rng = np.random.default_rng(seed)
    y = rng.random(count) < 0.2
    return rng.standard_normal((count, 5)) * [1, 10, 0.1, 1, 1] + shift * np.outer(y, [1, 10, 0, 0, 0]), y


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shift", [0.7, 30.0])  # the second one separates the kinds
def test_balanced_probe_accuracy_is_that_of_scikit_learns_logistic_regression(shift, weighted):
    (x, y), (test_x, test_y) = mixture(0, shift), mixture(1, shift)
    mean, std = x.mean(axis=0), x.std(axis=0)
    # Ours is a mean over examples plus 1e-3 / 2 squares, scikit-learn's C times a sum plus half the squares.
    options = {"C": 1 / (400 * 1e-3), "class_weight": "balanced" if weighted else None}
    peer = LogisticRegression(**options).fit((x - mean) / std, y)
    wanted = balanced_accuracy_score(test_y, peer.predict((test_x - mean) / std))
    got = metrics.balanced_probe_accuracy(x, y, test_x, test_y, weighted=weighted)
    np.testing.assert_allclose(got, wanted, atol=0.01)  # of 400 examples one or two may lie between the two planes
    assert (got == 1) == (shift == 30)


def test_balanced_probe_accuracy_of_labels_that_nothing_tells_is_that_of_chance():
    (x, y), (test_x, test_y) = mixture(0, 0.0, 2000), mixture(1, 0.0, 2000)
    assert abs(metrics.balanced_probe_accuracy(x, y, test_x, test_y) - 0.5) < 0.05


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (x, y[1:]), "train_x, train_y: expected"),
        (lambda x, y: (x * np.nan, y), "train_x: expected finite features"),
        (lambda x, y: (x, y | True), "train_y: expected both kinds"),
    ],
)
def test_balanced_probe_accuracy_refuses_what_can_t_serve(change, message):
    with pytest.raises(ValueError, match=message):
        metrics.balanced_probe_accuracy(*change(*mixture(0, 1.0)), *mixture(1, 1.0))
