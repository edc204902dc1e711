"""Clusters features by a method over several seeds: labels, scores, and pictures."""

import csv
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from tqdm.auto import tqdm

from subspace_jax import data, linalg, metrics
from subspace_jax.cluster.classical import estimators, graph_estimators
from subspace_jax.linalg import SparseRows

METHODS = {
    "kmeans": estimators.KMeans,
    "k-subspaces": estimators.KSubspaces,
    "spectral": graph_estimators.SpectralClustering,
    "tsc": graph_estimators.TSC,
    "lsr": graph_estimators.LSR,
    "lrr": graph_estimators.LRR,
    "lrr-l21": graph_estimators.RobustLRR,
    "ssc": graph_estimators.SSC,
    "ssc-omp": graph_estimators.SSCOMP,
}
_MOST_CLUSTERS = 30
_BINS = 96
_DOTS = 5000
_MOST_IN_LEGEND = 10
_IN_A_ROW, _SIDE = 12, 64


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
      k: Number of clusters; by the widest gap of the eigenvalues where it is None, at most 30 and the root of n.
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
    on_graph = issubclass(METHODS[method], graph_estimators.OnGraph)
    if k is None and not on_graph:
        raise ValueError(f"k: expected a number of clusters, for {method} has no graph that tells one")
    estimator = METHODS[method](1 if k is None else k, random_state=seeds[0], **options)
    if on_graph:  # which is the same for all seeds
        estimator.fit_graph(x)
        k = _by_eigengap(estimator.affinity_, len(x)) if k is None else k
    found = []
    for seed in tqdm(seeds, desc=f"{method}: {k} clusters", unit="seed", disable=None if progress else True):
        estimator.set_params(n_clusters=k, random_state=seed)
        found.append((estimator.cluster_graph() if on_graph else estimator.fit(x)).labels_)
    return Clusters(
        found[0],
        k,
        () if labels is None else tuple(metrics.cluster_scores(labels, one) for one in found),
        tuple(metrics.adjusted_rand_index(found[0], one) for one in found[1:]),
        getattr(estimator, "affinity_", None),
    )


def _by_eigengap(graph: SparseRows, n: int) -> int:
    """The number of clusters before the widest gap of the eigenvalues of a graph.

    Candidates end at the root of n, as for other criteria of the number of clusters (Bezdek and Pal 1998): farther out
    the eigenvalues are those of the noise within clusters, and of few examples their gaps may be the widest.
    """
    most = max(1, min(_MOST_CLUSTERS, math.isqrt(n), n - 1))
    return linalg.eigengap(1 - np.asarray(linalg.spectral_embedding(graph, most + 1).eigenvalues))


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
    dots = axes[0].scatter(*points[some].T, c=found.labels[some], cmap="tab20", s=4)
    title = f"{len(x)} examples, {found.k} cluster{'s' * (found.k > 1)}"
    axes[0].set(xlabel=f"first {name}", ylabel="second", title=title)
    if found.k <= _MOST_IN_LEGEND:
        axes[0].legend(*dots.legend_elements(num=None), title="cluster", fontsize="small")
    if found.affinity is not None:
        axes[1].imshow(np.sqrt(_blocks(found)), cmap="magma", interpolation="nearest")
        axes[1].set(xticks=[], yticks=[], title="root of the affinity, examples by cluster")
    figure.savefig(path, dpi=120)


def write_names(found: Clusters, names: Sequence[str], path: pathlib.Path) -> None:
    """Writes a CSV file with the name and the cluster of each example."""
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("image", "cluster"))
        table.writerows(zip(names, found.labels.tolist(), strict=True))


def write_images(found: Clusters, image: Callable[[int], np.ndarray], path: str) -> None:
    """Draws a row of images of each cluster, of the largest 30 clusters.

    Args:
      found: What :func:`cluster_features` returns.
      image: Returns the image of an example, uint8 ``[height, width, 3]``.
      path: PNG file.
    """
    from matplotlib.figure import Figure

    sizes = np.bincount(found.labels, minlength=found.k)
    shown = np.argsort(-sizes, kind="stable")[:_MOST_CLUSTERS]
    figure = Figure(figsize=(_IN_A_ROW * 0.7 + 1, len(shown) * 0.75 + 0.3), layout="constrained")
    figure.get_layout_engine().set(rect=(0.09, 0, 0.91, 1))  # names of rows are no part of the layout
    for axis, cluster in zip(np.atleast_1d(figure.subplots(len(shown), 1)), shown, strict=True):
        own = np.flatnonzero(found.labels == cluster)
        own = own[np.linspace(0, len(own) - 1, min(len(own), _IN_A_ROW)).astype(int)]
        strip = np.full((_SIDE, _IN_A_ROW * (_SIDE + 4), 3), 255, np.uint8)
        for i, at in enumerate(own):
            strip[:, i * (_SIDE + 4) :][:, :_SIDE] = data.resize(image(int(at)), (_SIDE, _SIDE), "bilinear")
        axis.imshow(strip)
        axis.set(xticks=[], yticks=[])
        axis.set_ylabel(
            f"cluster {cluster}\n{sizes[cluster]} of {len(found.labels)}", rotation=0, ha="right", va="center"
        )
        axis.spines[:].set_visible(False)
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
