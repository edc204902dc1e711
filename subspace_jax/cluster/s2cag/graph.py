"""The normalized adjacency of a graph as a linear map: padded rows, sharded over nodes where there is a mesh."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from subspace_jax import data

_GROUP = 8  # slots that one step of a scan gathers
_PIECE = 16  # slots of a piece of a row that is longer than others
_MOST_SLOTS = 64
_SCATTER = 16  # slots that take as long as the scatter of one piece
KINDS = ("double", "random_walk")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["idx", "val", "more_idx", "more_val", "more_row", "scale"],
    meta_fields=["nodes", "entries", "mesh"],
)
@dataclasses.dataclass(frozen=True)
class GraphOperator:
    """A matrix ``diag(scale) W`` of nodes, ``W`` symmetric and sparse, which is applied to thin blocks.

    Each row of ``W`` has the same number of slots; entries of longer rows are in further pieces, so that hubs cost no
    padding for all.  With a mesh all arrays are sharded over nodes, and a product gathers the block on every device.

    Attributes:
      idx: ``[slots, n]`` int32, columns of the entries.
      val: ``[slots, n]``, their values; 0 in a slot without an entry.
      more_idx: ``[16, pieces]`` int32, entries of rows that have more of them.
      more_val: ``[16, pieces]``.
      more_row: ``[pieces]`` int32, the row of each piece, within its shard.
      scale: ``[n]``; 0 of rows that pad the nodes to the mesh.
      nodes: Nodes of the graph, at most ``n``.
      entries: Entries of ``W`` that are not zero.
      mesh: Mesh over whose axes the nodes are sharded, or None.
    """

    idx: jax.Array
    val: jax.Array
    more_idx: jax.Array
    more_val: jax.Array
    more_row: jax.Array
    scale: jax.Array
    nodes: int
    entries: int
    mesh: Mesh | None = None

    @property
    def rows(self) -> int:
        """Rows of a block: the nodes, and what pads them to the mesh."""
        return self.scale.shape[0]

    def matvec(self, y: jax.Array) -> jax.Array:
        """Returns ``P y`` for ``y [rows, q]``."""
        return self.scale[:, None] * self._symmetric(y)

    def rmatvec(self, y: jax.Array) -> jax.Array:
        """Returns ``P^T y`` for ``y [rows, q]``."""
        return self._symmetric(self.scale[:, None] * y)

    def _symmetric(self, y: jax.Array) -> jax.Array:
        arrays = (self.idx, self.val, self.more_idx, self.more_val, self.more_row)
        if self.mesh is None:
            return _product(*arrays, y)
        axes = self.mesh.axis_names
        columns = P(None, axes)

        def of_shard(*shard):
            return _product(*shard[:-1], jax.lax.all_gather(shard[-1], axes, tiled=True))

        specs = (columns, columns, columns, columns, P(axes), P(axes))
        return jax.shard_map(of_shard, mesh=self.mesh, in_specs=specs, out_specs=P(axes))(*arrays, y)


def _product(idx, val, more_idx, more_val, more_row, y):
    out = _gathered(idx, val, y)
    return out.at[more_row].add(_gathered(more_idx, more_val, y)) if more_row.shape[0] else out


def _gathered(idx: jax.Array, val: jax.Array, y: jax.Array) -> jax.Array:
    """Sums ``val[s, i] y[idx[s, i]]`` over the slots: a few at a time, for all at once would hold them all."""

    def step(total, group):
        columns, values = group
        for j in range(_GROUP):
            total = total + values[j][:, None] * y[columns[j]]
        return total, None

    groups = tuple(x.reshape(-1, _GROUP, x.shape[1]) for x in (idx, val))
    # A sum of a shard varies over the mesh's axes as its values do.
    start = jnp.zeros((idx.shape[1], y.shape[1]), y.dtype) * val[0][:, None]
    return jax.lax.scan(step, start, groups)[0]


def normalize_adjacency(
    adj: Any, kind: str = "double", *, dtype: jnp.dtype = jnp.float32, mesh: Mesh | None = None
) -> GraphOperator:
    """The row-stochastic propagation matrix of a graph.

    ``double`` (as the authors' code has it): ``D2^-1 (A1 + I)`` with ``A1 = D1^-1/2 (A + I) D1^-1/2``, where ``D1``
    and ``D2`` are the row sums of ``A + I`` and ``A1 + I``.  ``random_walk`` (as the paper): ``D1^-1 (A + I)``.
    Self-loops of ``A`` stay.  Runs on the host, in float64.

    Args:
      adj: See :func:`subspace_jax.data.as_adjacency`.
      kind: ``"double"`` or ``"random_walk"``.
      dtype: Of the values, float32 or float64.
      mesh: Mesh over all of whose axes the nodes are sharded.

    Returns:
      The operator.

    Raises:
      ValueError: ``kind`` is unknown, or ``adj`` is no adjacency of a graph.
    """
    import scipy.sparse as sp

    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    adjacency = data.as_adjacency(adj)
    loops = sp.eye_array(adjacency.shape[0], format="csr")
    w = (adjacency + loops).tocsr()
    if kind == "double":
        root = 1 / np.sqrt(w.sum(axis=1))
        w.data *= root[w.indices] * np.repeat(root, np.diff(w.indptr))
        w = (w + loops).tocsr()
    scale = 1 / w.sum(axis=1)
    arrays = _layout(w, 1 if mesh is None else mesh.size, dtype)
    arrays["scale"] = np.pad(scale, (0, arrays["idx"].shape[1] - len(scale))).astype(dtype)
    if mesh is None:
        placed = {name: jnp.asarray(x) for name, x in arrays.items()}
    else:
        specs = {name: P(None, mesh.axis_names) if x.ndim == 2 else P(mesh.axis_names) for name, x in arrays.items()}
        placed = {name: jax.device_put(x, NamedSharding(mesh, specs[name])) for name, x in arrays.items()}
    return GraphOperator(**placed, nodes=w.shape[0], entries=int(w.nnz), mesh=mesh)


def _layout(w, shards: int, dtype) -> dict[str, np.ndarray]:
    """Slots of all rows and pieces of the long ones; shard ``i`` has the ``i``-th part of every array."""
    degree = np.diff(w.indptr)
    rows = -(-len(degree) // shards)  # of a shard
    slots = _slots(degree)
    row = np.repeat(np.arange(len(degree), dtype=np.int32), degree)
    at = np.arange(w.nnz) - np.repeat(w.indptr[:-1], degree)
    idx, val = np.zeros((slots, rows * shards), np.int32), np.zeros((slots, rows * shards), dtype)
    short = at < slots
    idx[at[short], row[short]], val[at[short], row[short]] = w.indices[short], w.data[short]

    pieces = np.zeros(rows * shards, np.int64)
    pieces[: len(degree)] = -(-np.maximum(degree - slots, 0) // _PIECE)
    of_shard = pieces.reshape(shards, rows)
    most = int(of_shard.sum(1).max())  # as many in each shard
    first = (np.cumsum(of_shard, axis=1) - of_shard + most * np.arange(shards)[:, None]).reshape(-1)
    more_idx, more_val = np.zeros((_PIECE, most * shards), np.int32), np.zeros((_PIECE, most * shards), dtype)
    more_row = np.zeros(most * shards, np.int32)
    long = ~short
    beyond = at[long] - slots
    piece = first[row[long]] + beyond // _PIECE
    more_idx[beyond % _PIECE, piece], more_val[beyond % _PIECE, piece] = w.indices[long], w.data[long]
    more_row[piece] = row[long] % rows
    return {"idx": idx, "val": val, "more_idx": more_idx, "more_val": more_val, "more_row": more_row}


def _slots(degree: np.ndarray) -> int:
    """The slots of a row for which slots, and pieces of longer rows, take the least time."""
    degrees, counts = np.unique(degree, return_counts=True)

    def cost(slots):
        pieces = -(-np.maximum(degrees - slots, 0) // _PIECE)
        return len(degree) * slots + counts @ pieces * (_PIECE + _SCATTER)

    return min(range(_GROUP, _MOST_SLOTS + 1, _GROUP), key=cost)
