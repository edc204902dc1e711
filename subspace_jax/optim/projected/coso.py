"""CoSO: Adam in subspaces of the gradients that stay orthogonal to what earlier tasks used (arXiv 2505.11816)."""

import numbers
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from subspace_jax import linalg
from subspace_jax.linalg.frequent_directions import SVD_METHODS, left_singular, merge_directions
from subspace_jax.optim import _adam, _checks
from subspace_jax.optim._arrays import automatic, spec_of
from subspace_jax.optim.projected._map import map_projected
from subspace_jax.optim.projected._plan import plans_for, zero_per_matrix, zero_state
from subspace_jax.optim.projected._refresh import in_turns
from subspace_jax.optim.projected.options import ProjectionOptions, RankRule, check_rank, checked

PyTree = Any

# A direction of unit length of which less than this is new to the history adds nothing.
_NEW = 1e-6


class CoSOState(NamedTuple):
    """State of :func:`coso`; trees like the parameters, float32 (float64 for float64 parameters).

    For a kernel ``[..., m, n]``, ``d`` is ``m`` on the input side and ``n`` on the output side;
    ``optax.MaskedNode`` stands for leaves that are not projected.

    Attributes:
      count: Steps taken in this task, int32 scalar.
      proj: ``[..., d, proj_rank]``, the subspace of the updates.
      mu: First moments of projected gradients, ``[..., proj_rank, n]`` or ``[..., m, proj_rank]``.
      nu: Second moments.
      sketch: ``[..., d, sketch_rank]``, Frequent Directions of this task's gradients.
      sigma: ``[..., sketch_rank]``.
      basis: ``[..., d, sketch_rank]``, orthonormal columns.
      history: ``[..., d, k]``, orthonormal columns of earlier tasks, and zero columns behind them.
      history_dim: ``[...]`` of int32, how many columns are in use.
      fallback: State of Adam for other leaves.
    """

    count: jax.Array
    proj: PyTree
    mu: PyTree
    nu: PyTree
    sketch: PyTree
    sigma: PyTree
    basis: PyTree
    history: PyTree
    history_dim: PyTree
    fallback: optax.OptState


