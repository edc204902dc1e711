"""What all optimizers of low-rank factors share: which leaves are pairs, and one step for all pairs.

A pair is ``a [..., in, r]`` and ``b [..., r, out]`` of an update ``s a b``; leading axes are stacked layers.  A step
sees both factors tall, ``a`` and ``b^T``, so that what holds of one holds of the other.
"""

import functools
import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from subspace_jax import linalg
from subspace_jax.optim import _adam, _checks
from subspace_jax.optim._arrays import absent, automatic, spec_of

PyTree = Any
PairRule = Callable[[str], tuple[str, str] | None]
ScaleRule = Callable[[str], float | tuple[float, ...]]
Energies = Mapping[str, tuple[jax.Array, jax.Array]]

# Of float32, in which steps are computed.
_LARGEST = float(jnp.finfo(jnp.float32).max)

ROLES = ("a", "b", "row_energy", "column_energy")
_NAMES = {"lora_a": "a", "lora_b": "b"} | {role: role for role in ROLES}


class Pair(NamedTuple):
    """Where one pair is among the leaves of a tree.

    Attributes:
      name: Path of what both factors are in.
      a: Index of ``a``.
      b: Index of ``b``.
      probes: Indices of the energy probes of rows and of columns, None where there are none.
    """

    name: str
    a: int
    b: int
    probes: tuple[int, int] | None


class Factors(NamedTuple):
    """One pair as a step sees it, tall, in the working dtype.

    Attributes:
      a: ``[..., in, r]``.
      b: ``[..., out, r]``.
      grad_a: Gradient like ``a``.
      grad_b: Gradient like ``b``.
      scale: The scale s, ``[..., 1, 1]`` or a scalar.
      energies: Sums of squares of the weight's gradient, of rows ``[..., in]`` and of columns ``[..., out]``, or None.
    """

    a: jax.Array
    b: jax.Array
    grad_a: jax.Array
    grad_b: jax.Array
    scale: jax.Array
    energies: tuple[jax.Array, jax.Array] | None


def adapter_pairs(path: str) -> tuple[str, str] | None:
    """The usual rule: leaves called a and b, or lora_a and lora_b, under one parent, perhaps with energy probes."""
    parent, _, name = path.removesuffix("/value").rpartition("/")
    return (parent, _NAMES[name]) if name in _NAMES else None


def find_pairs(tree: PyTree, rule: PairRule) -> tuple[list[Pair], Any]:
    """The pairs of a tree that have entries, and its structure.

    Raises:
      TypeError: A factor is not of floating point, or another leaf is complex.
      ValueError: A factor has no partner, or two; the two don't fit together; there is none in a tree that has leaves.
    """
    _checks.check_real(tree)
    entries, structure = jax.tree_util.tree_flatten_with_path(tree)
    members: dict[str, dict[str, int]] = {}
    for i, (path, _) in enumerate(entries):
        path = _checks.path_name(path)
        match = rule(path)
        if match is None:
            continue
        name, role = match
        if role not in ROLES:
            raise ValueError(f"pairs: expected the rule to give one of {ROLES} for {path}, got {role!r}")
        if role in members.setdefault(name, {}):
            raise ValueError(f"params: two leaves are {role!r} of the pair {name!r}; the second is {path}")
        members[name][role] = i
    if entries and not members:
        some = [_checks.path_name(path) for path, _ in entries[:5]]
        raise ValueError(f"params: found no pairs of factors among {some}; name them by the argument pairs")
    pairs = []
    for name, at in members.items():
        for role in ("a", "b"):
            if role not in at:
                beside = ", ".join(sorted(at))
                raise ValueError(f"params: {name or 'the tree'} has no factor {role!r}, the partner of {beside}")
        if ("row_energy" in at) != ("column_energy" in at):
            raise ValueError(f"params: {name or 'the tree'} has one energy probe, expected both or none")
        pair = Pair(name, at["a"], at["b"], (at["row_energy"], at["column_energy"]) if "row_energy" in at else None)
        _check_shapes(pair, [x for _, x in entries])
        # A weight without entries has nothing to train.
        if all(math.prod(jnp.shape(entries[i][1])) for i in (pair.a, pair.b)):
            pairs.append(pair)
    return pairs, structure


def _check_shapes(pair, leaves):
    a, b = (jnp.shape(leaves[i]) for i in (pair.a, pair.b))
    label = pair.name or "the pair"
    for role, i in (("a", pair.a), ("b", pair.b)):
        if not jnp.issubdtype(jnp.result_type(leaves[i]), jnp.floating):
            raise TypeError(f"{label}: expected a floating-point factor {role}, got {jnp.result_type(leaves[i])}")
    if len(a) < 2 or len(b) != len(a) or a[:-2] != b[:-2] or a[-1] != b[-2]:
        raise ValueError(f"{label}: expected factors a [..., in, r] and b [..., r, out], got {a} and {b}")
    if a[-1] < 1:
        raise ValueError(f"{label}: expected a rank of at least 1, got factors {a} and {b}")
    if pair.probes is not None:
        _check_energies(label, a, b, *(leaves[i] for i in pair.probes))


