"""What all transforms of projected gradients share: which leaves are projected and how, products, and new bases.

A leaf is a stack of matrices ``[..., m, n]``.  Its basis is ``[..., m, r]`` on the left and ``[..., n, r]`` on the
right, in the working dtype, with the sharding that the axes ``m``, ``n`` and ``...`` have in the parameters.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from subspace_jax import linalg
from subspace_jax.optim import _checks

PyTree = Any
RankRule = Callable[[str, tuple[int, ...]], int | None]

SIDES = ("left", "right", "std", "reverse_std", "full")
METHODS = ("svd", "randomized", "subspace_iteration", "random")

# Rounds of iteration that a basis without a past gets beside the usual ones.
_COLD_ROUNDS = 3


class MatrixAxes(NamedTuple):
    """Which axes of a parameter make up its rows and columns; all others are batch axes.

    Attributes:
      rows: Axes of the input side, merged in this order.
      columns: Axes of the output side.
    """

    rows: tuple[int, ...] = (-2,)
    columns: tuple[int, ...] = (-1,)


AxesRule = Callable[[str, tuple[int, ...]], MatrixAxes]


class Basis(NamedTuple):
    """Orthonormal columns for one leaf.

    Attributes:
      left: ``[..., m, r]``, None where the leaf isn't projected from the left.
      right: ``[..., n, r]``, None where it isn't projected from the right.
    """

    left: jax.Array | None = None
    right: jax.Array | None = None


def bases_of(sides: Basis) -> PyTree:
    """The basis of each leaf, from two trees of arrays as states have them."""
    return jax.tree.map(lambda *pair: Basis(*(x if x.ndim > 1 else None for x in pair)), *sides)


class LeafPlan(NamedTuple):
    """How one leaf is projected: everything static.

    Attributes:
      index: Number of the leaf.
      name: Its path.
      rank: Columns of a basis.
      side: "left", "right" or "full".
      axes: Batch axes, then those of rows, then those of columns.
      shape: Shape as a stack of matrices ``[..., m, n]``.
    """

    index: int
    name: str
    rank: int
    side: str
    axes: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    shape: tuple[int, ...]

    @property
    def low_shape(self) -> tuple[int, ...]:
        """Shape of the projected gradient."""
        *batch, m, n = self.shape
        return (*batch, self.rank if self.side != "right" else m, self.rank if self.side != "left" else n)


def check_rank(rank: int | RankRule, name: str = "rank") -> None:
    """Raises unless ``rank`` is a rule or a positive Python integer."""
    if not callable(rank):
        _checks.static_int(name, rank, 1)


def plans_for(
    tree: PyTree, rank: int | RankRule, side: str, axes: AxesRule | None = None
) -> tuple[list[LeafPlan | None], Any]:
    """Plans for all leaves, None for those that aren't projected, and the structure of the tree.

    Raises:
      TypeError: The rule of ranks returns no Python integer.
      ValueError: It returns a number below 1, or the axes of a leaf are no rows and columns.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    plans = []
    for i, (path, x) in enumerate(leaves):
        name, shape = _checks.path_name(path), jnp.shape(x)
        floating = jnp.issubdtype(jnp.result_type(x), jnp.floating)
        wanted = rank
        if callable(rank):
            wanted = rank(name, shape)
        elif len(shape) < 2 or not floating:
            wanted = None
        # A leaf without entries has no subspace.
        if wanted is None or math.prod(shape) == 0:
            plans.append(None)
            continue
        label = f"rank of {name or 'the leaf'}" if callable(rank) else "rank"
        wanted = _checks.static_int(label, wanted, 1)
        if len(shape) < 2 or not floating:
            raise ValueError(
                f"{name or 'params'}: expected a floating-point kernel [..., m, n] where the rule gives a rank, got "
                f"{jnp.result_type(x)} of shape {shape}; return None for it"
            )
        split = _split_axes(name, shape, MatrixAxes() if axes is None else axes(name, shape))
        m, n = (math.prod(shape[a] for a in group) for group in split[1:])
        chosen = {"std": "right" if m >= n else "left", "reverse_std": "left" if m >= n else "right"}.get(side, side)
        matrix = (*(shape[a] for a in split[0]), m, n)
        plans.append(LeafPlan(i, name, min(wanted, m, n), chosen, split, matrix))
    return plans, structure


def _split_axes(name, shape, axes):
    rows, columns = (tuple(a % len(shape) for a in group) for group in axes)
    if not rows or not columns or len({*rows, *columns}) != len(rows) + len(columns):
        raise ValueError(f"{name}: expected different axes for rows and columns of shape {shape}, got {axes}")
    return tuple(a for a in range(len(shape)) if a not in (*rows, *columns)), rows, columns


