import jax
import numpy as np
import pytest
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.svm import LinearSVC

from subspace_jax import represent, train
from subspace_jax.represent.linear_probe import hold_out


@pytest.fixture(scope="module")
def iris():
    features, labels = load_iris(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    return features[order].astype(np.float32), labels[order].astype(np.int32)


@pytest.fixture(scope="module")
def one():
    return train.make_mesh(devices=jax.devices()[:1])


def scaled(x):
    x = x - x.mean(axis=0)
    return x / np.sqrt(np.mean(x**2))


def test_linear_probe_gives_the_logistic_regression_of_scikit_learn(iris):
    x, y = iris
    peer = LogisticRegression(C=1 / (1e-2 * len(y)), tol=1e-8, max_iter=5000).fit(scaled(x).astype(np.float64), y)
    probe = represent.linear_probe(x, y, grid=(1e-2,), tolerance=1e-6)
    # At a gradient of 1e-6 and a curvature of 1e-2, that of the penalty, the error is up to 1e-4.  The bias of
    # scikit-learn sums to zero.
    ours = represent.probe_logits(probe, x)
    theirs = peer.decision_function(scaled(x))
    centered = [logits - logits.mean(1, keepdims=True) for logits in (ours, theirs)]
    np.testing.assert_allclose(*centered, atol=2e-3)


def test_linear_probe_gives_the_linear_svm_of_scikit_learn(iris, one):
    x, y = iris
    # A large scale makes scikit-learn's penalty on the bias negligible.
    peer = LinearSVC(C=1 / (1e-2 * len(y)), tol=1e-8, max_iter=200_000, intercept_scaling=100.0)
    peer.fit(scaled(x).astype(np.float64), y)
    probe = represent.linear_probe(x, y, loss="hinge", grid=(1e-2,), tolerance=1e-6, mesh=one)
    np.testing.assert_allclose(represent.probe_logits(probe, x), peer.decision_function(scaled(x)), atol=5e-3)


@pytest.mark.eight_devices
def test_sharded_linear_probe_equals_that_on_one_device(iris, one):
    x, y = iris  # 150 examples: the last device has padding
    single, sharded = (represent.linear_probe(x, y, grid=(1e-2,), tolerance=1e-6, mesh=m) for m in (one, None))
    # Sums differ in order over some dozens of steps; both end within the tolerance of the optimum.
    np.testing.assert_allclose(single.kernel, sharded.kernel, atol=2e-3)


@pytest.mark.slow
def test_linear_probe_takes_the_penalty_that_is_best_on_held_out_examples_at_any_scale(iris, one):
    x, y = iris
    grid = (1e-4, 1e-2, 100.0)
    probe = represent.linear_probe(x, y, grid=grid, tolerance=1e-6, mesh=one)
    assert set(probe.validation) == set(grid)
    assert probe.validation[probe.l2] == max(probe.validation.values())
    assert probe.l2 < 100.0
    predicted = np.argmax(represent.probe_logits(probe, x), axis=1)
    scores = represent.scores_of(predicted, y)
    assert scores.accuracy > 0.95
    assert scores.class_accuracy == pytest.approx(scores.accuracy)  # as many of each class
    again = represent.linear_probe(1000 * x + 7, y, grid=grid, tolerance=1e-6, mesh=one)
    assert again.l2 == probe.l2
    same = np.argmax(represent.probe_logits(again, 1000 * x + 7), axis=1) == predicted
    assert same.mean() > 0.99


def test_hold_out_draws_from_each_class_and_keeps_single_examples():
    labels = np.array([0] * 10 + [1] * 4 + [2])
    aside = hold_out(labels, 0.2, 0)
    assert [int(aside[labels == c].sum()) for c in range(3)] == [2, 1, 0]


@pytest.mark.parametrize("k", [1, 5])
def test_nearest_classes_are_those_of_scikit_learn(iris, k):
    x, y = iris
    peer = KNeighborsClassifier(k, metric="cosine").fit(x[:100], y[:100])
    found = represent.nearest_classes(x[:100], y[:100], x[100:], k=k, temperature=None)
    # Some cosines are equal, and ties are broken in another order.
    assert np.mean(found == peer.predict(x[100:])) >= 0.98


def test_nearest_classes_weights_votes_by_cosine():
    x = np.array([[1.0, 0.0], [0.6, 0.8], [0.6, 0.8], [0.0, 1.0]])
    y = np.array([0, 1, 1, 1])
    query = np.array([[1.0, 0.05]])
    assert represent.nearest_classes(x, y, query, k=3).tolist() == [0]
    assert represent.nearest_classes(x, y, query, k=3, temperature=None).tolist() == [1]


@pytest.mark.slow
def test_few_shot_gives_mean_and_interval_and_more_shots_are_more_accurate(iris, one):
    flowers = represent.Features(*iris, ("setosa", "versicolor", "virginica"))
    few, more = (represent.few_shot(flowers, flowers, shots=n, seeds=4, l2=1e-3, mesh=one) for n in (1, 20))
    assert len(few.accuracies) == 4
    assert few.mean == pytest.approx(np.mean(few.accuracies))
    # 3.182 is Student's t of 3 degrees of freedom at 97.5 %.
    assert few.interval == pytest.approx(3.182446 * np.std(few.accuracies, ddof=1) / 2)
    assert more.mean > max(few.mean, 0.9)
    with pytest.raises(ValueError, match=r"got 51; class to count: \{0: 50"):
        represent.few_shot(flowers, flowers, shots=51)


def test_linear_probe_and_nearest_classes_refuse_invalid_input_by_name(iris):
    x, y = iris
    for message, arguments in {
        r"expected \[examples, n\]": (x, y[:-1]),
        "finite": (x * np.nan, y),
        "labels: expected integers in 0 to 2": (x, y - 1),
    }.items():
        with pytest.raises(ValueError, match=message):
            represent.linear_probe(*arguments, num_classes=3)
    for message, options in {
        "loss": {"loss": "squared"},
        "grid": {"grid": ()},
        "held_out": {"held_out": 1.0},
    }.items():
        with pytest.raises(ValueError, match=f"^{message}: expected"):
            represent.linear_probe(x, y, **options)
    with pytest.raises(ValueError, match="k: expected 1 to 150"):
        represent.nearest_classes(x, y, x, k=151)
