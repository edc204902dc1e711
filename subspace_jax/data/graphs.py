"""Graphs with attributes: adjacencies as users have them, and files of both."""

import os
import pathlib
import warnings
import zipfile
from typing import Any, NamedTuple

import numpy as np

_ASYMMETRY = 1e-6


class Graph(NamedTuple):
    """A graph with attributes of its nodes.

    Attributes:
      adjacency: ``scipy.sparse.csr_array [n, n]`` float64, symmetric, no entry negative.
      attributes: ``[n, d]``, dense or ``scipy.sparse.csr_array``.
      symmetrized: Whether the file had edges of one direction in an adjacency.
    """

    adjacency: Any
    attributes: Any
    symmetrized: bool


def as_adjacency(adj: Any) -> Any:
    """Returns the adjacency of an undirected graph.

    Args:
      adj: A SciPy sparse array or matrix, a networkx graph (nodes in its order, edges with ``weight``), or a dense
        array, ``[n, n]``.

    Returns:
      ``scipy.sparse.csr_array [n, n]`` float64.  Where it is not symmetric, a pair gets the larger of both weights,
      and a warning says so.

    Raises:
      ValueError: It is not square, or has no node, a negative entry or one not finite.
    """
    found, changed = _symmetric("adj", _csr("adj", adj))
    if changed:
        warnings.warn(_SAID, stacklevel=2)
    return found


_SAID = "adj: is not symmetric; each pair of nodes gets the larger of both weights"


def read_graph(path: str | os.PathLike, attributes: str | os.PathLike | None = None) -> Graph:
    """Reads a graph and the attributes of its nodes.

    Args:
      path: One of

        - ``.npz`` with ``edge_src`` and ``edge_dst`` (each edge once, optionally ``edge_weight`` and ``self_loops``),
          and attributes as ``features [n, d]`` or in CSR as ``feat_indptr``, ``feat_indices`` and ``n_features``
          (optionally ``feat_data``);
        - ``.npz`` with CSR arrays ``adj_data``, ``adj_indices``, ``adj_indptr``, ``adj_shape``, and the same of
          ``attr_``;
        - ``.npz`` of ``scipy.sparse.save_npz``;
        - ``.csv`` with lines ``node,node`` or ``node,node,weight``, nodes from 0, a line of names before them or not.
      attributes: Attributes in a file of their own: ``.npy [n, d]``, or ``.npz`` of ``scipy.sparse.save_npz``.

    Returns:
      The graph.

    Raises:
      FileNotFoundError: There is no such file.
      ValueError: A file can't be read as that, has no or too few attributes, a negative weight, or a number that is
        not finite.
    """
    path = _existing("input", path)
    given = None if attributes is None else _read_attributes(_existing("attributes", attributes))
    source = f"input: {path}"
    if path.suffix == ".csv":
        if given is None:
            raise ValueError(f"{source}: holds edges alone; expected a file of attributes beside it")
        adjacency, own = _edges(source, *_read_csv(source, path), given.shape[0]), None
    elif path.suffix == ".npz":
        adjacency, own = _from_npz(source, path, None if given is None else given.shape[0])
    else:
        raise ValueError(f"input: expected a file that ends in .npz or .csv, got {path}")
    found = own if given is None else given
    if found is None:
        raise ValueError(f"{source}: holds no attributes; expected features, feat_* or attr_*, or a file of them")
    adjacency, changed = _symmetric(source, _csr(source, adjacency))
    n = adjacency.shape[0]
    if found.ndim != 2 or found.shape[0] != n or not found.shape[1]:
        where = source if given is None else f"attributes: {attributes}"
        raise ValueError(f"{where}: expected attributes [{n}, d] of the graph's nodes, got {list(found.shape)}")
    values = getattr(found, "data", found) if hasattr(found, "tocsr") else found
    if not np.isfinite(values).all():
        raise ValueError(f"{source if given is None else f'attributes: {attributes}'}: holds NaN or infinity")
    return Graph(adjacency, found, changed)


