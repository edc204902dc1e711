"""Adapters counted, listed in a table, and labelled by the kinds of their arrays."""

import math
from typing import Any

import jax
import numpy as np

from subspace_jax.adapters.api import WEIGHTS, Rules, bases_of, settings_of
from subspace_jax.adapters.flora import factor_names
from subspace_jax.adapters.rules import adapters_of, path_of

PyTree = Any


def count(trainable: PyTree) -> int:
    """Number of trained numbers."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(trainable))


def describe(params: PyTree, trainable: PyTree, settings: Rules) -> str:
    """Lists adapters in a table of text: path, shape, method, rank, trained numbers and their share of the weight.

    Args:
      params: The frozen tree, of arrays or of shapes.
      trainable: Of :func:`init` or :func:`prepare`.
      settings: The same rules.

    Returns:
      Lines of aligned columns; the last one has the total.
    """
    at, rows = bases_of(params), [("path", "shape", "method", "rank", "trained", "share")]
    chosen = settings_of(trainable, settings)
    for path, arrays in adapters_of(trainable).items():
        setting = chosen[path]
        shape, trained = _shape(at[path]), count(arrays)
        rank = getattr(setting, "rank", None)
        rank = arrays["delta"].shape[-1] if "delta" in arrays else rank
        rank = "-" if rank is None else "/".join(map(str, rank)) if isinstance(rank, tuple) else str(rank)
        method = type(setting).__name__
        method = "rsLoRA" if method == "LoRA" and setting.rslora else method
        share = f"{100 * trained / math.prod(shape):.2f}%"
        rows.append((path, "x".join(map(str, shape)), method, rank, f"{trained:,}", share))
    everything = sum(math.prod(_shape(w)) for w in at.values())
    trained = count(trainable)
    rows.append(("total", "", "", "", f"{trained:,}", f"{100 * trained / everything:.2f}%"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]

    def line(row):
        cells = (c.rjust(w) if i > 2 else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        return "  ".join(cells).rstrip()

    return "\n".join(map(line, rows))


LABELS = {
    "a": "factor",
    "b": "factor",
    "row_energy": "factor",
    "column_energy": "factor",
    "u": "factor",
    "vt": "factor",
    "core": "core",
    **{name: "factor" for name in factor_names(9)},
    "magnitude": "magnitude",
    "s": "spectrum",
    "delta": "spectrum",
    "full": "full",
}


def label_fn(tree: PyTree) -> PyTree:
    """Labels arrays for ``optax.partition``: "factor", "core", "magnitude", "spectrum", "full", or "frozen".

    Of a trainable tree every array gets the label of its kind; of bound parameters also the frozen ones get theirs.
    So weight decay can be kept from magnitudes, and base weights from any change:
    ``optax.partition({"factor": optax.adamw(1e-4), "magnitude": optax.adam(1e-4)}, adapters.label_fn)``.

    Args:
      tree: A trainable tree, or parameters out of :func:`bind`.

    Returns:
      Tree of labels.
    """
    bound = any(isinstance(x, WEIGHTS) for x in jax.tree.leaves(tree, is_leaf=_is_weight))

    def name_of(path, _):
        return LABELS.get(path_of(path[-1:]), "frozen")

    if not bound:
        return jax.tree_util.tree_map_with_path(name_of, tree)

    def label(x):
        return jax.tree_util.tree_map_with_path(name_of, x) if _is_weight(x) else "frozen"

    return jax.tree.map(label, tree, is_leaf=_is_weight)


def _is_weight(x: Any) -> bool:
    return isinstance(x, WEIGHTS)


def _shape(weight: Any) -> tuple[int, ...]:
    return weight.shape if hasattr(weight, "shape") else np.shape(weight)
