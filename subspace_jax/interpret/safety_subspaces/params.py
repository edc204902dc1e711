"""Fine-tuned parameters, projected on the directions in which another update moved the model (arXiv 2505.14185)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from subspace_jax.interpret.safety_subspaces.projection import (
    Basis,
    Method,
    Side,
    UpdateModes,
    check_choice,
    check_update,
    columns,
    directions,
    from_columns,
    num_directions,
    part,
    update_modes,
)

PyTree = Any


class ProjectionMetrics(NamedTuple):
    """How much of an update a projection keeps, over all leaves together.

    Attributes:
      energy_kept: Squared norm of what is added over that of the update.
      cos_task_proj: Cosine of the update and what is added.
      cos_task_align: Cosine of the update and the reference update.
      removed_by_module: Squared norm of what is left out, by the first part of the path.
    """

    energy_kept: jax.Array
    cos_task_proj: jax.Array
    cos_task_align: jax.Array
    removed_by_module: dict[str, jax.Array]


class LeafSums(NamedTuple):
    """Sums over a leaf: ``<u, u>``, ``<v, v>``, ``<u, v>``, and the energy of ``u`` in the directions that are used."""

    uu: jax.Array
    vv: jax.Array
    uv: jax.Array
    parallel: jax.Array


class LeafModes(NamedTuple):
    """A leaf: the aligned one, its update as columns, its sums, and the update in directions of the reference."""

    aligned: jax.Array
    u: jax.Array
    sums: LeafSums
    modes: UpdateModes


class TaskModes(NamedTuple):
    """An update in directions of a reference update, leaf by leaf: one SVD serves all fractions and methods.

    Attributes:
      finetuned: The fine-tuned parameters.
      leaves: Path to leaf, floating-point ones only.
      side: Whose space the directions are of.
    """

    finetuned: PyTree
    leaves: dict[str, LeafModes]
    side: Side

    def metrics(self, frac: float, method: Method) -> ProjectionMetrics:
        """The metrics of a projection, without making it."""
        check_choice("method", method, Method)
        sums = {}
        for path, leaf in self.leaves.items():
            k = num_directions(frac, leaf.modes.q.shape[1])
            sums[path] = leaf.sums._replace(parallel=leaf.modes.energies[k - 1])
        return metrics_of(sums, method)

    def project(self, frac: float, method: Method) -> tuple[PyTree, ProjectionMetrics]:
        """The projected parameters and their metrics; see :func:`project_params`."""
        found = self.metrics(frac, method)

        def of_leaf(path, finetuned):
            if (leaf := self.leaves.get(path_name(path))) is None:
                return finetuned
            k = num_directions(frac, leaf.modes.q.shape[1])
            moved = part(leaf.u, leaf.modes.q[:, :k], leaf.modes.coefficients[:k], method)
            moved = from_columns(moved, finetuned.shape, self.side)
            return (leaf.aligned.astype(moved.dtype) + moved).astype(finetuned.dtype)

        return jax.tree_util.tree_map_with_path(of_leaf, self.finetuned), found


class SweepRow(NamedTuple):
    """A row of a sweep; ``scores`` are those of ``evaluate_fn``."""

    method: Method
    frac: float
    metrics: ProjectionMetrics
    scores: Mapping[str, Any]


def project_params(
    base: PyTree,
    aligned: PyTree,
    finetuned: PyTree,
    frac: float,
    method: Method,
    **options: Any,
) -> tuple[PyTree, ProjectionMetrics]:
    """Keeps the part of fine-tuning that is in the directions of alignment, or the rest of it.

    With ``v = aligned - base`` and ``u = finetuned - aligned``, each leaf is ``aligned + project_update(u, v, ...)``;
    see :func:`project_update`.

    Args:
      base: Parameters before alignment, or any other reference.
      aligned: The same tree after it.
      finetuned: The same tree after fine-tuning, which began at ``aligned``.
      frac: Fraction of the directions, in (0, 1].
      method: "same", "orth" or "opp".
      **options: ``basis``, ``key``, ``side`` and ``groups`` of :func:`task_modes`.

    Returns:
      Parameters in the dtypes of ``finetuned``, computed in float32 or wider, and the metrics.  Leaves that are not
      floating point are those of ``finetuned``.

    Raises:
      ValueError: The trees or shapes differ, a leaf is empty or, where its values are known, not finite; other
        arguments: see :func:`project_update`.
    """
    return task_modes(base, aligned, finetuned, **options).project(frac, method)


def task_modes(
    base: PyTree,
    aligned: PyTree,
    finetuned: PyTree,
    *,
    basis: Basis = "top",
    key: jax.Array | None = None,
    side: Side = "output",
    groups: Callable[[str], str | None] | None = None,
) -> TaskModes:
    """Decomposes the reference update ``aligned - base``, for projections of ``finetuned - aligned``.

    Args:
      base: See :func:`project_params`.
      aligned: See :func:`project_params`.
      finetuned: See :func:`project_params`.
      basis: "top"; or a control, "random" or "random_k", see :func:`project_update`.
      key: Key of the controls; each leaf or group has its own of it.
      side: Whose space the directions are of, "output" or "input", for kernels ``[in, out]``.
      groups: Returns the name of a group for a path such as ``"layers/0/q/kernel"``, or None.  Leaves of a group, whose
        spaces must be of one dimension, share the directions of their updates side by side.

    Returns:
      The modes: beside the update, ``[d, r]`` and ``[r, n]`` for each kernel with ``r = min(d, n)``.

    Raises:
      ValueError: See :func:`project_params`; or a group has leaves of different dimensions.
    """
    check_choice("side", side, Side)
    rows, owners = {}, {}
    for path, before, start, end in _rows(base, aligned, finetuned):
        start, end, before = (columns(x, side) for x in (start, end, before))
        rows[path] = end - start, start - before
        owner = groups(path) if groups else None
        owners.setdefault(("leaf", path) if owner is None else ("group", owner), []).append(path)
    found = {}
    for i, (name, paths) in enumerate(owners.items()):
        sizes = {path: rows[path][1].shape[0] for path in paths}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"groups: expected leaves of one dimension on the side {side} in {name[1]!r}, got {sizes}")
        together = [rows[path][1] for path in paths]
        own = None if key is None else jax.random.fold_in(key, i)
        q = directions(jnp.concatenate(together, axis=1) if len(paths) > 1 else together[0], basis, own)
        found |= dict.fromkeys(paths, q)
    starts = dict(_paths(aligned))
    leaves = {path: leaf_modes(starts[path], u, v, found[path]) for path, (u, v) in rows.items()}
    return TaskModes(finetuned, leaves, side)


def sweep(
    modes: TaskModes,
    fracs: Sequence[float] = (0.01, 0.25, 0.5, 0.75, 0.99),
    methods: Sequence[Method] = ("same", "orth"),
    evaluate_fn: Callable[[PyTree], Mapping[str, Any]] | None = None,
) -> tuple[SweepRow, ...]:
    """Projects by every method at every fraction, with one SVD for all.

    Args:
      modes: Of :func:`task_modes`.
      fracs: Fractions, those of the paper by default.
      methods: Methods.
      evaluate_fn: Returns scores of projected parameters; without it none are made, and only energies and cosines are
        measured.

    Returns:
      A row for each pair, method by method.

    Raises:
      ValueError: A fraction or method is none.
    """
    for frac in fracs:
        num_directions(frac, 1)
    rows = []
    for method in methods:
        for frac in fracs:
            if evaluate_fn is None:
                rows.append(SweepRow(method, frac, modes.metrics(frac, method), {}))
            else:
                params, found = modes.project(frac, method)
                rows.append(SweepRow(method, frac, found, evaluate_fn(params)))
    return tuple(rows)


def leaf_modes(aligned: jax.Array, u: jax.Array, v: jax.Array, q: jax.Array) -> LeafModes:
    """The modes of a leaf, from updates as :func:`columns` and the directions that are used."""
    modes = update_modes(u, q)
    sums = LeafSums(jnp.sum(u * u), jnp.sum(v * v), jnp.sum(u * v), modes.energies[-1])
    return LeafModes(aligned, u, sums, modes)


def metrics_of(sums: Mapping[str, LeafSums], method: Method) -> ProjectionMetrics:
    """The metrics of a projection, from sums of its leaves by path."""
    removed: dict[str, Any] = {}
    for path, leaf in sums.items():
        module, rest = path.split("/")[0], jnp.maximum(leaf.uu - leaf.parallel, 0)
        lost = {"same": rest, "orth": leaf.parallel, "opp": rest + 4 * leaf.parallel}[method]
        removed[module] = removed.get(module, 0) + lost
    uu, vv, uv, parallel = (sum(x) for x in zip(*sums.values(), strict=True))
    kept = jnp.maximum(uu - parallel, 0) if method == "orth" else parallel
    sign = -1 if method == "opp" else 1
    return ProjectionMetrics(
        kept / (uu + 1e-12),
        sign * kept / (jnp.sqrt(uu) * jnp.sqrt(kept) + 1e-12),
        uv / (jnp.sqrt(uu) * jnp.sqrt(vv) + 1e-12),
        removed,
    )


def path_name(path: tuple) -> str:
    """The path of a leaf, as in ``"layers/0/kernel"``."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def check_same_trees(**trees: PyTree) -> None:
    """Raises ValueError where trees have other paths or shapes than the first of them, naming the first difference."""
    (first, one), *others = ((name, dict(_paths(tree))) for name, tree in trees.items())
    for name, other in others:
        if only := [*(one.keys() - other.keys()), *(other.keys() - one.keys())]:
            raise ValueError(f"{first}, {name}: expected trees with the same leaves, only one of them has {min(only)}")
        for path, x in one.items():
            if x.shape != other[path].shape:
                shapes = f"{x.shape} and {other[path].shape}"
                raise ValueError(f"{first}, {name}: expected leaves of one shape, {path} is {shapes}")


def _paths(tree: PyTree) -> list[tuple[str, jax.Array]]:
    return [(path_name(path), x) for path, x in jax.tree_util.tree_leaves_with_path(tree)]


def _rows(base: PyTree, aligned: PyTree, finetuned: PyTree):
    """Returns path and the three leaves, of those that are floating point."""
    check_same_trees(base=base, aligned=aligned, finetuned=finetuned)
    trees = {"base": dict(_paths(base)), "aligned": dict(_paths(aligned)), "finetuned": dict(_paths(finetuned))}
    rows = []
    for path, end in trees["finetuned"].items():
        if not jnp.issubdtype(end.dtype, jnp.floating):
            continue
        for name, leaves in trees.items():
            check_update(f"{name} {path}", leaves[path])
        rows.append((path, trees["base"][path], trees["aligned"][path], end))
    if not rows:
        raise ValueError("finetuned: expected leaves of floating point, got none")
    return rows
