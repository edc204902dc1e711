"""Number of trained parameters, a table of adapters, and labels of their arrays."""

import math
from typing import Any

import jax
import numpy as np

from subspace_jax.adapters.api import Rules, bases_of, settings_of
from subspace_jax.adapters.dora import DoRA
from subspace_jax.adapters.effort import Effort
from subspace_jax.adapters.flora import FLoRA
from subspace_jax.adapters.full import Full
from subspace_jax.adapters.lora import LoRA
from subspace_jax.adapters.rules import adapters_of, path_of
from subspace_jax.adapters.structured import is_structured
from subspace_jax.adapters.svfit import SVFit

PyTree = Any


def count(trainable: PyTree) -> int:
    """Returns the number of trained parameters."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(trainable))


def describe(params: PyTree, trainable: PyTree, settings: Rules) -> str:
    """Formats adapters as a table: path, shape, method, rank, trained parameters and their fraction of the weight.

    Args:
      params: The frozen tree, of arrays or of shapes.
      trainable: Tree of :func:`init` or :func:`prepare`.
      settings: The same rules.

    Returns:
      Lines of aligned columns; the last one has the total.
    """
    at, rows = bases_of(params), [("path", "shape", "method", "rank", "trained", "fraction")]
    chosen = settings_of(trainable, settings)
    for path, arrays in adapters_of(trainable).items():
        config = chosen[path]
        shape, trained = _shape(at[path]), count(arrays)
        # The rank of SVFit may depend on the weight.
        rank = arrays["delta"].shape[-1] if "delta" in arrays else config.rank
        rank = "-" if rank is None else "/".join(map(str, rank)) if isinstance(rank, tuple) else str(rank)
        fraction = f"{100 * trained / math.prod(shape):.2f}%"
        rows.append((path, "x".join(map(str, shape)), config.method, rank, f"{trained:,}", fraction))
    everything = sum(math.prod(_shape(w)) for w in at.values())
    trained = count(trainable)
    rows.append(("total", "", "", "", f"{trained:,}", f"{100 * trained / everything:.2f}%"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]

    def line(row):
        cells = (c.rjust(w) if i > 2 else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        return "  ".join(cells).rstrip()

    return "\n".join(map(line, rows))


LABELS = {name: label for method in (LoRA, DoRA, FLoRA, SVFit, Effort, Full) for name, label in method.labels.items()}


def label_fn(tree: PyTree) -> PyTree:
    """Labels arrays for ``optax.partition``: "factor", "core", "magnitude", "spectrum", "full", or "frozen".

    In a trainable tree every array has the label of its kind; in bound parameters also the frozen arrays have theirs.
    ``optax.partition({"factor": optax.adamw(1e-4), "magnitude": optax.adam(1e-4)}, adapters.label_fn)`` applies weight
    decay to the factors only.

    Args:
      tree: A trainable tree, or parameters of :func:`bind`.

    Returns:
      Tree of labels.
    """

    def label(path, _):
        return LABELS.get(path_of(path[-1:]), "frozen")

    def label_bound(path, leaf):
        # Singular vectors in the base of a weight have the names of trained ones.
        return "frozen" if path_of(path[:1]) == "base" else label(path, leaf)

    if not any(map(is_structured, jax.tree.leaves(tree, is_leaf=is_structured))):
        return jax.tree_util.tree_map_with_path(label, tree)

    def labels_of(x):
        return jax.tree_util.tree_map_with_path(label_bound, x) if is_structured(x) else "frozen"

    return jax.tree.map(labels_of, tree, is_leaf=is_structured)


def _shape(weight: Any) -> tuple[int, ...]:
    return weight.shape if hasattr(weight, "shape") else np.shape(weight)
