"""Clustering by the affinity of a graph in scikit-learn's manner: see :mod:`.estimators`."""

import functools

import jax
import numpy as np
from sklearn.utils.validation import check_is_fitted

from subspace_jax import linalg
from subspace_jax.cluster.classical._base import Clustering, RandomState
from subspace_jax.cluster.classical.affinity import affinity_from_coefficients, neighbor_affinity
from subspace_jax.cluster.classical.elastic_net import elastic_net_sc
from subspace_jax.cluster.classical.omp import ssc_omp
from subspace_jax.cluster.classical.robust import lrr_l21
from subspace_jax.cluster.classical.tsc import tsc
from subspace_jax.linalg import SparseRows, lrr, lsr

_spectral = jax.jit(linalg.spectral_clustering, static_argnames=("k", "restarts"))
_nearest = jax.jit(linalg.nearest_rows, static_argnames=("k",))


class OnGraph(Clustering):
    """Spectral clustering of an affinity between rows; a new row gets the label of its nearest one."""

    def fit(self, X, y=None):
        """Clusters rows ``[n, features]``."""
        return self.fit_graph(X).cluster_graph()

    def fit_graph(self, X):
        """Computes ``affinity_`` of rows ``[n, features]``, for :meth:`cluster_graph`."""
        self.rows_ = self._rows(X, reset=True)
        self.affinity_ = jax.tree.map(np.asarray, self._affinity(self._prepared(self.rows_)))
        return self

    def cluster_graph(self):
        """Clusters the graph of the last fit by the present ``n_clusters``, ``n_init`` and ``random_state``."""
        check_is_fitted(self)
        self._check_parameters(len(self.rows_))
        found = _spectral(self._key(), self.affinity_, k=self.n_clusters, restarts=self.n_init)
        self.labels_ = np.asarray(found.assignments)
        self.eigenvalues_ = np.asarray(found.embedding.eigenvalues)
        return self

    def predict(self, X):
        """Returns the label of the nearest of the rows that were clustered, ``[m]`` int32."""
        check_is_fitted(self, "labels_")
        rows = self._prepared(self._rows(X, reset=False))
        return self.labels_[np.asarray(self._nearest(rows, self._prepared(self.rows_)))]

    def _prepared(self, rows):
        return np.asarray(linalg.unit_vectors(rows))

    def _nearest(self, rows, of):
        # The largest absolute cosine: a line has two directions.
        squares, at = zip(*(_nearest(sign * rows, of, k=1) for sign in (1, -1)), strict=True)
        return np.where(squares[0] <= squares[1], at[0], at[1])[:, 0]


class SpectralClustering(OnGraph):
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


class TSC(OnGraph):
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


class _SelfExpressive(OnGraph):
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


class RobustLRR(_SelfExpressive):
    """Low-rank representation with errors in few rows; see :func:`lrr_l21`.

    Args:
      n_clusters: Number of clusters.
      gamma: Weight of the errors, more than 1.
      keep: Coefficients of a row to keep.
      n_init: Starts of k-means on the embedding.
      random_state: Seed or ``numpy.random.RandomState``.

    Attributes: see :class:`SpectralClustering`.
    """

    def __init__(
        self,
        n_clusters: int = 8,
        gamma: float = 4.0,
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
        return _jitted(lrr_l21, gamma=self.gamma, keep=min(self.keep, len(rows)))(rows).coefficients


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