def coso(
    learning_rate: optax.ScalarOrSchedule,
    proj_rank: int | RankRule = 15,
    sketch_rank: int = 100,
    *,
    refresh_every: int = 1,
    decay: ArrayLike = 1.0,
    side: str = "input",
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-6,
    weight_decay: ArrayLike = 0.0,
    max_history: int | None = None,
    method: str = "gram_eigh",
) -> optax.GradientTransformationExtraArgs:
    """CoSO (Cheng et al., arXiv 2505.11816) for continual learning; call :func:`coso_end_task` between two tasks.

    The gradient of a kernel is projected out of the history, then onto its leading singular vectors, where Adam
    steps it: ``W <- (W - lr P N) (1 - lr weight_decay)``.  So ``history^T (W - W_start) = 0`` in every
    task, as long as there is no weight decay.  A sketch of the gradients is what a task leaves to the history.

    Leaves of one axis, and those for which a rule gives None, are stepped by plain Adam.  Give heads of tasks to an
    optimizer of their own by ``optax.partition``.

    Args:
      learning_rate: Fixed learning rate or schedule of the step within a task.
      proj_rank: Dimensions of the updates, or a rule ``rank(path, shape)``.
      sketch_rank: Columns of the sketch, at least ``proj_rank`` and below both sides of a kernel.
      refresh_every: Steps between refreshes of subspace and sketch.
      decay: Factor on the sketch at a refresh.
      side: "input" (rows of kernels ``[in, out]``; outputs for earlier tasks' inputs stay) or "output" (columns).
      b1: Decay of the first moment.
      b2: Decay of the second moment.
      eps: Added to the root of the second moment, before bias correction.
      weight_decay: Decoupled, after the step; moves weights inside the history too.
      max_history: Columns that the history can hold; None for all but ``proj_rank``.
      method: "svd", or "gram_eigh": through eigenvectors of Gram matrices.

    Returns:
      The transform.  Its ``update`` needs ``params`` if there is weight decay.  State is float32 for 16-bit parameters,
      where Optax keeps their dtype; complex parameters are refused.

    Raises:
      TypeError: ``proj_rank``, ``sketch_rank``, ``refresh_every`` or ``max_history`` is traced or not an integer.
      ValueError: An option is unknown or out of range; ``init`` raises it for kernels that are too small.

    Examples:
      >>> import jax
      >>> from subspace_jax import optim
      >>> params = jax.numpy.ones((8, 6))
      >>> tx = optim.coso(1e-2, proj_rank=2, sketch_rank=4)
      >>> state = tx.init(params)
      >>> updates, state = tx.update(jax.random.normal(jax.random.key(0), (8, 6)), state)
      >>> state = optim.coso_end_task(state, threshold=0.98)
    """
    check_rank(proj_rank, "proj_rank")
    sketch_rank = _checks.static_int("sketch_rank", sketch_rank, 1)
    max_history = None if max_history is None else _checks.static_int("max_history", max_history, 1)
    _checks.check_moments(b1, b2, eps)
    _checks.check_number("decay", decay, 0)
    _checks.check_choice("side", side, ("input", "output"))
    _checks.check_choice("method", method, SVD_METHODS)
    if not callable(proj_rank) and sketch_rank < proj_rank:
        raise ValueError(f"sketch_rank: expected at least proj_rank, {proj_rank}, got {sketch_rank}")
    options = checked(ProjectionOptions("left" if side == "input" else "right", refresh_every, staggered=False))

    def plans(tree):
        found, structure = plans_for(tree, proj_rank, options)
        for plan in found:
            _check_size(plan, sketch_rank)
        return found, structure

    def leaf_init(plan, x):
        d = plan.shape[-2 if side == "input" else -1]
        size = d - plan.rank if max_history is None else min(max_history, d - plan.rank)

        def zeros(columns):
            basis, low = zero_state(plan._replace(rank=columns, side=options.side), x)
            return basis.left if side == "input" else basis.right, low

        (proj, low), (sketch, _), (history, _) = map(zeros, (plan.rank, sketch_rank, size))
        dim = zero_per_matrix(plan, x)
        sigma = jnp.zeros_like(jnp.broadcast_to(dim[..., None], (*dim.shape, sketch_rank)))
        moments = (low, jnp.zeros_like(low))
        return proj, *moments, sketch, sigma, jnp.zeros_like(sketch), history, dim.astype(jnp.int32)

    def leaf_step(plan, count, g, entries):
        proj, mu, nu, sketch, sigma, basis, history, history_dim = entries
        # Kernels of the output side are transposed here, so that all is projected from the left.
        transposed = side == "output"
        g, mu, nu = (x.mT if transposed else x for x in (g, mu, nu))
        (g,) = _adam.bounded(g.astype(proj.dtype))
        g = g - linalg.times(history, linalg.gram(history, g))

        def refresh(key, g, old):
            del key
            u, s = left_singular(g, method)
            return u[..., : proj.shape[-1]], merge_directions(old[1], u, s, decay=decay, method=method)

        old = proj, linalg.FDState(sketch, sigma, basis)
        proj, merged = in_turns(refresh, plan, options, count, g, old)
        mu, nu, n = _adam.moments(linalg.gram(proj, g), mu, nu, b1, b2, eps)
        d = _adam.correction(count + 1, b1, b2, n.dtype) * linalg.times(proj, n)
        d, mu, nu = (x.mT if transposed else x for x in (d, mu, nu))
        return d, (proj, mu, nu, *merged, history, history_dim)

    tx = map_projected(CoSOState, leaf_init, leaf_step, plans, _adam.scale_by_plain_adam(b1, b2, eps))
    return _adam.then_descend(tx, learning_rate, weight_decay)


def _check_size(plan, sketch_rank):
    if plan is not None and not plan.rank <= sketch_rank < min(plan.shape[-2:]):
        raise ValueError(
            f"sketch_rank: expected at least proj_rank, {plan.rank}, and less than both sides of "
            f"{plan.name or 'the kernel'}, {plan.shape[-2:]}, got {sketch_rank}"
        )


