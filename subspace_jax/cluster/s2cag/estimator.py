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
      objective: ``"conductance"`` (S2CAG) or ``"modularity"`` (M-S2CAG).
      n_steps: Order ``T`` of the smoothing.
      alpha: Ratio of the weights of successive orders.
      gamma: Resolution of the modularity.
      n_iter: Power iterations ``tau``; None for 7, and 50 of the modularity.
      rounding: ``"snem-cpqr"``, ``"snem"`` or ``"kmeans"``.
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
        objective: str = "conductance",
        n_steps: int = 10,
        alpha: float = 0.9,
        gamma: float = 1.0,
        n_iter: int | None = None,
        rounding: str = "snem-cpqr",
        counts: bool = True,
        random_state: "int | np.random.RandomState | None" = None,
    ):
        self.n_clusters = n_clusters
        self.objective = objective
        self.n_steps = n_steps
        self.alpha = alpha
        self.gamma = gamma
        self.n_iter = n_iter
        self.rounding = rounding
        self.counts = counts
        self.random_state = random_state

    def fit(self, adjacency, features):
        """Clusters the nodes of a graph, with attributes ``[n, d]``; see :func:`s2cag` for what they may be."""
        methods = {"conductance": s2cag, "modularity": m_s2cag}
        if self.objective not in methods:
            raise ValueError(f"objective: expected 'conductance' or 'modularity', got {self.objective!r}")
        key = jax.random.key(check_random_state(self.random_state).randint(2**31 - 1))
        names = {"T": "n_steps", "alpha": "alpha", "gamma": "gamma", "tau": "n_iter"}
        options = {name: getattr(self, own) for name, own in names.items()}
        found = methods[self.objective](
            key, adjacency, features, self.n_clusters, rounding=self.rounding, counts=self.counts, **options
        )
        self.embedding_, self.labels_, self.path_ = np.asarray(found.embedding), np.asarray(found.labels), found.path
        return self

    def fit_predict(self, adjacency, features):
        """Clusters the nodes, and returns ``labels_``."""
        return self.fit(adjacency, features).labels_