def turns_of(plans: list[LeafPlan | None], refresh_every: int, staggered: bool) -> list[tuple[int, ...]]:
    """For each leaf the steps of a period in which its slices along the first batch axis are renewed, ascending.

    Slices of all leaves together are spread evenly over the period.  Stacked layers are one leaf, and as one they
    would all be renewed in the same step.
    """
    sizes = [0 if plan is None else plan.shape[0] if len(plan.shape) > 2 else 1 for plan in plans]
    total, ends = sum(sizes), itertools.accumulate(sizes)
    return [
        tuple(i * refresh_every // total if staggered else 0 for i in range(end - size, end))
        for size, end in zip(sizes, ends, strict=True)
    ]


def renew(
    refresh: Callable,
    turns: tuple[int, ...],
    refresh_every: int,
    count: jax.Array,
    key: jax.Array,
    x: PyTree,
    old: PyTree,
) -> PyTree:
    """``refresh(key, x, old)`` for the slices whose turn it is, ``old`` for all others; the first step renews all.

    Args:
      refresh: Returns a tree like ``old``; works for a whole leaf and for a slice of it.
      turns: Of :func:`turns_of`.
      refresh_every: Steps of a period.
      count: Steps taken.
      key: Random key of the leaf at this step.
      x: What a refresh reads: arrays with the batch axes in front.
      old: What it renews, likewise.
    """
    phase = count % refresh_every
    if len(set(turns)) == 1:
        return jax.lax.cond((count == 0) | (phase == turns[0]), lambda: refresh(key, x, old), lambda: old)
    # Those whose turn it is are neighbours.  A loop of as many rounds computes no other, in the memory of one.
    at = np.asarray(turns, np.int32)
    first = jnp.where(count == 0, 0, jnp.sum(at < phase))
    last = jnp.where(count == 0, len(turns), jnp.sum(at <= phase))

    def one(i, new):
        return _put(new, refresh(jax.random.fold_in(key, i), *_at((x, new), i)), i)

    return jax.lax.fori_loop(first, last, one, old)


def slice_by_slice(step: Callable, x: PyTree, old: PyTree) -> PyTree:
    """``step(i, x, old)`` for the slices along the first batch axis, in the place of ``old`` and the memory of one."""

    def one(i, new):
        return _put(new, step(i, *_at((x, new), i)), i)

    return jax.lax.fori_loop(0, jax.tree.leaves(old)[0].shape[0], one, old)


def _at(tree, i):
    return jax.tree.map(lambda y: jax.lax.dynamic_index_in_dim(y, i, keepdims=False), tree)


def _put(tree, part, i):
    return jax.tree.map(lambda y, z: jax.lax.dynamic_update_index_in_dim(y, z, i, 0), tree, part)


def to_matrices(plan: LeafPlan, x: jax.Array) -> jax.Array:
    """The leaf as ``[..., m, n]``."""
    order = sum(plan.axes, ())
    return (x if order == tuple(range(x.ndim)) else x.transpose(order)).reshape(plan.shape)


def from_matrices(plan: LeafPlan, x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of :func:`to_matrices`."""
    order = sum(plan.axes, ())
    x = x.reshape(tuple(shape[a] for a in order))
    return x if order == tuple(range(x.ndim)) else x.transpose(sorted(range(x.ndim), key=order.__getitem__))


def product(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """A product in bfloat16 where the gradient is, accumulated in float32, and in full precision otherwise."""
    if jnp.bfloat16 in (x.dtype, y.dtype):
        x, y = x.astype(jnp.bfloat16), y.astype(jnp.bfloat16)
        return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)
    work = linalg.working_dtype(x, y)
    return jnp.einsum(equation, x.astype(work), y.astype(work), precision=jax.lax.Precision.HIGHEST)


def project(basis: Basis, g: jax.Array) -> jax.Array:
    """``P^T G``, ``G Q`` or ``P^T G Q``."""
    if basis.left is not None:
        g = product("...mr,...mn->...rn", basis.left, g)
    return g if basis.right is None else product("...mn,...nr->...mr", g, basis.right)


def back(basis: Basis, low: jax.Array) -> jax.Array:
    """``P N``, ``N Q^T`` or ``P N Q^T``."""
    if basis.left is not None:
        low = product("...mr,...rn->...mn", basis.left, low)
    return low if basis.right is None else product("...mr,...nr->...mn", low, basis.right)


def new_basis(
    plan: LeafPlan, g: jax.Array, basis: Basis, method: str, key: jax.Array, cold: jax.Array, rounds: int
) -> Basis:
    """A basis of the leading subspace of ``g [..., m, n]``, the leaf or a slice of it, ``cold`` without an old one."""
    # The state keeps its dtype, whatever the gradient's is.
    g = g.astype(linalg.working_dtype(g, *jax.tree.leaves(basis)))
    *batch, m, n = g.shape
    if method == "random":
        keys = jax.random.split(key)
        sizes = (m if plan.side != "right" else None, n if plan.side != "left" else None)
        return Basis(
            *(
                None if size is None else linalg.random_orthonormal(k, size, plan.rank, tuple(batch), g.dtype)
                for k, size in zip(keys, sizes, strict=True)
            )
        )
    if method == "subspace_iteration":
        down, up = functools.partial(linalg.across, g), functools.partial(linalg.times, g)
        if plan.side == "right":
            return Basis(right=_iterate(up, down, basis.right, key, cold, rounds))
        left = _iterate(down, up, basis.left, key, cold, rounds)
        return Basis(left, linalg.orthonormal_columns(down(left)) if plan.side == "full" else None)
    if method == "svd":
        u, _, vt = linalg.canonical_svd(g)
    else:
        u, _, vt = linalg.randomized_svd(key, g, plan.rank)
    left = None if plan.side == "right" else u[..., : plan.rank]
    return Basis(left, None if plan.side == "left" else vt[..., : plan.rank, :].mT)


def _iterate(there, back, start, key, cold, rounds):
    """Orthogonal iteration.  Positive QR turns columns towards singular vectors without a jump of order or sign."""

    def turn(_, basis):
        return linalg.orthonormal_columns(back(linalg.orthonormal_columns(there(basis))))

    basis = jax.lax.cond(cold, lambda: jax.random.normal(key, start.shape, start.dtype), lambda: start)
    return jax.lax.fori_loop(0, rounds + jnp.where(cold, _COLD_ROUNDS, 0), turn, basis)


def rotated(old: Basis, new: Basis, moment: jax.Array, *, second: bool) -> jax.Array:
    """A moment in the coordinates of a new basis; second moments by the squared cosines, so that they stay positive."""
    if old.left is not None:
        turn = linalg.gram(new.left, old.left)
        moment = linalg.times(jnp.square(turn) if second else turn, moment)
    if old.right is not None:
        turn = linalg.gram(old.right, new.right)
        moment = linalg.times(moment, jnp.square(turn) if second else turn)
    return moment


def leaf_key(seed: int, plan: LeafPlan, count: jax.Array) -> jax.Array:
    """The random key of a leaf at a step."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), plan.index), count)


def explicit_mesh() -> bool:
    """Whether the mesh in use has Explicit axes."""
    return AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types


def automatic(f: Callable, args: tuple, specs: Callable[[], PyTree]) -> PyTree:
    """Calls ``f(*args)``, with sharding left to the compiler where mesh axes are Explicit; results get ``specs()``."""
    return jax.sharding.auto_axes(f, out_sharding=specs())(*args) if explicit_mesh() else f(*args)


def spec_of(x: PyTree) -> PyTree:
    """PartitionSpecs of arrays, under Explicit axes."""
    return jax.tree.map(lambda x: jax.typeof(x).sharding.spec, x)


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


def absent(x: jax.Array) -> jax.Array:
    """What a tree of a state has for a leaf ``x`` of which it keeps nothing: ``[1]``, as in ``optax.adafactor``.

    So all trees have one array for each leaf, which ``flax.nnx.Optimizer`` and ``optax.tree.map_params`` expect.
    """
    return jnp.zeros(1, linalg.working_dtype(x))


def no_bases(structure: Any, leaves: list[jax.Array]) -> Basis:
    """Sides of a state in which no leaf has a basis."""
    return Basis(*(structure.unflatten([absent(x) for x in leaves]) for _ in range(2)))


def bases_in(sides: Basis, plans: list[LeafPlan | None], structure: Any) -> list[Basis]:
    """For each leaf the basis that the sides of a state hold."""
    pairs = zip(*map(structure.flatten_up_to, sides), strict=True)
    return [
        Basis()
        if plan is None
        else Basis(None if plan.side == "right" else left, None if plan.side == "left" else right)
        for plan, (left, right) in zip(plans, pairs, strict=True)
    ]


def put_bases(sides: Basis, bases: list[Basis], structure: Any) -> Basis:
    """The sides of a state with these bases."""
    olds = [structure.flatten_up_to(tree) for tree in sides]
    news = zip(*bases, strict=True) if bases else ([], [])
    return Basis(
        *(
            structure.unflatten([x if y is None else y for x, y in zip(old, new, strict=True)])
            for old, new in zip(olds, news, strict=True)
        )
    )


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
