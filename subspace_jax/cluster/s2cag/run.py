"""Clusters the nodes of a graph over several seeds: labels, scores, cuts, and a picture."""

from typing import NamedTuple

import jax
import numpy as np
from tqdm.auto import tqdm

from subspace_jax import data, linalg, metrics
from subspace_jax.cluster.s2cag.core import Options, m_s2cag, prepared, s2cag, smoothed_attributes

METHODS = {"s2cag": s2cag, "m-s2cag": m_s2cag}
_MOST_CLUSTERS = 30
_BINS = 96
_DOTS = 5000
_MOST_IN_LEGEND = 10


class GraphClusters(NamedTuple):
    """Clusters of the nodes of a graph.

    Attributes:
      labels: ``[n]`` int32, of the first seed.
      k: Number of clusters.
      scores: Of each seed, where there are true labels.
      agreement: Adjusted Rand index of the labels of each further seed with those of the first.
      cuts: ``{"conductance", "modularity"}`` of the graph without attributes, a list over the seeds.
      embedding: ``[n, k]``, of the first seed.
      path: ``"explicit"`` or ``"implicit"``.
    """

    labels: np.ndarray
    k: int
    scores: tuple[metrics.ClusterScores, ...]
    agreement: tuple[float, ...]
    cuts: dict[str, list[float]]
    embedding: np.ndarray
    path: str


def cluster_graph(
    graph: data.Graph,
    k: int | None,
    method: str = "s2cag",
    *,
    seeds: range = range(1),
    labels: np.ndarray | None = None,
    progress: bool = False,
    **options,
) -> GraphClusters:
    """Clusters nodes once for each seed.

    Args:
      graph: Adjacency and attributes.
      k: Number of clusters; where it is None, by the widest gap of the eigenvalues of the normalized affinity
        ``Z Z^T`` after the first one, up to 30.
      method: ``"s2cag"`` or ``"m-s2cag"``.
      seeds: Seeds.
      labels: True labels ``[n]``, for scores.
      progress: Whether to show a progress bar over the seeds, in a terminal.
      **options: See :class:`Options`.

    Returns:
      The clusters.

    Raises:
      ValueError: ``method`` is unknown, or ``k`` is None for fewer than four nodes or attributes; see also
        :func:`s2cag`.
    """
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    x = graph.attributes.toarray() if hasattr(graph.attributes, "toarray") else graph.attributes
    x = np.asarray(x, np.float32)
    p = prepared(graph.adjacency, x, 1, Options(**options), 7)[0]
    if k is None:
        k = _chosen(p, x, Options(**options))
    bar = tqdm(seeds, desc=f"{method}: {k} clusters", unit="seed", disable=None if progress else True)
    found = [jax.device_get(METHODS[method](jax.random.key(seed), p, x, k, **options)) for seed in bar]
    each = [one.labels for one in found]
    return GraphClusters(
        each[0],
        k,
        () if labels is None else tuple(metrics.cluster_scores(labels, one) for one in each),
        tuple(metrics.adjusted_rand_index(each[0], one) for one in each[1:]),
        {
            "conductance": [metrics.graph_conductance(graph.adjacency, one) for one in each],
            "modularity": [metrics.graph_modularity(graph.adjacency, one) for one in each],
        },
        found[0].embedding,
        found[0].path,
    )


def _chosen(p, x, options):
    """The number of clusters before the widest gap of the eigenvalues of ``D^-1/2 Z Z^T D^-1/2``, at least 2.

    The gap behind the first eigenvalue, 1 for every graph, only grows with the smoothing.
    """
    most = min(_MOST_CLUSTERS, min(x.shape) - 1)
    if most < 3:
        raise ValueError(f"k: expected a number of clusters: {x.shape[0]} nodes with {x.shape[1]} attributes tell none")
    p, f, options = prepared(p, x, most, options, 7)
    z = smoothed_attributes(p, f, options)
    found = linalg.spectral_embedding(lambda v: z.apply(z.apply_T(v)), most, n=p.rows)
    return 1 + linalg.eigengap(1 - np.asarray(found.eigenvalues)[1:])


def write_picture(found: GraphClusters, graph: data.Graph, path: str) -> None:
    """Draws the nodes in two directions of the embedding, coloured by cluster, and the edges with clusters in blocks.

    Args:
      found: What :func:`cluster_graph` returns.
      graph: The graph.
      path: PNG file.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.6), layout="constrained")
    axes = figure.subplots(1, 2)
    u, s, _ = np.linalg.svd(found.embedding - found.embedding.mean(0), full_matrices=False)
    points = np.pad(u[:, :2] * s[:2], ((0, 0), (0, max(0, 2 - u.shape[1]))))
    some = np.random.default_rng(0).permutation(len(points))[:_DOTS]
    dots = axes[0].scatter(*points[some].T, c=found.labels[some], cmap="tab20", s=4)
    axes[0].set(xlabel="first direction of the embedding", ylabel="second")
    axes[0].set_title(f"{len(points)} nodes, {found.k} cluster{'s' * (found.k > 1)}")
    if found.k <= _MOST_IN_LEGEND:
        axes[0].legend(*dots.legend_elements(num=None), title="cluster", fontsize="small")
    axes[1].imshow(np.sqrt(_blocks(found.labels, graph.adjacency)), cmap="magma", interpolation="nearest")
    axes[1].set(xticks=[], yticks=[], title="root of the density of edges, nodes by cluster")
    figure.savefig(path, dpi=120)


def _blocks(labels, adjacency):
    """Means of the adjacency over bins of nodes in the order of their clusters."""
    n = len(labels)
    bins = min(n, _BINS)
    bin_of = np.empty(n, int)
    bin_of[np.argsort(labels, kind="stable")] = np.arange(n) * bins // n
    edges = adjacency.tocoo()
    source, target = (bin_of[nodes] for nodes in edges.coords)
    sums = np.bincount(source * bins + target, edges.data, minlength=bins * bins).reshape(bins, bins)
    sizes = np.bincount(bin_of, minlength=bins)
    return sums / np.outer(sizes, sizes)
