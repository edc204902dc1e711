"""What all transforms of Grassmann points share: checks, schedules, and the walk over the leaves.

A leaf of the parameters is a stack of orthonormal bases ``[..., n, k]``.  Geometry is computed in float32, in float64
for float64 leaves; only the returned difference has the dtype of the parameters.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from subspace_jax import linalg
from subspace_jax.manifolds import grassmann
from subspace_jax.optim import _checks
from subspace_jax.optim._arrays import automatic

PyTree = Any

TRANSPORTS = ("euclidean", "project", "parallel")


def check_options(transport: str, retraction: str, reorth_every: ArrayLike | None) -> None:
    """Raises ValueError for an unknown name, or an interval that is not a whole number of at least 1."""
    if transport not in TRANSPORTS:
        raise ValueError(f"transport: expected one of {TRANSPORTS}, got {transport!r}")
    if retraction not in grassmann.RETRACTIONS:
        raise ValueError(f"retraction: expected one of {grassmann.RETRACTIONS}, got {retraction!r}")
    # Arrays, into which optax.inject_hyperparams turns numbers, are not checked: that would block on the device.
    if isinstance(reorth_every, int | float | np.number) and not (reorth_every >= 1 and reorth_every % 1 == 0):
        raise ValueError(f"reorth_every: expected a whole number of at least 1, or None for never, got {reorth_every}")


def check_bases(params: PyTree) -> None:
    """Raises for leaves that are no stacks of bases; checks values only where they are concrete.

    Under a trace (``jit``, ``eval_shape``) there are none, and neither has one process all values of an array that is
    spread over several: there only shapes and dtypes are checked.
    """
    for path, s in jax.tree_util.tree_leaves_with_path(params):
        name = _checks.path_name(path) or "params"
        dtype, shape = jnp.result_type(s), jnp.shape(s)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(f"{name}: expected floating-point bases, got {dtype}")
        if len(shape) < 2 or not 1 <= shape[-1] <= shape[-2]:
            raise ValueError(f"{name}: expected bases [..., n, k] with 1 <= k <= n, got {shape}")
        s = jnp.asarray(s) if isinstance(s, np.ndarray) else s
        if isinstance(s, jax.Array) and not isinstance(s, jax.core.Tracer) and s.is_fully_addressable:
            worst = _largest_error(s)
            # Entries of bfloat16 bases are rounded to 2^-9, which alone gives an error of a few percent.
            limit = 1e-3 if jnp.finfo(dtype).bits >= 32 else 0.1
            # A concrete array that a traced function closes over gives a traced error: nothing to look at.
            if not isinstance(worst, jax.core.Tracer) and not worst <= limit:
                raise ValueError(
                    f"{name}: the columns are not orthonormal (||S^T S - I|| = {float(worst):.2g}, expected at most "
                    f"{limit}); start from manifolds.grassmann.random_point or a QR factor"
                )


def _largest_error(s):
    # Cholesky factors can't be taken of arrays that are sharded over Explicit axes (JAX 0.10).
    return automatic(lambda s: jnp.max(linalg.orthonormality_error(s), initial=0.0), (s,), lambda: P())


def zero_moments(params: PyTree) -> PyTree:
    """Zeros like the bases, in the working dtype and with their sharding."""
    return jax.tree.map(lambda s: jnp.zeros_like(s, linalg.working_dtype(s)), params)


def zero_per_subspace(params: PyTree) -> PyTree:
    """One zero for each subspace, in the working dtype and with the sharding of the leading axes."""
    return jax.tree.map(lambda s: jnp.zeros_like(jnp.max(s, axis=(-2, -1)), linalg.working_dtype(s)), params)


def scaled(learning_rate: optax.ScalarOrSchedule, factor: ArrayLike) -> optax.ScalarOrSchedule:
    """A learning rate or schedule, multiplied by a factor."""
    _checks.check_rate("learning_rate", learning_rate)
    _checks.check_number("lr_factor", factor, 0)
    if callable(learning_rate):
        return lambda count: learning_rate(count) * factor
    return learning_rate * factor


def value_at(step_size: optax.ScalarOrSchedule, count: jax.Array) -> ArrayLike:
    """The value of a number or schedule at a step."""
    return step_size(count) if callable(step_size) else step_size


def is_due(reorth_every: ArrayLike | None, count: jax.Array) -> jax.Array | None:
    """Whether drift is removed at this step, None for never."""
    return None if reorth_every is None else count % jnp.asarray(reorth_every).astype(count.dtype) == 0


def step_leaves(
    leaf: Callable[..., tuple],
    due: jax.Array | None,
    scalars: Mapping[str, ArrayLike],
    shardings: PyTree | None,
    grads: PyTree,
    params: PyTree,
    *moments: PyTree,
) -> tuple:
    """Steps every leaf.

    Args:
      leaf: ``leaf(due, scalars, sharding, grad, s, *moments) -> (new - s, *moments)``, arrays and scalars in the
        working dtype of ``s``.
      due: Boolean scalar, or None for never.
      scalars: Scalars that ``leaf`` needs.
      shardings: Tree of ``NamedSharding`` in which those of ``params`` are at the same paths, or None.
      grads: Euclidean gradients, like ``params``.
      params: Tree of bases.
      *moments: Trees like ``params``, or None for what isn't kept.

    Returns:
      ``new - old`` in the dtype of ``params``, and the moments.

    Raises:
      ValueError: ``grads`` has another structure than ``params``.
    """
    bases, structure = jax.tree.flatten(params)
    columns = [[None] * len(bases) if tree is None else structure.flatten_up_to(tree) for tree in (grads, *moments)]
    # By path: optax.masked and optax.partition remove leaves from a tree, but not from its shardings.
    known = dict(jax.tree_util.tree_leaves_with_path(shardings))
    placed = [known.get(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]

    results = []
    for s, sharding, grad, *rest in zip(bases, placed, *columns, strict=True):
        if s.size == 0:
            results.append([grad.astype(s.dtype), *rest])
            continue
        dtype = linalg.working_dtype(s)
        numbers = {name: jnp.asarray(x).astype(dtype) for name, x in scalars.items()}
        update, *rest = leaf(due, numbers, sharding, grad.astype(dtype), s.astype(dtype), *rest)
        results.append([update.astype(s.dtype), *rest])
    outs = [[row[i] for row in results] for i in range(len(columns))]
    # A tree that isn't kept stays None, also where there are no leaves: the structure of a state never changes.
    kept = [True, *(tree is not None for tree in moments)]
    return tuple(structure.unflatten(out) if keep else None for out, keep in zip(outs, kept, strict=True))
