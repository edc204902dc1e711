"""Which leaves of a tree are projected and how, and leaves as stacks of matrices.

A leaf is a stack of matrices ``[..., m, n]``.  Its basis is ``[..., m, r]`` on the left and ``[..., n, r]`` on the
right, in the working dtype, with the sharding that the axes ``m``, ``n`` and ``...`` have in the parameters.
"""

import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from subspace_jax import linalg
from subspace_jax.optim import _checks
from subspace_jax.optim._arrays import automatic
from subspace_jax.optim._basis import Basis
from subspace_jax.optim.projected.options import DimensionNumbers, ProjectionOptions, RankRule

PyTree = Any

_DEFAULT = DimensionNumbers(reduction_axis=-2, output_axis=-1)


class LeafPlan(NamedTuple):
    """How one leaf is projected: everything static.

    Attributes:
      index: Number of the leaf.
      name: Its path.
      rank: Columns of a basis.
      side: "left", "right" or "full".
      axes: Batch axes, then those of rows, then those of columns.
      shape: Shape as a stack of matrices ``[..., m, n]``.
      turns: For each slice along the first batch axis the step within ``refresh_every`` at which it is refreshed.
    """

    index: int
    name: str
    rank: int
    side: str
    axes: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    shape: tuple[int, ...]
    turns: tuple[int, ...] = (0,)

    @property
    def low_shape(self) -> tuple[int, ...]:
        """Shape of the projected gradient."""
        *batch, m, n = self.shape
        return (*batch, self.rank if self.side != "right" else m, self.rank if self.side != "left" else n)


def plans_for(tree: PyTree, rank: int | RankRule, options: ProjectionOptions) -> tuple[list[LeafPlan | None], Any]:
    """Plans for all leaves, None for those that aren't projected, and the structure of the tree.

    Raises:
      TypeError: The rule of ranks returns no Python integer.
      ValueError: It returns an integer below 1, or the dimension numbers of a leaf don't fit its shape.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    known = _dimension_numbers(options.weight_dimension_numbers, tree)
    plans = []
    for i, (path, x) in enumerate(leaves):
        name, shape = _checks.path_name(path), jnp.shape(x)
        wanted = _rank_of(rank, name, x)
        if wanted is None:
            plans.append(None)
            continue
        axes = _split_axes(name, shape, known.get(path, _DEFAULT) if isinstance(known, dict) else known)
        m, n = (math.prod(shape[a] for a in group) for group in axes[1:])
        std, reverse_std = ("right", "left") if m >= n else ("left", "right")
        side = {"std": std, "reverse_std": reverse_std}.get(options.side, options.side)
        plans.append(LeafPlan(i, name, min(wanted, m, n), side, axes, (*(shape[a] for a in axes[0]), m, n)))
    return _with_turns(plans, options), structure


def _rank_of(rank, name, x) -> int | None:
    shape, floating = jnp.shape(x), jnp.issubdtype(jnp.result_type(x), jnp.floating)
    fits = len(shape) >= 2 and floating
    wanted = rank(name, shape) if callable(rank) else rank if fits else None
    # A leaf without entries has no subspace.
    if wanted is None or math.prod(shape) == 0:
        return None
    wanted = _checks.static_int(f"rank of {name or 'the leaf'}" if callable(rank) else "rank", wanted, 1)
    if not fits:
        raise ValueError(
            f"{name or 'params'}: expected a floating-point kernel [..., m, n] where the rule gives a rank, got "
            f"{jnp.result_type(x)} of shape {shape}; return None for it"
        )
    return wanted


def _dimension_numbers(given, tree):
    """One for all leaves, or a dict by path."""
    given = given(tree) if callable(given) else given
    if given is None or isinstance(given, DimensionNumbers):
        return _DEFAULT if given is None else given
    # By path: optax.masked and optax.partition remove leaves from a tree, but not from the one given.
    return dict(jax.tree_util.tree_leaves_with_path(given, is_leaf=lambda x: isinstance(x, DimensionNumbers)))


def _split_axes(name, shape, numbers):
    """Batch axes, axes of rows, axes of columns."""
    rows, columns = ((axes,) if isinstance(axes, int) else tuple(axes) for axes in numbers)
    both = [a % len(shape) for a in (*rows, *columns)]
    inside = all(-len(shape) <= a < len(shape) for a in (*rows, *columns))
    if not rows or not columns or not inside or len(set(both)) != len(both):
        raise ValueError(
            f"weight_dimension_numbers: expected different reduction and output axes of {name or 'params'}, of shape "
            f"{shape}, got {numbers}"
        )
    return tuple(a for a in range(len(shape)) if a not in both), tuple(both[: len(rows)]), tuple(both[len(rows) :])


def _with_turns(plans, options):
    """Slices of all leaves together are spread evenly over the steps between two refreshes.

    Stacked layers are one leaf, and would all be refreshed in the same step otherwise.
    """
    sizes = [0 if plan is None else plan.shape[0] if len(plan.shape) > 2 else 1 for plan in plans]
    total, ends = sum(sizes), itertools.accumulate(sizes)
    turns = [
        tuple(i * options.refresh_every // total if options.staggered else 0 for i in range(end - size, end))
        for size, end in zip(sizes, ends, strict=True)
    ]
    return [plan and plan._replace(turns=own) for plan, own in zip(plans, turns, strict=True)]


def to_matrices(plan: LeafPlan, x: jax.Array) -> jax.Array:
    """The leaf as ``[..., m, n]``."""
    order = sum(plan.axes, ())
    return (x if order == tuple(range(x.ndim)) else x.transpose(order)).reshape(plan.shape)


def from_matrices(plan: LeafPlan, x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of :func:`to_matrices`."""
    order = sum(plan.axes, ())
    x = x.reshape(tuple(shape[a] for a in order))
    return x if order == tuple(range(x.ndim)) else x.transpose(sorted(range(x.ndim), key=order.__getitem__))