def _check_energies(label, a, b, rows, columns):
    wanted, got = (a[:-1], (*b[:-2], b[-1])), (jnp.shape(rows), jnp.shape(columns))
    if got != wanted:
        raise ValueError(f"{label}: expected energies {wanted} for factors {a} and {b}, got {got}")


def on_factors(
    kind: type,
    start: Callable[[jax.Array, jax.Array], tuple],
    step: Callable[[jax.Array, list[Factors], list[tuple]], tuple[list[tuple], list[tuple]]],
    *,
    pairs: PairRule | None,
    fallback: optax.GradientTransformation | None,
    scale: ArrayLike | tuple[float, ...] | ScaleRule = 1.0,
    with_energies: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """A transform of pairs, and another one for all other leaves.

    Args:
      kind: State, a NamedTuple of ``count``, trees like the parameters, and ``fallback``.
      start: ``start(a, b)``, of factors in the working dtype of the pair, returns the initial entries of each tree at
        ``a`` and at ``b``, None for nothing.  At ``b``, arrays with as many axes as ``b`` are kept transposed, like
        ``b`` itself, so that they are sharded alike.
      step: ``step(t, factors, slots) -> directions, slots`` for all pairs at step t, from 1; slots are as of ``start``,
        and tall.
      pairs: Rule ``pairs(path)`` that gives the name of the pair and the role of a leaf, None for other leaves.
      fallback: For other leaves; Adam by default.
      scale: Scale of the update, a number, a tuple over stacked layers, or a rule of the pair's name.
      with_energies: Whether each pair must have energies.

    Returns:
      The transform.
    """
    rule = adapter_pairs if pairs is None else pairs
    fallback = _adam.scale_by_plain_adam(0.9, 0.999, 1e-8) if fallback is None else fallback
    _checks.check_transform("fallback", fallback)
    _checks.check_rule("pairs", pairs)
    fallback = optax.with_extra_args_support(fallback)
    check_scale(scale)

    @functools.cache
    def used():
        # A tree of which no factor keeps anything is None in the state.
        return [bool(jax.tree.leaves(slots)) for slots in jax.eval_shape(start, *(jnp.zeros((1, 1)),) * 2)]

    def trees(structure, columns):
        return [structure.unflatten(column) if keep else None for column, keep in zip(columns, used(), strict=True)]

    def init(params):
        found, structure = find_pairs(params, rule)
        leaves = jax.tree.leaves(params)
        columns = [[absent(x) for x in leaves] for _ in used()]
        for pair in found:
            factors = [leaves[i] for i in (pair.a, pair.b)]
            dtype = linalg.working_dtype(*factors)
            made = start(*(x.astype(dtype) for x in factors))
            for column, slots in zip(columns, made, strict=True):
                for i, slot in zip((pair.a, pair.b), slots, strict=True):
                    column[i] = column[i] if slot is None else slot
        rest = fallback.init(_others(found, leaves, structure))
        return kind(jnp.zeros((), jnp.int32), *trees(structure, columns), rest)

    def run(found, count, seen):
        factors, olds = [], []
        for pair, (w, g, slots, both) in zip(found, seen, strict=True):
            dtype = linalg.working_dtype(*w)
            a, b, ga, gb = (x.astype(dtype) for x in (*w, *g))
            s = scale_of(scale, pair.name, a.shape[:-2], dtype)
            both = None if both is None else tuple(e.astype(dtype) for e in both)
            factors.append(Factors(a, b.mT, ga, gb.mT, s, both))
            olds.append(tuple((x, _transposed(y, b.ndim)) for x, y in slots))
        directions, news = step(count, factors, olds)
        made = []
        for (_, g, *_), (da, db), slots in zip(seen, directions, news, strict=True):
            updates = [da.astype(g[0].dtype), db.mT.astype(g[1].dtype)]
            made.append((updates, [(x, _transposed(y, g[1].ndim)) for x, y in slots]))
        return made

    def update(updates, state, params=None, *, energies: Energies | None = None, **extra_args):
        _checks.require_params(params, "the current factors, from which a step is computed")
        found, structure = find_pairs(updates, rule)
        leaves, weights = jax.tree.leaves(updates), structure.flatten_up_to(params)
        columns = [
            structure.flatten_up_to(tree) if keep else [None] * len(leaves)
            for tree, keep in zip(state[1:-1], used(), strict=True)
        ]
        seen = []
        for pair in found:
            ends = pair.a, pair.b
            both = _energies(pair, leaves, energies, [jnp.shape(weights[i]) for i in ends]) if with_energies else None
            slots = [(column[pair.a], column[pair.b]) for column in columns]
            seen.append(([weights[i] for i in ends], [leaves[i] for i in ends], slots, both))
        count = optax.safe_increment(state.count)
        specs = lambda: [(spec_of(g), spec_of(slots)) for _, g, slots, _ in seen]  # noqa: E731
        made = automatic(functools.partial(run, found), (count, seen), specs) if found else []
        known = _others(found, weights, structure)
        rest, after = fallback.update(_others(found, leaves, structure), state.fallback, known, **extra_args)
        out = [
            x if isinstance(x, optax.MaskedNode) else x.astype(g.dtype)
            for x, g in zip(structure.flatten_up_to(rest), leaves, strict=True)
        ]
        for pair, (directions, slots) in zip(found, made, strict=True):
            out[pair.a], out[pair.b] = directions
            for i in pair.probes or ():
                out[i] = jnp.zeros_like(leaves[i])
            for column, (at_a, at_b) in zip(columns, slots, strict=True):
                column[pair.a], column[pair.b] = at_a, at_b
        return structure.unflatten(out), kind(count, *trees(structure, columns), after)

    return optax.GradientTransformationExtraArgs(init, update)


def _others(found, leaves, structure):
    """The leaves that are no factors, with holes for the others."""
    ours = {i for pair in found for i in (pair.a, pair.b, *(pair.probes or ()))}
    return structure.unflatten([optax.MaskedNode() if i in ours else x for i, x in enumerate(leaves)])


def _transposed(x, axes):
    return x.mT if x is not None and x.ndim == axes else x


def _energies(pair, leaves, given, shapes):
    label = pair.name or "the pair"
    if given is not None and pair.name in given:
        rows, columns = given[pair.name]
        _check_energies(label, *shapes, rows, columns)
        return rows, columns
    if pair.probes is None:
        raise ValueError(
            f"energies: {label} has none, which the statistic 'full' needs; expected energy probes beside its "
            f"factors (adapters.add_gradient_probes), or energies[{pair.name!r}] as an argument of update; the "
            f"statistics 'sum' and 'projected' need none"
        )
    return tuple(leaves[i] for i in pair.probes)


def zeros(x: jax.Array, axis: int | None = None) -> jax.Array:
    """Zeros like ``x``, in the working dtype and with its sharding; without an axis, if one is given."""
    return jnp.zeros_like(x if axis is None else jnp.max(x, axis=axis), linalg.working_dtype(x))


def inverse(m: jax.Array) -> jax.Array:
    """The inverse of symmetric positive definite ``m [..., r, r]``, by its Cholesky factor.

    Of r columns, so that what is long is only multiplied: triangular solves of wide matrices are slow on accelerators.
    """
    return linalg.of_each(_inverse, m)


def _inverse(m):
    factor = jnp.linalg.cholesky(m)
    half = jax.lax.linalg.triangular_solve(factor, linalg.eye_like(m), left_side=True, lower=True)
    return linalg.gram(half, half)


def damped_inverse(m: jax.Array, ridge: jax.Array) -> jax.Array:
    """The inverse of ``m + ridge I`` for a Gram matrix m, with as large a ridge as rounding asks for at least.

    A Gram matrix of dependent columns, or of more columns than rows, has eigenvalues of zero, which rounding makes
    negative.  Where m is zero and the ridge too, the identity.
    """
    least = 16 * jnp.finfo(m.dtype).eps * m.shape[-1] * trace_mean(m)
    ridge = jnp.maximum(ridge, least)
    return inverse(ridged(m, jnp.where(ridge == 0, 1, ridge)))


def bounded(f: Factors) -> Factors:
    """The pair with gradients scaled by :func:`._adam.bounded`, for methods that ignore their size."""
    grad_a, grad_b = _adam.bounded(f.grad_a, f.grad_b)
    return f._replace(grad_a=grad_a, grad_b=grad_b)


def trace_mean(m: jax.Array) -> jax.Array:
    """``tr(m) / r``, as ``[..., 1, 1]``."""
    return jnp.mean(jnp.diagonal(m, axis1=-2, axis2=-1), axis=-1)[..., None, None]


def ridged(m: jax.Array, ridge: jax.Array) -> jax.Array:
    """``m + ridge I``."""
    return m + ridge * jnp.eye(m.shape[-1], dtype=m.dtype)[(None,) * (m.ndim - 2)]


def check_scale(scale: Any) -> None:
    """Raises ValueError for a scale that is not positive; zeros in a tuple belong to layers without a rank."""
    if isinstance(scale, numbers.Real) and not 0 < scale <= _LARGEST:
        raise ValueError(f"scale: expected a positive number, got {scale!r}")
    if isinstance(scale, tuple) and not all(isinstance(s, numbers.Real) and 0 <= s <= _LARGEST for s in scale):
        raise ValueError(f"scale: expected positive numbers, got {scale!r}")


def scale_of(scale: Any, name: str, lead: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """The scale of a pair with these leading axes."""
    value = scale(name) if callable(scale) else scale
    check_scale(value)
    given = jnp.asarray(value).astype(dtype)
    if given.shape not in ((), lead):
        raise ValueError(f"scale: expected a number, or one for each of the layers {lead} of {name}, got {value!r}")
    return jnp.where(given == 0, 1, given)[..., None, None] if given.ndim else given
