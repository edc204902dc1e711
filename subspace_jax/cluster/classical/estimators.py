"""Clustering in scikit-learn's manner: ``fit``, ``fit_predict``, ``predict`` and ``labels_``."""

import functools

import jax
import numpy as np
from sklearn.base import BaseEstimator, ClusterMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from subspace_jax import linalg
from subspace_jax.cluster.classical.affinity import affinity_from_coefficients, neighbor_affinity
from subspace_jax.cluster.classical.elastic_net import elastic_net_sc
from subspace_jax.cluster.classical.omp import ssc_omp
from subspace_jax.cluster.classical.tsc import tsc
from subspace_jax.linalg import SparseRows, lrr, lsr

RandomState = int | np.random.RandomState | None

_kmeans = jax.jit(linalg.kmeans, static_argnames=("k", "restarts"))
_k_subspaces = jax.jit(linalg.k_subspaces, static_argnames=("k", "d", "restarts", "affine"))
_spectral = jax.jit(linalg.spectral_clustering, static_argnames=("k", "restarts"))
_nearest = jax.jit(linalg.nearest_rows, static_argnames=("k",))
_explained = jax.jit(linalg.explained_energy)


class _Clustering(ClusterMixin, BaseEstimator):
    """Input as scikit-learn takes it, and a key from ``random_state``."""

    def _rows(self, X, reset: bool) -> np.ndarray:
        rows = validate_data(self, X, dtype=(np.float32, np.float64), reset=reset, ensure_min_samples=1 + reset)
        # float64 stays where JAX has it on.
        rows = rows.astype(jax.dtypes.canonicalize_dtype(rows.dtype), copy=False)
        if reset and not 1 <= self.n_clusters <= len(rows):
            raise ValueError(f"n_clusters: expected 1 to n_samples={len(rows)}, got {self.n_clusters}")
        return rows

    def _key(self) -> jax.Array:
        return jax.random.key(check_random_state(self.random_state).randint(2**31 - 1))


class KMeans(_Clustering):
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


class KSubspaces(_Clustering):
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


class _OnGraph(_Clustering):
    """Spectral clustering of an affinity between rows; a new row gets the label of its nearest one."""

    def fit(self, X, y=None):
        """Clusters rows ``[n, features]``."""
        rows = self._rows(X, reset=True)
        affinity = self._affinity(self._prepared(rows))
        found = _spectral(self._key(), affinity, k=self.n_clusters, restarts=self.n_init)
        self.affinity_ = jax.tree.map(np.asarray, affinity)
        self.labels_ = np.asarray(found.assignments)
        self.eigenvalues_ = np.asarray(found.embedding.eigenvalues)
        self.rows_ = rows
        return self

    def predict(self, X):
        """Returns the label of the nearest of the rows that were clustered, ``[m]`` int32."""
        check_is_fitted(self)
        rows = self._prepared(self._rows(X, reset=False))
        return self.labels_[np.asarray(self._nearest(rows, self._prepared(self.rows_)))]

    def _prepared(self, rows):
        return np.asarray(linalg.unit_vectors(rows))

    def _nearest(self, rows, of):
        # The largest absolute cosine: a line has two directions.
        squares, at = zip(*(_nearest(sign * rows, of, k=1) for sign in (1, -1)), strict=True)
        return np.where(squares[0] <= squares[1], at[0], at[1])[:, 0]


class SpectralClustering(_OnGraph):
    """Normalized spectral clustering of the graph of nearest neighbours; see :func:`neighbor_affinity`.

    Args:
      n_clusters: Number of clusters.
      n_neighbors: Neighbours of a row.
      n_init: Starts of k-means on the embedding.
      random_state: Seed or ``numpy.random.RandomState``.

    Attributes:
      labels_: ``[n]`` int32.
      affinity_: ``Z [n, n_neighbors]``, which stand for ``Z + Z^T``.
      eigenvalues_: ``[k]``, of the normalized affinity, descending.
    """

    def __init__(
        self, n_clusters: int = 8, n_neighbors: int = 10, *, n_init: int = 20, random_state: RandomState = None
    ):
        self.n_clusters = n_clusters
        self.n_neighbors = n_neighbors
        self.n_init = n_init
        self.random_state = random_state

    def _affinity(self, rows):
        return _jitted(neighbor_affinity, q=min(self.n_neighbors, len(rows) - 1))(rows)

    def _prepared(self, rows):
        return rows

    def _nearest(self, rows, of):
        return _nearest(rows, of, k=1)[1][:, 0]


