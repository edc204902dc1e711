"""S2CAG in scikit-learn's manner, with the graph as the first argument of ``fit``."""

import jax
import numpy as np
from sklearn.base import BaseEstimator, ClusterMixin
from sklearn.utils import check_random_state

from subspace_jax.cluster.s2cag.core import m_s2cag, s2cag


class S2CAG(ClusterMixin, BaseEstimator):
    """Clusters of the nodes of an attributed graph; see :func:`s2cag` and :func:`m_s2cag`.

    Clusters are those of the nodes that were given: there is no ``predict``.

    Args:
      n_clusters: Number of clusters.
      resolution: None for S2CAG, which minimizes conductance; a number for M-S2CAG, which maximizes modularity of that
        resolution ``gamma``, 1 as a rule.
      n_steps: Order ``T`` of the smoothing.
      alpha: Ratio of the weights of successive orders.
      n_iter: Power iterations ``tau``; None for 7, and 50 of the modularity.
      counts: Whether attributes are counts, which get tf-idf weights.
      random_state: Seed or ``numpy.random.RandomState``.

    Attributes:
      labels_: ``[n]`` int32.
      embedding_: ``[n, k]``.
      path_: ``"explicit"`` or ``"implicit"``.
    """

    def __init__(
        self,
        n_clusters: int = 8,
        *,
        resolution: float | None = None,
        n_steps: int = 10,
        alpha: float = 0.9,
        n_iter: int | None = None,
        counts: bool = True,
        random_state: "int | np.random.RandomState | None" = None,
    ):
        self.n_clusters = n_clusters
        self.resolution = resolution
        self.n_steps = n_steps
        self.alpha = alpha
        self.n_iter = n_iter
        self.counts = counts
        self.random_state = random_state

    def fit(self, adjacency, features):
        """Clusters the nodes of a graph, with attributes ``[n, d]``; see :func:`s2cag` for what they may be."""
        key = jax.random.key(check_random_state(self.random_state).randint(2**31 - 1))
        options = {"T": self.n_steps, "alpha": self.alpha, "tau": self.n_iter, "counts": self.counts}
        if self.resolution is None:
            found = s2cag(key, adjacency, features, self.n_clusters, **options)
        else:
            found = m_s2cag(key, adjacency, features, self.n_clusters, gamma=self.resolution, **options)
        self.embedding_, self.labels_, self.path_ = np.asarray(found.embedding), np.asarray(found.labels), found.path
        return self

    def fit_predict(self, adjacency, features):
        """Clusters the nodes, and returns ``labels_``."""
        return self.fit(adjacency, features).labels_
