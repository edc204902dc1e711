"""Clusters features by a method over several seeds: labels, scores, and a picture."""

from typing import NamedTuple

import jax
import numpy as np
from tqdm.auto import tqdm

from subspace_jax import linalg, metrics
from subspace_jax.cluster.classical import estimators
from subspace_jax.linalg import SparseRows

METHODS = {
    "kmeans": estimators.KMeans,
    "k-subspaces": estimators.KSubspaces,
    "spectral": estimators.SpectralClustering,
    "tsc": estimators.TSC,
    "lsr": estimators.LSR,
    "lrr": estimators.LRR,
    "ssc": estimators.SSC,
    "ssc-omp": estimators.SSCOMP,
}
_MOST_CLUSTERS = 30
_BINS = 96
_DOTS = 5000


class Clusters(NamedTuple):
    """Clusters of features.

    Attributes:
      labels: ``[n]`` int32, of the first seed.
      k: Number of clusters.
      scores: Of each seed, where there are true labels.
      agreement: Adjusted Rand index of the labels of each further seed with those of the first.
      affinity: Sparse rows ``Z``, which stand for ``Z + Z^T``; None of a method without a graph.
    """

    labels: np.ndarray
    k: int
    scores: tuple[metrics.ClusterScores, ...]
    agreement: tuple[float, ...]
    affinity: SparseRows | None


def cluster_features(
    x: np.ndarray,
    k: int | None,
    method: str = "tsc",
    *,
    seeds: range = range(1),
    labels: np.ndarray | None = None,
    progress: bool = False,
    **options,
) -> Clusters:
    """Clusters rows once for each seed.

    Args:
      x: ``[n, features]``.
      k: Number of clusters; by the widest gap of the eigenvalues, up to 30, where it is None.
      method: One of :data:`METHODS`.
      seeds: Seeds.
      labels: True labels ``[n]``, for scores.
      progress: Whether to show a progress bar over the seeds, in a terminal.
      **options: Arguments of the method's estimator.

    Returns:
      The clusters.

    Raises:
      ValueError: ``method`` is unknown, ``k`` is out of range or not given for a method without a graph, or ``x`` is
        not finite.
    """
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    if k is None:
        k = _chosen(x, method, options)
    estimator = METHODS[method](k, **options)
    bar = tqdm(seeds, desc=f"{method}: {k} clusters", unit="seed", disable=None if progress else True)
    found = [estimator.set_params(random_state=seed).fit_predict(x) for seed in bar]
    return Clusters(
        found[0],
        k,
        () if labels is None else tuple(metrics.cluster_scores(labels, one) for one in found),
        tuple(metrics.adjusted_rand_index(found[0], one) for one in found[1:]),
        getattr(estimator, "affinity_", None),
    )


def _chosen(x, method, options):
    """The number of clusters before the widest gap of the eigenvalues of the graph."""
    if method in ("kmeans", "k-subspaces"):
        raise ValueError(f"k: expected a number of clusters, for {method} has no graph that tells one")
    most = min(_MOST_CLUSTERS, len(x) - 1)
    graph = METHODS[method](1, n_init=1, random_state=0, **options).fit(x).affinity_
    return linalg.eigengap(1 - np.asarray(linalg.spectral_embedding(graph, most).eigenvalues))


def write_picture(found: Clusters, x: np.ndarray, path: str) -> None:
    """Draws the examples in two directions, coloured by cluster, and the affinity with clusters in blocks.

    The directions are eigenvectors of the graph; of a method without one, the principal components of the features.

    Args:
      found: What :func:`cluster_features` returns.
      x: The features.
      path: PNG file.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 if found.affinity is None else 10, 4.6), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, 1 if found.affinity is None else 2))
    if found.affinity is None:
        points, name = _principal(x), "principal component"
    else:
        count = max(3, min(found.k, 8))
        points = _principal(np.asarray(linalg.spectral_embedding(found.affinity, min(count, len(x))).vectors))
        name = "direction of the spectral embedding"
    some = np.random.default_rng(0).permutation(len(x))[:_DOTS]
    axes[0].scatter(*points[some].T, c=found.labels[some], cmap="tab20", s=4)
    axes[0].set(xlabel=f"first {name}", ylabel="second", title=f"{len(x)} examples, {found.k} clusters")
    if found.affinity is not None:
        axes[1].imshow(np.sqrt(_blocks(found)), cmap="magma", interpolation="nearest")
        axes[1].set(xticks=[], yticks=[], title="root of the affinity, examples by cluster")
    figure.savefig(path, dpi=120)


def _principal(x):
    u, s, _ = np.linalg.svd(x - x.mean(0), full_matrices=False)
    return np.pad(u[:, :2] * s[:2], ((0, 0), (0, max(0, 2 - u.shape[1]))))


def _blocks(found):
    """Means of the affinity over bins of examples in the order of their clusters."""
    n = len(found.labels)
    bins = min(n, _BINS)
    place = np.empty(n, int)
    place[np.argsort(found.labels, kind="stable")] = np.arange(n) * bins // n
    idx, val = jax.device_get(found.affinity)
    sums = np.zeros((bins, bins))
    np.add.at(sums, (place[:, None], place[idx]), val)
    sizes = np.bincount(place, minlength=bins)
    return (sums + sums.T) / np.outer(sizes, sizes)
