"""Options of all transforms that project gradients."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from subspace_jax.optim import _checks

PyTree = Any
RankRule = Callable[[str, tuple[int, ...]], int | None]
DimensionNumbers = optax.contrib.MuonDimensionNumbers
WeightDimensionNumbers = DimensionNumbers | PyTree | Callable[[PyTree], PyTree] | None

SIDES = ("left", "right", "std", "reverse_std", "full")
METHODS = ("svd", "randomized", "subspace_iteration", "random")
MOMENTS = ("keep", "reset", "rotate")


class ProjectionOptions(NamedTuple):
    """How gradients are projected, and when and how bases are refreshed.

    Bases are refreshed by the step counter, in ``lax.cond`` and loops, without a wait for the host.  Under ``vmap``
    these become selects, and every step pays for a refresh: stack kernels along a leading axis instead.

    Attributes:
      side: "left" (``P`` on the rows, which are the inputs of a kernel ``[in, out]``), "right" (the columns), "std"
        (right if ``m >= n``, else left: the state is ``max(m, n) x r``), "reverse_std" (the opposite) or "full".
      refresh_every: Steps between refreshes.
      method: "svd" (exact, canonical signs; slow to run, and on accelerators to compile), "randomized" (a sketch),
        "subspace_iteration" (warm-started, matmuls and QR only), or "random" (Haar, independent of the gradient).
      rounds: Rounds of a subspace iteration; a cold start takes three more.
      moments: At a refresh the inner moments "keep" their values, "reset" to what ``inner.init`` gives, or "rotate"
        into the new coordinates: first moments by the cosines between old and new basis, second moments by the squared
        cosines.  A moment that changes sign with the gradient is a first moment, one that is never negative a second
        one; transforms with other moments are refused.  Step counters stay in any case.
      staggered: Whether leaves, and the slices of a stack along its first axis, are refreshed in turns over
        ``refresh_every`` steps, else all at once.  Keep that axis unsharded.  The first step refreshes all.
      weight_dimension_numbers: ``optax.contrib.MuonDimensionNumbers`` of kernels that are not ``[..., m, n]``: one for
        all leaves, a tree like the parameters, or a function of the parameters that returns such a tree.  Leaves that
        a tree lacks are ``[..., m, n]``.
      seed: Seed of random bases.
    """

    side: str = "std"
    refresh_every: int = 200
    method: str = "subspace_iteration"
    rounds: int = 2
    moments: str = "keep"
    staggered: bool = True
    weight_dimension_numbers: WeightDimensionNumbers = None
    seed: int = 0


def checked(options: ProjectionOptions) -> ProjectionOptions:
    """Returns the options, with Python integers.

    Raises:
      TypeError: An integer is traced or not whole, or ``options`` is no :class:`ProjectionOptions`.
      ValueError: A name is unknown, or an integer out of range.
    """
    if not isinstance(options, ProjectionOptions):
        raise TypeError(f"projection: expected optim.ProjectionOptions, got {options!r}")
    _checks.check_choice("side", options.side, SIDES)
    _checks.check_choice("method", options.method, METHODS)
    _checks.check_choice("moments", options.moments, MOMENTS)
    given = options.weight_dimension_numbers
    leaves = [] if callable(given) else jax.tree.leaves(given, is_leaf=lambda x: isinstance(x, DimensionNumbers))
    if not all(isinstance(x, DimensionNumbers) for x in leaves):
        raise TypeError(
            "weight_dimension_numbers: expected optax.contrib.MuonDimensionNumbers, a tree of them or a function, got "
            f"{given!r}"
        )
    least = {"refresh_every": 1, "rounds": 1, "seed": 0}
    return options._replace(**{name: _checks.static_int(name, getattr(options, name), n) for name, n in least.items()})


def check_rank(rank: int | RankRule, name: str = "rank") -> None:
    """Raises unless ``rank`` is a rule or a positive Python integer."""
    if not callable(rank):
        _checks.static_int(name, rank, 1)