def _csr(name: str, adj: Any):
    import scipy.sparse as sp

    if hasattr(adj, "adjacency"):
        import networkx

        if not len(adj):
            raise ValueError(f"{name}: expected a graph with nodes, got one without")
        adj = networkx.to_scipy_sparse_array(adj, dtype=np.float64, format="csr")
    elif not sp.issparse(adj):
        adj = np.asarray(adj)
    if adj.ndim != 2 or adj.shape[0] != adj.shape[1] or not adj.shape[0]:
        raise ValueError(f"{name}: expected an adjacency [n, n], got shape {adj.shape}")
    adj = sp.csr_array(adj, dtype=np.float64, copy=True)
    adj.sum_duplicates()
    wrong = np.flatnonzero(~np.isfinite(adj.data) | (adj.data < 0))
    if len(wrong):
        row = np.searchsorted(adj.indptr, wrong[0], side="right") - 1
        what = f"{adj.data[wrong[0]]} of nodes {row} and {adj.indices[wrong[0]]}"
        raise ValueError(f"{name}: expected edge weights of 0 or more, finite, got {what}")
    adj.eliminate_zeros()
    return adj


def _symmetric(name: str, adj) -> tuple[Any, bool]:
    other = adj.T.tocsr()
    difference = abs(adj - other)
    if not difference.nnz or difference.max() <= _ASYMMETRY * adj.max():
        return adj, False
    return adj.maximum(other).tocsr(), True


def _edges(name: str, pairs: np.ndarray, weights: np.ndarray | None, n: int):
    """The symmetric adjacency of edges ``[m, 2]``; without weights an edge counts once however often it is there."""
    import scipy.sparse as sp

    if pairs.size and (pairs.min() < 0 or pairs.max() >= n):
        row = int(np.flatnonzero((pairs < 0).any(1) | (pairs >= n).any(1))[0])
        raise ValueError(f"{name}: expected nodes 0 to {n - 1}, got {pairs[row].tolist()} in edge {row}")
    one_way = sp.coo_array((np.ones(len(pairs)) if weights is None else weights, tuple(pairs.T)), shape=(n, n)).tocsr()
    if weights is None:
        one_way.data[:] = 1
    if one_way.nnz and one_way.data.min() < 0:
        raise ValueError(f"{name}: expected edge weights of 0 or more, got {one_way.data.min()}")
    return one_way.maximum(one_way.T).tocsr()


def _from_npz(name: str, path: pathlib.Path, n: int | None):
    import scipy.sparse as sp

    if not zipfile.is_zipfile(path):
        raise ValueError(f"{name}: can't be read as a graph: it is no archive of NumPy")
    try:
        with np.load(path, allow_pickle=False) as archive:
            there = set(archive.files)
            if {"edge_src", "edge_dst"} <= there:
                return _from_edges(name, {key: archive[key] for key in there - {"labels"}}, n)
            if {"adj_indices", "adj_indptr", "adj_shape"} <= there:
                own = _csr_of(archive, "attr", there)
                return _csr_of(archive, "adj", there), own
        if {"format", "shape"} <= there:
            return sp.load_npz(path), None
    except (zipfile.BadZipFile, KeyError, EOFError, ValueError, IndexError) as error:
        if str(error).startswith(name):
            raise
        raise ValueError(f"{name}: can't be read as a graph: {error}") from error
    expected = "edge_src and edge_dst, adj_*, or what scipy.sparse.save_npz writes"
    raise ValueError(f"{name}: expected {expected}, got {', '.join(sorted(there)) or 'nothing'}")


def _csr_of(archive, prefix: str, there: set[str]):
    import scipy.sparse as sp

    if f"{prefix}_indptr" not in there:
        return archive[f"{prefix}_matrix"] if f"{prefix}_matrix" in there else None
    data, indices, indptr, shape = (archive[f"{prefix}_{part}"] for part in ("data", "indices", "indptr", "shape"))
    return sp.csr_array((data.astype(np.float64), indices, indptr), shape=tuple(shape))


