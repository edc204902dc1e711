"""Penalties on matrices that are not orthogonal, with a threshold below which they are left alone.

The threshold is the idea of lambda-orthogonality (arXiv 2509.16664, abstract).  The formulas are a design choice
consistent with it: the paper's own regularizer could not be read.
"""

import math
import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from subspace_jax.linalg import eye_like, gram, working_dtype

PyTree = Any
Predicate = Callable[[str, jax.Array], bool]

FORMS = ("softplus", "sigmoid", "hinge_squared")
_EPS = 1e-12


def orthogonality_residual(w: jax.Array, eps: float = _EPS, *, normalize: bool = False) -> jax.Array:
    """Distance of a matrix to orthonormal columns, or rows where it is wide: ``sqrt(||G - I||_F^2 + eps)``.

    ``G`` is the Gram matrix on the smaller side, ``W^T W`` for a tall ``W``.  Where the residual is at most ``lam``,
    every singular value ``s`` obeys ``|s^2 - 1| <= lam``.  The gradient at an orthogonal matrix is 0.

    Args:
      w: ``[n, m]``, floating point; Gram matrix and residual are float32 or wider.
      eps: Keeps the root differentiable at an orthogonal matrix.
      normalize: Divide by ``sqrt(min(n, m))``, so that one threshold serves all widths.

    Returns:
      A scalar.

    Raises:
      ValueError: ``w`` is no matrix.
    """
    _check_matrix(w)
    return _residual(w, eps, normalize)


def lambda_orthogonality(
    w: jax.Array, lam: float, kappa: float = 20.0, form: str = "softplus", *, normalize: bool = False
) -> jax.Array:
    """Penalty on the part of the orthogonality residual ``g`` above a threshold ``lam``.

    Forms (a design choice, see the module):

    - "softplus": ``softplus(kappa (g - lam)) / kappa``, whose gradient is that of ``g`` behind a smooth gate;
    - "sigmoid": ``sigmoid(kappa (g - lam)) g``;
    - "hinge_squared": ``max(0, g - lam)^2``, exactly 0 below the threshold; with ``lam`` 0 it is soft orthogonality,
      ``||G - I||_F^2``.

    Keep ``kappa lam`` at 10 or more where ``lam`` is above 0: a softer gate times a large weight pulls the matrix to an
    orthogonal one.

    Args:
      w: ``[n, m]``, floating point.
      lam: Threshold, at least 0.
      kappa: Sharpness of the gate, above 0; "hinge_squared" has none.
      form: "softplus", "sigmoid" or "hinge_squared".
      normalize: See :func:`orthogonality_residual`.

    Returns:
      A scalar, float32 or wider.

    Raises:
      ValueError: ``w`` is no matrix, ``lam`` or ``kappa`` is out of range, or the form is unknown.
    """
    _check_matrix(w)
    _check_gate(lam, kappa, form)
    return _penalty(_residual(w, _EPS, normalize), lam, kappa, form)


def lambda_orthogonality_tree(
    params: PyTree,
    predicate: Predicate | None,
    lam: float,
    kappa: float = 20.0,
    form: str = "softplus",
    *,
    normalize: bool = False,
) -> jax.Array:
    """Sum of :func:`lambda_orthogonality` over the chosen kernels of a tree.

    Args:
      params: Arrays; a chosen one is a matrix ``[n, m]``, or a stack of them ``[..., n, m]``.
      predicate: ``predicate(path, leaf)`` says whether a leaf is chosen, by a path such as ``"head/kernel"``; None
        chooses all leaves of two axes and more.
      lam: Other arguments: see :func:`lambda_orthogonality`.
      kappa: See there.
      form: See there.
      normalize: See there.

    Returns:
      A scalar, float32 or wider.

    Raises:
      ValueError: Nothing is chosen, a chosen leaf has fewer than two axes, or an argument can't serve.
    """
    _check_gate(lam, kappa, form)
    total = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if leaf.ndim >= 2 if predicate is None else predicate(name, leaf):
            if leaf.ndim < 2:
                raise ValueError(f"predicate: expected kernels [..., n, m], chose {name} of shape {list(leaf.shape)}")
            total.append(jnp.sum(_penalty(_residual(leaf, _EPS, normalize), lam, kappa, form)))
    if not total:
        raise ValueError("predicate: expected at least one kernel to be chosen, got none")
    return sum(total[1:], total[0])


def _residual(w: jax.Array, eps: float, normalize: bool) -> jax.Array:
    """Residuals of matrices ``[..., n, m]``, as ``[...]``."""
    w = w.astype(working_dtype(w))  # G - I cancels: bfloat16 would leave rounding alone
    w = w if w.shape[-2] >= w.shape[-1] else w.mT
    g = gram(w, w)
    residual = jnp.sqrt(jnp.sum(jnp.square(g - eye_like(g)), axis=(-2, -1)) + eps)
    return residual / math.sqrt(w.shape[-1]) if normalize else residual


def _penalty(residual: jax.Array, lam: float, kappa: float, form: str) -> jax.Array:
    lam, kappa = (jnp.asarray(x).astype(residual.dtype) for x in (lam, kappa))
    if form == "hinge_squared":
        return jnp.square(jax.nn.relu(residual - lam))
    gate = kappa * (residual - lam)
    return jax.nn.softplus(gate) / kappa if form == "softplus" else jax.nn.sigmoid(gate) * residual


def _check_matrix(w: jax.Array) -> None:
    if w.ndim != 2:
        raise ValueError(f"w: expected a matrix [n, m], got shape {list(w.shape)}")


def _check_gate(lam: float, kappa: float, form: str) -> None:
    # Arrays, which may be traced, are not looked at.
    if isinstance(lam, numbers.Real) and not lam >= 0:
        raise ValueError(f"lam: expected a threshold of at least 0, got {lam}")
    if isinstance(kappa, numbers.Real) and not kappa > 0:
        raise ValueError(f"kappa: expected a sharpness above 0, got {kappa}")
    if form not in FORMS:
        raise ValueError(f"form: expected one of {FORMS}, got {form!r}")
