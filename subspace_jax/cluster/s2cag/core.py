"""S2CAG and M-S2CAG: from a graph and attributes to labels."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from subspace_jax import linalg
from subspace_jax.cluster.s2cag.attributes import normalize_attributes, tfidf
from subspace_jax.cluster.s2cag.embedding import modularity_embedding, randomized_left_svd
from subspace_jax.cluster.s2cag.graph import GraphOperator, normalize_adjacency
from subspace_jax.cluster.s2cag.rounding import ROUNDINGS, round_embedding
from subspace_jax.cluster.s2cag.smoothing import SERIES, Smoothed, choose_path, products_of, smooth, smoothed_products

_PATHS = (None, "explicit", "implicit")


class Options(NamedTuple):
    """Settings of both methods, all static.

    Attributes:
      T: Order of the smoothing, 0 or more: how far attributes travel over edges.
      alpha: Ratio of the weights of successive orders, more than 0; above 1 the farther ones weigh more.
      gamma: Resolution of M-S2CAG.
      tau: Power iterations; None for 7, and 50 of M-S2CAG.
      rounding: See :func:`round_embedding`.
      series: See :func:`smooth`; the implicit path has the paper's alone.
      path: Whether to form the smoothed attributes: ``"explicit"``, ``"implicit"``, or None for the cheaper.
      counts: Whether attributes are counts, which get tf-idf weights; False for vectors that are used as they are.
    """

    T: int = 10
    alpha: float = 0.9
    gamma: float = 1.0
    tau: int | None = None
    rounding: str = "snem-cpqr"
    series: str = "paper"
    path: str | None = None
    counts: bool = True


class S2CAGResult(NamedTuple):
    """Clusters of nodes.

    Attributes:
      embedding: ``[n, k]``, orthonormal columns.
      labels: ``[n]`` int32.
      path: ``"explicit"`` or ``"implicit"``.
    """

    embedding: jax.Array
    labels: jax.Array
    path: str


def s2cag(
    key: jax.Array, adj: "GraphOperator | object", X: jax.Array, k: int, **options: float | str | None
) -> S2CAGResult:
    """Spectral subspace clustering of an attributed graph (Lin et al., KDD 2025).

    Self-expression ``|Z - S Z|_F^2`` of smoothed attributes ``Z`` under a low rank and orthogonality is solved by
    ``S = Y Y^T`` with leading left singular vectors ``Y`` of ``Z``, which equally minimize the conductance of the
    affinity ``Z Z^T``; neither matrix is formed.  Time and memory grow linearly with edges.

    Args:
      key: Key of the sketch and of the starts of the rounding.
      adj: Adjacency of the graph, see :func:`subspace_jax.data.as_adjacency`; or what :func:`normalize_adjacency`
        makes of it, which serves several calls and shards; with it the first two results can be jitted.
      X: Attributes, ``[n, d]``: a dense array, or a SciPy sparse matrix, which is made dense.
      k: Clusters, static.
      **options: See :class:`Options`.

    Returns:
      Embedding, labels and path; float32, or float64 where ``X`` is and 64-bit types are on.

    Raises:
      ValueError: An option is out of range, ``k + 1`` is more than ``n`` or ``d``, ``adj`` is no adjacency or has a
        negative weight, ``X`` has another number of rows, is not finite, or holds zeros alone.
      TypeError: An option is unknown.
    """
    return _clustered(key, adj, X, k, Options(**options), 7, False)


def m_s2cag(
    key: jax.Array, adj: "GraphOperator | object", X: jax.Array, k: int, **options: float | str | None
) -> S2CAGResult:
    """S2CAG by modularity instead of conductance: leading eigenvectors of the modularity of ``Z Z^T``.

    Arguments, result and errors: see :func:`s2cag`; ``k`` may be ``n``, for no vector is dropped.
    """
    return _clustered(key, adj, X, k, Options(**options), 50, True)


def graph_embedding(
    key: jax.Array, p: GraphOperator, f: jax.Array, k: int, options: Options, modular: bool
) -> jax.Array:
    """The embedding ``[n, k]`` of nodes; pure.  ``options`` has a path and iterations.

    Args:
      key: Key of the start.
      p: Propagation matrix.
      f: Weighted attributes, ``[n, d]``.
      k: Columns.
      options: Settings.
      modular: Whether by modularity.
    """
    z = smoothed_attributes(p, f, options)
    if not modular:
        return randomized_left_svd(z, k, options.tau, key)[: p.nodes]
    # Drawn for the nodes alone: the same whatever pads them.
    start = _padded(jax.random.normal(key, (p.nodes, k), z.dtype), p)
    return modularity_embedding(z, k, options.gamma, options.tau, Q0=start)[: p.nodes]


def smoothed_attributes(p: GraphOperator, f: jax.Array, options: Options) -> Smoothed:
    """Smoothed attributes ``Z`` of weighted ones, ``[n, d]``, formed or not; padded to the rows of ``p``."""
    x = _padded(normalize_attributes(f), p)
    if options.path == "explicit":
        return products_of(smooth(p, x, options.T, options.alpha, options.series))
    return smoothed_products(p, x, options.T, options.alpha)


def prepared(adj, X, k: int, options: Options, tau: int) -> tuple[GraphOperator, jax.Array, Options]:
    """Checks arguments, and returns the propagation matrix, weighted attributes, and settings without a None."""
    check_options(options)
    x = X.toarray() if hasattr(X, "toarray") else X
    x = jnp.asarray(x)
    x = x if x.dtype == jnp.float64 else x.astype(jnp.float32)
    p = adj if isinstance(adj, GraphOperator) else normalize_adjacency(adj, dtype=x.dtype)
    if x.ndim != 2 or x.shape[0] != p.nodes:
        raise ValueError(f"X: expected attributes [{p.nodes}, d], one row of each node, got shape {x.shape}")
    if linalg.is_here(x) and not bool(jnp.any(x)):
        raise ValueError("X: expected attributes that are not all zero")
    f = tfidf(x) if options.counts else x
    if not options.counts:
        normalize_attributes(f)  # refuses what has no normalization
    n, d = x.shape
    tau = tau if options.tau is None else options.tau
    path = options.path or (
        "explicit" if options.series == "recursion" else choose_path(n, d, p.entries, k, options.T, tau)
    )
    return p, f, options._replace(tau=tau, path=path)


def _clustered(key, adj, X, k, options, tau, modular):
    check_clusters(k, np.shape(X), modular)
    p, f, options = prepared(adj, X, k, options, tau)
    embedding, labels = fit_labels(key, p, f, k, options, modular)
    if linalg.is_here(embedding) and not bool(jnp.all(jnp.isfinite(embedding))):
        raise ValueError("X: expected attributes whose smoothed sums are not all zero or negative")
    return S2CAGResult(embedding, labels, options.path)


@functools.partial(jax.jit, static_argnames=("k", "options", "modular"))
def fit_labels(key, p, f, k, options, modular):
    """Embedding and labels ``[n]``; arguments: see :func:`graph_embedding`."""
    of_embedding, of_rounding = jax.random.split(key)
    embedding = graph_embedding(of_embedding, p, f, k, options, modular)
    return embedding, round_embedding(of_rounding, embedding, options.rounding)


def _padded(x: jax.Array, p: GraphOperator) -> jax.Array:
    """Rows of zeros behind those of the nodes, and the sharding of the graph."""
    x = jnp.pad(x, ((0, p.rows - x.shape[0]), (0, 0)))
    if p.mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(p.mesh, P(p.mesh.axis_names)))


def check_clusters(k: int, shape: tuple[int, ...], modular: bool) -> None:
    """Raises ValueError for more clusters than attributes ``[n, d]`` of that shape allow."""
    n, d = shape if len(shape) == 2 else (k + 1, k + 1)  # what is no matrix is refused as such
    most = n if modular else min(n, d) - 1
    if not 1 <= k <= most:
        why = "the number of nodes" if modular else f"one less than nodes and attributes, {n} and {d}"
        raise ValueError(f"k: expected 1 to {most}, {why}, got {k}")


def check_options(options: Options) -> None:
    """Raises ValueError for a setting that is out of range."""
    if options.T < 0 or int(options.T) != options.T:
        raise ValueError(f"T: expected 0, 1, 2, ..., got {options.T}")
    if not 0 < options.alpha < np.inf:
        raise ValueError(f"alpha: expected more than 0, got {options.alpha}")
    if not 0 <= options.gamma < np.inf:
        raise ValueError(f"gamma: expected 0 or more, got {options.gamma}")
    if options.tau is not None and options.tau < 0:
        raise ValueError(f"tau: expected 0 or more, got {options.tau}")
    for name, known in (("rounding", ROUNDINGS), ("series", SERIES), ("path", _PATHS)):
        if getattr(options, name) not in known:
            expected = ", ".join(map(str, known))
            raise ValueError(f"{name}: expected one of {expected}, got {getattr(options, name)!r}")
    if options.path == "implicit" and options.series == "recursion":
        raise ValueError("series: expected 'paper' for the implicit path, which has no other, got 'recursion'")