def _from_edges(name: str, arrays: dict[str, np.ndarray], n: int | None):
    import scipy.sparse as sp

    pairs = np.stack([arrays["edge_src"], arrays["edge_dst"]], axis=1).astype(np.int64)
    weights = arrays.get("edge_weight")
    own = arrays.get("features")
    if "feat_indptr" in arrays:
        indptr, indices = arrays["feat_indptr"], arrays["feat_indices"].astype(np.int32)
        values = arrays.get("feat_data", np.ones(len(indices), np.float32))
        own = sp.csr_array((values, indices, indptr), shape=(len(indptr) - 1, int(arrays["n_features"])))
    if own is not None:
        n = own.shape[0]
    elif n is None:
        raise ValueError(f"{name}: holds no attributes; expected features or feat_*, or a file of them")
    loops = arrays.get("self_loops", np.zeros(0)).astype(np.int64)
    if len(loops):
        pairs = np.concatenate([pairs, np.stack([loops, loops], axis=1)])
        weights = None if weights is None else np.concatenate([weights, np.ones(len(loops))])
    return _edges(name, pairs, weights, n), own


def _read_csv(name: str, path: pathlib.Path) -> tuple[np.ndarray, np.ndarray | None]:
    try:
        with path.open(encoding="utf-8-sig") as file, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "loadtxt: input contained no data")
            header = not _numeric(file.readline().split(",")[0])
            rows = np.loadtxt(path, delimiter=",", skiprows=int(header), ndmin=2, encoding="utf-8-sig")
    except ValueError as error:
        # Without NumPy's advice on the arguments of its function.
        raise ValueError(f"{name}: can't be read as edges: {str(error).partition(';')[0]}") from error
    if not len(rows):
        raise ValueError(f"{name}: expected lines node,node or node,node,weight, got no edge")
    if rows.shape[1] not in (2, 3):
        raise ValueError(f"{name}: expected lines node,node or node,node,weight, got {rows.shape[1]} numbers a line")
    for what, wrong in (
        ("whole numbers of nodes", ~np.isfinite(rows[:, :2]) | (rows[:, :2] != np.floor(rows[:, :2]))),
        ("finite weights of 0 or more", ~np.isfinite(rows[:, 2:]) | (rows[:, 2:] < 0)),
    ):
        if wrong.any():
            row = int(np.flatnonzero(wrong.any(axis=1))[0])
            raise ValueError(f"{name}: expected {what}, got {rows[row].tolist()} in line {_line(path, header, row)}")
    return rows[:, :2].astype(np.int64), rows[:, 2] if rows.shape[1] == 3 else None


def _line(path: pathlib.Path, header: bool, row: int) -> int:
    """The number of the line that a row of numbers is in; blank ones and comments hold none."""
    with path.open(encoding="utf-8-sig") as file:
        numbers = [i + 1 for i, line in enumerate(file) if i >= header and line.partition("#")[0].strip()]
    return numbers[row]


def _numeric(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _read_attributes(path: pathlib.Path):
    import scipy.sparse as sp

    if path.suffix not in (".npy", ".npz"):
        raise ValueError(f"attributes: expected a file that ends in .npy or .npz, got {path}")
    try:
        found = sp.load_npz(path).tocsr() if path.suffix == ".npz" else np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"attributes: {path}: can't be read as a matrix: {error}") from error
    if found.ndim != 2 or 0 in found.shape or found.dtype.kind not in "fiub":
        raise ValueError(f"attributes: {path}: expected numbers [n, d], got {found.dtype} {list(found.shape)}")
    return found


def _existing(name: str, path: str | os.PathLike) -> pathlib.Path:
    path = pathlib.Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{name}: {path}: no such file")
    return path