def coso_end_task(state: PyTree, threshold: float = 0.98, min_directions: int = 0) -> PyTree:
    """Ends a task: its main directions join the history, and moments, sketch and counter are reset.

    A direction is kept while the share of squares up to and including it is below the threshold.

    Args:
      state: A :class:`CoSOState`, or any tree that holds some, such as the state of ``optax.partition``.
      threshold: Share of the sketch's squares, in (0, 1].
      min_directions: Kept whatever their share; 0 is the reference, where one direction that holds the threshold
        alone leaves nothing.

    Returns:
      The state to start the next task with.  Under ``jit`` directions for which there is no room are left out.

    Raises:
      ValueError: ``threshold`` is outside (0, 1], ``min_directions`` is negative, or the history has no room for all
        new directions and is concrete.
      TypeError: ``min_directions`` is not a Python integer, or the state holds no ``CoSOState``.
    """
    if isinstance(threshold, numbers.Real) and not 0 < threshold <= 1:
        raise ValueError(f"threshold: expected a share above 0 and up to 1, got {threshold}")
    min_directions = _checks.static_int("min_directions", min_directions, 0)
    found = [x for x in jax.tree.leaves(state, is_leaf=_is_coso) if _is_coso(x)]
    if not found:
        raise TypeError(f"state: expected a CoSOState or a tree that holds one, got {type(state).__name__}")
    return jax.tree.map(
        lambda x: _end_task(x, threshold, min_directions) if _is_coso(x) else x, state, is_leaf=_is_coso
    )


def _is_coso(x):
    return isinstance(x, CoSOState)


def _end_task(state, threshold, min_directions):
    structure = jax.tree.structure(state.mu)
    columns = [jax.tree.leaves(tree) for tree in (state.sigma, state.basis, state.history, state.history_dim)]
    histories, dims = [], []
    for sigma, basis, history, dim in zip(*columns, strict=True):
        new, wanted = automatic(
            lambda *args: _append(*args, threshold, min_directions),
            (sigma, basis, history, dim),
            lambda history=history, dim=dim: spec_of((history, dim)),
        )
        size = history.shape[-1]
        known = not isinstance(wanted, jax.core.Tracer) and wanted.is_fully_addressable
        if known and bool(jnp.any(wanted > size)):
            raise ValueError(
                f"history: expected at most {size} directions in all, got {int(jnp.max(wanted))}; "
                "raise max_history or lower the threshold"
            )
        histories.append(new)
        dims.append(jnp.minimum(wanted, size))
    zeros = jax.tree.map(jnp.zeros_like, state)
    return zeros._replace(history=structure.unflatten(histories), history_dim=structure.unflatten(dims))


def _append(sigma, basis, history, dim, threshold, min_directions):
    """The history with new columns, and how many it would need to hold."""
    squares = jnp.square(sigma)
    shares = jnp.cumsum(squares, axis=-1) / jnp.maximum(jnp.sum(squares, axis=-1, keepdims=True), 1e-37)
    order = jax.lax.broadcasted_iota(jnp.int32, sigma.shape, sigma.ndim - 1)
    chosen = (shares < jnp.asarray(threshold).astype(shares.dtype)) | (order < min_directions)
    chosen &= squares > 0
    for _ in range(2):
        basis = basis - linalg.times(history, linalg.gram(history, basis))
    norms = jnp.linalg.norm(basis, axis=-2)
    chosen &= norms >= _NEW
    basis = basis / jnp.where(chosen, norms, 1)[..., None, :]
    positions = dim[..., None] + jnp.cumsum(chosen, axis=-1, dtype=jnp.int32) - 1
    # One-hot rows put columns in position without a scatter; those without a position have rows of zeros.
    onto = jax.nn.one_hot(jnp.where(chosen, positions, -1), history.shape[-1], dtype=basis.dtype)
    history = history + linalg.times(basis, onto)
    return history, dim + jnp.sum(chosen, axis=-1, dtype=jnp.int32)
