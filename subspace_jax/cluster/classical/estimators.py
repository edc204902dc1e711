"""Clustering without a graph in scikit-learn's manner: ``fit``, ``fit_predict``, ``predict`` and ``labels_``."""

import jax
import numpy as np
from sklearn.utils.validation import check_is_fitted

from subspace_jax import linalg
from subspace_jax.cluster.classical._base import Clustering, RandomState

_kmeans = jax.jit(linalg.kmeans, static_argnames=("k", "restarts"))
_k_subspaces = jax.jit(linalg.k_subspaces, static_argnames=("k", "d", "restarts", "affine"))
_nearest = jax.jit(linalg.nearest_rows, static_argnames=("k",))
_explained = jax.jit(linalg.explained_energy)


class KMeans(Clustering):
    """K-means; see :func:`subspace_jax.linalg.kmeans`.

    Args:
      n_clusters: Number of clusters.
      n_init: Starts by k-means++.
      random_state: Seed or ``numpy.random.RandomState``.

    Attributes:
      labels_: ``[n]`` int32.
      cluster_centers_: ``[k, features]``.
      inertia_: Sum of squared distances to the centers.
    """

    def __init__(self, n_clusters: int = 8, *, n_init: int = 20, random_state: RandomState = None):
        self.n_clusters = n_clusters
        self.n_init = n_init
        self.random_state = random_state

    def fit(self, X, y=None):
        """Clusters rows ``[n, features]``."""
        rows = self._rows(X, reset=True)
        found = _kmeans(self._key(), rows, k=self.n_clusters, restarts=self.n_init)
        self.cluster_centers_, self.labels_ = np.asarray(found.centers), np.asarray(found.assignments)
        self.inertia_ = float(found.inertia)
        return self

    def predict(self, X):
        """Returns the nearest center of each row, ``[m]`` int32."""
        check_is_fitted(self)
        return np.asarray(_nearest(self._rows(X, reset=False), self.cluster_centers_, k=1)[1][:, 0])


class KSubspaces(Clustering):
    """K-subspaces; see :func:`subspace_jax.linalg.k_subspaces`.

    Args:
      n_clusters: Number of subspaces.
      n_components: Their dimension.
      n_init: Random starts.
      affine: Whether the subspaces need not contain the origin.
      random_state: Seed or ``numpy.random.RandomState``.

    Attributes:
      labels_: ``[n]`` int32.
      bases_: ``[k, features, n_components]``, orthonormal.
      means_: ``[k, features]``; 0 of linear subspaces.
      objective_: Mean squared length that the subspaces explain.
    """

    def __init__(
        self,
        n_clusters: int = 8,
        n_components: int = 1,
        *,
        n_init: int = 20,
        affine: bool = False,
        random_state: RandomState = None,
    ):
        self.n_clusters = n_clusters
        self.n_components = n_components
        self.n_init = n_init
        self.affine = affine
        self.random_state = random_state

    def fit(self, X, y=None):
        """Clusters rows ``[n, features]``."""
        rows = self._rows(X, reset=True)
        if self.n_components > rows.shape[1]:
            raise ValueError(f"n_components: expected 1 to {rows.shape[1]}, the features, got {self.n_components}")
        found = _k_subspaces(
            self._key(), rows, k=self.n_clusters, d=self.n_components, restarts=self.n_init, affine=self.affine
        )
        self.bases_, self.means_, self.labels_ = map(np.asarray, found[:3])
        self.objective_ = float(found.objective)
        return self

    def predict(self, X):
        """Returns the nearest subspace of each row, ``[m]`` int32."""
        check_is_fitted(self)
        scores = _explained(self._rows(X, reset=False), self.bases_, self.means_)
        return np.argmax(np.asarray(scores), axis=1).astype(np.int32)