def matrix_specs(plan: LeafPlan, x: jax.Array) -> tuple[Basis, P]:
    """PartitionSpecs of the bases and of the projected gradient, from those of the leaf."""
    spec = [*jax.typeof(x).sharding.spec]
    spec += [None] * (x.ndim - len(spec))
    batch = [spec[a] for a in plan.axes[0]]
    # Of merged axes only the first can be sharded without a shuffle.
    rows, columns = (spec[group[0]] if all(spec[a] is None for a in group[1:]) else None for group in plan.axes[1:])
    left = None if plan.side == "right" else P(*batch, rows, None)
    right = None if plan.side == "left" else P(*batch, columns, None)
    low = P(*batch, rows if plan.side == "right" else None, columns if plan.side == "left" else None)
    return Basis(left, right), low


def zero_state(plan: LeafPlan, x: jax.Array) -> tuple[Basis, jax.Array]:
    """A basis and a projected gradient of zeros for a leaf, with its sharding."""
    dtype = linalg.working_dtype(x)
    *batch, m, n = plan.shape

    def zeros(x):
        x = to_matrices(plan, x)

        def like(x, axes, shape):
            # Through the leaf itself, so that its sharding is inherited.
            return jnp.zeros_like(jnp.broadcast_to(jnp.max(x, axis=axes, keepdims=True), shape), dtype)

        left = None if plan.side == "right" else like(x, -1, (*batch, m, plan.rank))
        right = None if plan.side == "left" else like(x.mT, -1, (*batch, n, plan.rank))
        reduced = {"left": (-2,), "right": (-1,), "full": (-2, -1)}[plan.side]
        return Basis(left, right), like(x, reduced, plan.low_shape)

    return automatic(zeros, (x,), lambda: matrix_specs(plan, x))


def zero_per_matrix(plan: LeafPlan, x: jax.Array) -> jax.Array:
    """One zero for each matrix of a leaf, with the sharding of the batch axes."""

    def zeros(x):
        return jnp.zeros_like(jnp.max(to_matrices(plan, x), axis=(-2, -1)), linalg.working_dtype(x))

    return automatic(zeros, (x,), lambda: P(*matrix_specs(plan, x)[1][:-2]))