class TSC(_OnGraph):
    """Thresholding-based subspace clustering; see :func:`tsc`.

    Args:
      n_clusters: Number of clusters.
      n_neighbors: Neighbours of a row, ``q``.
      n_init: Starts of k-means on the embedding.
      random_state: Seed or ``numpy.random.RandomState``.

    Attributes: see :class:`SpectralClustering`.
    """

    def __init__(
        self, n_clusters: int = 8, n_neighbors: int = 4, *, n_init: int = 20, random_state: RandomState = None
    ):
        self.n_clusters = n_clusters
        self.n_neighbors = n_neighbors
        self.n_init = n_init
        self.random_state = random_state

    def _affinity(self, rows):
        return _jitted(tsc, q=min(self.n_neighbors, len(rows) - 1))(rows)


class _SelfExpressive(_OnGraph):
    """Clusters by the affinity of coefficients, of which each row keeps the largest."""

    def _affinity(self, rows):
        return affinity_from_coefficients(self._coefficients(rows))


class LSR(_SelfExpressive):
    """Least-squares representation; see :func:`lsr`.

    Args:
      n_clusters: Number of clusters.
      gamma: Weight of the data against the penalty.
      keep: Coefficients of a row to keep.
      n_init: Starts of k-means on the embedding.
      random_state: Seed or ``numpy.random.RandomState``.

    Attributes: see :class:`SpectralClustering`.
    """

    def __init__(
        self,
        n_clusters: int = 8,
        gamma: float = 10.0,
        keep: int = 9,
        *,
        n_init: int = 20,
        random_state: RandomState = None,
    ):
        self.n_clusters = n_clusters
        self.gamma = gamma
        self.keep = keep
        self.n_init = n_init
        self.random_state = random_state

    def _coefficients(self, rows):
        return _jitted(lsr, gamma=self.gamma, keep=min(self.keep, len(rows)))(rows)


class LRR(_SelfExpressive):
    """Low-rank representation; see :func:`lrr`.

    Args:
      n_clusters: Number of clusters.
      noise: Weight of the nuclear norm against the error.
      keep: Coefficients of a row to keep.
      n_init: Starts of k-means on the embedding.
      random_state: Seed or ``numpy.random.RandomState``.

    Attributes: see :class:`SpectralClustering`.
    """

    def __init__(
        self,
        n_clusters: int = 8,
        noise: float = 0.0,
        keep: int = 9,
        *,
        n_init: int = 20,
        random_state: RandomState = None,
    ):
        self.n_clusters = n_clusters
        self.noise = noise
        self.keep = keep
        self.n_init = n_init
        self.random_state = random_state

    def _coefficients(self, rows):
        return _jitted(lrr, noise=self.noise, keep=min(self.keep, len(rows)))(rows)


class SSC(_SelfExpressive):
    """Sparse subspace clustering by the lasso (``tau`` = 1) or the elastic net (EnSC); see :func:`elastic_net_sc`.

    Args:
      n_clusters: Number of clusters.
      gamma: Weight of the data, more than 1.
      tau: Share of the 1-norm.
      n_init: Starts of k-means on the embedding.
      random_state: Seed or ``numpy.random.RandomState``.

    Attributes: see :class:`SpectralClustering`.
    """

    def __init__(
        self,
        n_clusters: int = 8,
        gamma: float = 50.0,
        tau: float = 0.9,
        *,
        n_init: int = 20,
        random_state: RandomState = None,
    ):
        self.n_clusters = n_clusters
        self.gamma = gamma
        self.tau = tau
        self.n_init = n_init
        self.random_state = random_state

    def _coefficients(self, rows):
        options = {"gamma": self.gamma, "tau": self.tau, "keep": min(50, len(rows))}
        return _jitted(elastic_net_sc, **options)(rows).coefficients


class SSCOMP(_SelfExpressive):
    """Sparse subspace clustering by orthogonal matching pursuit; see :func:`ssc_omp`.

    Args:
      n_clusters: Number of clusters.
      n_nonzeros: Coefficients of a row, at most.
      n_init: Starts of k-means on the embedding.
      random_state: Seed or ``numpy.random.RandomState``.

    Attributes: see :class:`SpectralClustering`.
    """

    def __init__(
        self, n_clusters: int = 8, n_nonzeros: int = 10, *, n_init: int = 20, random_state: RandomState = None
    ):
        self.n_clusters = n_clusters
        self.n_nonzeros = n_nonzeros
        self.n_init = n_init
        self.random_state = random_state

    def _coefficients(self, rows) -> SparseRows:
        return _jitted(ssc_omp, nonzeros=min(self.n_nonzeros, len(rows) - 1))(rows)


@functools.cache
def _jitted(f, **options):
    """The compiled function of rows alone; the same options share one compilation."""
    return jax.jit(functools.partial(f, **options))
