"""Task vectors: differences of fine-tuned models to their base, added to it again (arXiv 2212.04089, 2312.06173)."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax.adapters.rules import path_of

PyTree = Any


@jax.tree_util.register_static
class Tied:
    """Stands in a tree of task vectors for a leaf that is the same weight as another one.

    Args:
      owner: Path of that leaf, as in ``"embed/table"``.
    """

    def __init__(self, owner: str):
        self.owner = owner

    def __eq__(self, other):
        return isinstance(other, Tied) and self.owner == other.owner

    def __hash__(self):
        return hash(self.owner)

    def __repr__(self):
        return f"Tied({self.owner!r})"


def task_vectors(
    base: PyTree, finetuned: Sequence[PyTree], *, tied: Mapping[str, str] | None = None
) -> tuple[PyTree, ...]:
    """Differences of fine-tuned models to their base.

    Args:
      base: Parameters.
      finetuned: Trees of the same structure and shapes.
      tied: Path of a leaf, as in ``"head/kernel"``, to the path of the leaf whose weight it shares.

    Returns:
      A tree for each model, in float32 or wider.  It has None for leaves that are not floating point, and
      :class:`Tied` for tied ones, so that maps over its leaves pass both over.

    Raises:
      ValueError: There is no model, structures or shapes differ, a tied path is no leaf, or a value, where it is
        known, is not finite.
    """
    check_models(base, finetuned)
    tied = dict(tied or {})
    leaves = dict(entries(base))
    for path, owner in tied.items():
        for name in (path, owner):
            if name not in leaves or (name == owner and name in tied):
                raise ValueError(f"tied: expected paths of leaves that are not tied themselves, got {name!r}")
        if leaves[path].shape != leaves[owner].shape:
            raise ValueError(
                f"tied: expected leaves of one shape, {path} is {leaves[path].shape} and {owner} {leaves[owner].shape}"
            )

    def difference(path, start, end):
        name = path_of(path)
        if name in tied:
            return Tied(tied[name])
        return end.astype(wide(start)) - start.astype(wide(start)) if is_float(start) else None

    return tuple(jax.tree_util.tree_map_with_path(difference, base, model) for model in finetuned)


def apply_task_vectors(base: PyTree, taus: Sequence[PyTree], lam: Any, *, mask: PyTree | None = None) -> PyTree:
    """Adds task vectors to a base: ``base + (m / mean(m)) sum_t lam_t tau_t``, leaf by leaf, in one pass.

    Args:
      base: Parameters.
      taus: Of :func:`task_vectors`.
      lam: A number, numbers ``[T]``, or a tree of the structure of a task vector with ``[T]`` for each leaf.
      mask: Of :func:`concrete_mask`, common to all; no masked copy of a task vector is made.

    Returns:
      Parameters in the dtypes of the base, computed in float32 or wider.  Leaves that are not floating point are those
      of the base.

    Raises:
      ValueError: There is no task vector, the trees differ, or ``lam`` has another length.
    """
    check_taus(base, taus)
    coefficients = _by_path("lam", _lam_tree(taus, lam), taus[0])
    masks = None if mask is None else _by_path("mask", mask, taus[0])
    vectors = [dict(entries(tau)) for tau in taus]
    merged: dict[str, jax.Array] = {}
    for name, x in entries(base):
        if not is_array(vectors[0].get(name)):
            continue
        total = weighted_sum([tau[name] for tau in vectors], coefficients[name])
        if masks is not None:
            total = total * rescale(masks[name].astype(total.dtype))
        merged[name] = (x.astype(total.dtype) + total).astype(x.dtype)

    def leaf(path, x):
        name = path_of(path)
        tau = vectors[0].get(name)
        return merged[tau.owner if isinstance(tau, Tied) else name] if tau is not None else x

    return jax.tree_util.tree_map_with_path(leaf, base)


def average(models: Sequence[PyTree]) -> PyTree:
    """The mean of models, ``mean_t theta_t`` (arXiv 2203.05482).

    Args:
      models: Trees of one structure and the same shapes.

    Returns:
      Parameters in the dtypes of the first model, computed in float32 or wider.  Leaves that are not floating point
      are those of the first model.

    Raises:
      ValueError: There is no model, structures or shapes differ, or a value, where it is known, is not finite.
    """
    if not models:
        raise ValueError("models: expected at least one, got none")
    check_models(models[0], models)
    return jax.tree.map(lambda *leaves: mean_of(leaves) if is_float(leaves[0]) else leaves[0], *models)


def task_arithmetic(base: PyTree, finetuned: Sequence[PyTree], lam: Any = 0.3) -> PyTree:
    """Task arithmetic, ``base + sum_t lam_t (theta_t - base)`` (arXiv 2212.04089).

    Args:
      base: Parameters.
      finetuned: See :func:`task_vectors`.
      lam: See :func:`apply_task_vectors`.

    Returns:
      Parameters; see there, as for what is raised.
    """
    return apply_task_vectors(base, task_vectors(base, finetuned), lam)


def rescale(mask: jax.Array) -> jax.Array:
    """A mask over its mean, of any shape; a mask of zeros stays one."""
    return mask / jnp.maximum(jnp.mean(mask), np.asarray(1e-8, mask.dtype))


def weighted_sum(leaves: Sequence[jax.Array], weights: jax.Array) -> jax.Array:
    """``sum_t w_t x_t`` of leaves of one shape and weights ``[T]``, in float32 or wider."""
    dtype = wide(leaves[0])
    return sum(weights[t].astype(dtype) * x.astype(dtype) for t, x in enumerate(leaves))


def mean_of(leaves: Sequence[jax.Array]) -> jax.Array:
    """The mean of leaves of one shape, in the dtype of the first, computed in float32 or wider."""
    dtype = wide(leaves[0])
    return (sum(x.astype(dtype) for x in leaves) / np.asarray(len(leaves), dtype)).astype(leaves[0].dtype)


def wide(x: jax.Array) -> np.dtype:
    """The dtype in which a leaf is merged: float64 for float64, else float32."""
    return np.dtype(np.float64) if x.dtype == np.float64 else np.dtype(np.float32)


def is_float(x: Any) -> bool:
    """Whether a leaf takes part in a merge."""
    return jnp.issubdtype(x.dtype, jnp.floating)


def is_array(x: Any) -> bool:
    """Whether an entry of a task vector is an array: neither None nor tied."""
    return not (x is None or isinstance(x, Tied))


def entries(tree: PyTree) -> list[tuple[str, Any]]:
    """Paths and leaves of a tree; of a task vector also what stands for leaves that take no part."""
    flat = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: not is_array(x))
    return [(path_of(path), x) for path, x in flat]


def check_models(base: PyTree, models: Sequence[PyTree]) -> None:
    """Raises ValueError unless there are models like a base, and known values are finite."""
    if not models:
        raise ValueError("finetuned: expected at least one model, got none")
    for name, tree in (("base", base), *((f"model {i}", model) for i, model in enumerate(models))):
        check_alike("base", base, name, tree)
        for path, x in entries(tree):
            if is_float(x) and not isinstance(x, jax.core.Tracer) and getattr(x, "is_fully_addressable", True):
                bad = int(np.sum(~np.isfinite(np.asarray(x))))
                if bad:
                    raise ValueError(f"{name} {path}: expected finite numbers, got {bad} that are not")


def check_taus(base: PyTree, taus: Sequence[PyTree]) -> None:
    """Raises ValueError unless there are task vectors, all like a base."""
    if not taus:
        raise ValueError("taus: expected at least one task vector, got none")
    for i, tau in enumerate(taus):
        check_alike("base", base, f"task vector {i}", tau)


def check_alike(first: str, one: PyTree, second: str, other: PyTree) -> None:
    """Raises ValueError where two trees have other paths or shapes, naming those that differ."""
    left, right = dict(entries(one)), dict(entries(other))
    if only := sorted(left.keys() ^ right.keys()):
        raise ValueError(f"{first}, {second}: expected the same leaves, only one of them has {_some(only)}")
    pairs = {path: (x, right[path]) for path, x in left.items() if is_array(x) and is_array(right[path])}
    wrong = [f"{path} is {x.shape} and {y.shape}" for path, (x, y) in pairs.items() if x.shape != y.shape]
    if wrong:
        raise ValueError(f"{first}, {second}: expected leaves of one shape, {_some(wrong)}")


def _some(texts: list[str]) -> str:
    return ", ".join(texts[:8]) + (f" and {len(texts) - 8} more" if len(texts) > 8 else "")


def _lam_tree(taus: Sequence[PyTree], lam: Any) -> PyTree:
    """The coefficients as a tree, ``[T]`` for each leaf."""
    count = len(taus)

    def checked(where: str, x: Any) -> jax.Array:
        x = jnp.asarray(x)
        if x.shape not in ((), (count,)):
            raise ValueError(
                f"lam: expected a number or [{count}], one for each task vector{where}, got shape {x.shape}"
            )
        return jnp.broadcast_to(x, (count,))

    if jax.tree_util.all_leaves([lam]):
        same = checked("", lam)
        return jax.tree.map(lambda _: same, taus[0])
    return jax.tree_util.tree_map_with_path(lambda path, x: checked(f", in {path_of(path)}", x), lam)


def _by_path(name: str, tree: PyTree, tau: PyTree) -> dict[str, jax.Array]:
    """The leaves of a tree that has one for each leaf of a task vector, by path."""
    found = {path: x for path, x in entries(tree) if is_array(x)}
    expected = {path for path, x in entries(tau) if is_array(x)}
    if only := sorted(found.keys() ^ expected):
        raise ValueError(f"{name}: expected the leaves of a task vector, only one of both has {_some(only)}")
    return found
