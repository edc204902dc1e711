"""Disentanglement, completeness and informativeness (Eastwood and Williams, ICLR 2018)."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax.linalg import gram, working_dtype
from subspace_jax.metrics.disentanglement import check_codes, check_factors, check_several_factors

# Of disentanglement_lib (arXiv 1811.12359), and of the authors' code of XFactors (arXiv 2601.21688).
VARIANTS = ("disentanglement_lib", "xfactors")
_ADDED, _FLOOR = 1e-11, 1e-12

ImportanceFn = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


class DCI(NamedTuple):
    """The three scores, and their parts.

    Attributes:
      disentanglement: Mean over dimensions, weighted by their importance: 1 where each matters to one factor.
      completeness: Mean over factors, likewise: 1 where one dimension alone matters to each.
      disentanglement_of_dims: ``[dims]``.
      completeness_of_factors: ``[factors]``.
      informativeness: Mean over factors of how well they are predicted; None from importances alone.
    """

    disentanglement: jax.Array
    completeness: jax.Array
    disentanglement_of_dims: jax.Array
    completeness_of_factors: jax.Array
    informativeness: jax.Array | None = None


def dci_from_importance(importance: jax.Array, variant: str = "disentanglement_lib") -> DCI:
    """Disentanglement and completeness from the importance of each dimension for each factor.

    A row of a K-factor matrix R has the score ``1 - H(R_d / sum R_d) / ln K`` and the weight ``sum R_d / sum R``, a
    column likewise.

    Args:
      importance: R, ``[dims, factors]``, not negative.
      variant: "disentanglement_lib" adds 1e-11 to every entry before entropies; "xfactors" adds 1e-12 to denominators
        and takes logarithms of at least 1e-12.  They differ in the tenth digit.

    Returns:
      The scores; 0 where all importances are equal.

    Raises:
      ValueError: There is one dimension or one factor, an entry is negative or not finite, or the variant is unknown.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant: expected one of {VARIANTS}, got {variant!r}")
    check_codes("importance", importance)
    check_several_factors(importance.shape[1])
    if importance.shape[0] < 2:
        raise ValueError(f"importance: expected at least two dimensions, got shape {importance.shape}")
    if not isinstance(importance, jax.core.Tracer) and np.any(np.asarray(importance) < 0):
        raise ValueError("importance: expected no negative entry")
    return _dci(importance, variant)


@functools.partial(jax.jit, static_argnums=1)
def _dci(r, variant):
    r = r.astype(working_dtype(r))
    rows, columns = (1 - _entropy(x, variant) for x in (r, r.T))
    total = jnp.sum(r)
    if variant == "xfactors":
        total += _FLOOR
    else:
        total = jnp.where(total > 0, total, 1)
    return DCI(jnp.sum(jnp.sum(r, axis=1) / total * rows), jnp.sum(jnp.sum(r, axis=0) / total * columns), rows, columns)


def _entropy(r: jax.Array, variant: str) -> jax.Array:
    """Entropy of each row, in units of that of equal entries."""
    if variant == "xfactors":
        p = r / (jnp.sum(r, axis=1, keepdims=True) + _FLOOR)
        logs = jnp.log(jnp.maximum(p, _FLOOR))
    else:
        p = (r + _ADDED) / jnp.sum(r + _ADDED, axis=1, keepdims=True)
        logs = jnp.log(p)
    return -jnp.sum(p * logs, axis=1) / math.log(r.shape[1])


def l1_importance(
    codes: jax.Array,
    factors: jax.Array,
    codes_test: jax.Array,
    factors_test: jax.Array,
    *,
    penalty: float = 0.01,
    num_steps: int = 500,
) -> tuple[np.ndarray, np.ndarray]:
    """Importances by multinomial logistic regression with an L1 penalty: sums over classes of ``|weights|``.

    Minimises the mean cross-entropy plus ``penalty`` times the sum of ``|weights|``, biases left free, by accelerated
    proximal gradient steps (FISTA; Beck and Teboulle 2009), for all factors at once.  What no linear classifier sees,
    such as a position along a circle of two dimensions, it does not see.  The number of classes is read from the
    values, so it does not work under ``jit``.

    Args:
      codes: ``[examples, dims]``, standardized.
      factors: ``[examples, factors]`` integers.
      codes_test: Codes to predict from.
      factors_test: Their factors.
      penalty: The penalty.
      num_steps: Steps.

    Returns:
      Importances ``[dims, factors]`` and test accuracies ``[factors]``.
    """
    if penalty < 0 or num_steps < 1:
        raise ValueError(f"penalty, num_steps: expected at least 0 and 1, got {penalty} and {num_steps}")
    labels, labels_test, sizes = [], [], []
    for column, column_test in zip(np.asarray(factors).T, np.asarray(factors_test).T, strict=True):
        values, group = np.unique(np.concatenate([column, column_test]), return_inverse=True)
        labels.append(group[: len(column)])
        labels_test.append(group[len(column) :])
        sizes.append(len(values))
    exists = np.arange(max(sizes)) < np.asarray(sizes)[:, None]
    targets = np.asarray(labels)[..., None] == np.arange(max(sizes))
    weights, predicted = _fista(codes, codes_test, targets, exists, penalty, num_steps=num_steps)
    return np.abs(np.asarray(weights)).sum(axis=2).T, np.mean(np.asarray(predicted) == np.asarray(labels_test), axis=1)


@functools.partial(jax.jit, static_argnames="num_steps")
def _fista(codes, codes_test, targets, exists, penalty, *, num_steps):
    """Weights ``[factors, dims, classes]`` and predicted classes ``[factors, test examples]``."""
    codes, codes_test, targets = (x.astype(working_dtype(codes)) for x in (codes, codes_test, targets))

    def with_one(x):
        return jnp.concatenate([x, jnp.ones((x.shape[0], 1), x.dtype)], axis=1)

    x = with_one(codes)
    # The Hessian of the cross-entropy of a softmax is at most half that of squares.
    step = 2 * codes.shape[0] / jnp.linalg.eigvalsh(gram(x, x))[-1]
    free = jnp.arange(x.shape[1]) == codes.shape[1]
    threshold = jnp.where(free, 0, step * jnp.asarray(penalty, x.dtype))[:, None]

    def logits(w, x, there):
        return jnp.where(there[None, :], jnp.matmul(x, w, precision=jax.lax.Precision.HIGHEST), -jnp.inf)

    def of_factor(target, there):
        def advance(carry, _):
            w, ahead, momentum = carry
            gradient = gram(x, jax.nn.softmax(logits(ahead, x, there), axis=1) - target) / x.shape[0]
            moved = ahead - step * gradient
            new = jnp.sign(moved) * jnp.maximum(jnp.abs(moved) - threshold, 0)
            after = (1 + jnp.sqrt(1 + 4 * jnp.square(momentum))) / 2
            return (new, new + (momentum - 1) / after * (new - w), after), None

        start = jnp.zeros((x.shape[1], target.shape[1]), x.dtype)
        (w, _, _), _ = jax.lax.scan(advance, (start, start, jnp.ones((), x.dtype)), None, length=num_steps)
        return w[:-1], jnp.argmax(logits(w, with_one(codes_test), there), axis=1)

    return jax.lax.map(lambda pair: of_factor(*pair), (targets, exists))


def dci_scores(
    codes: jax.Array,
    y: jax.Array,
    codes_test: jax.Array,
    y_test: jax.Array,
    *,
    importance_fn: ImportanceFn = l1_importance,
    variant: str = "disentanglement_lib",
) -> DCI:
    """The three scores of codes, with importances of any predictor.

    Args:
      codes: Codes that the predictors are fitted to, ``[examples, dims]``.
      y: Their factors ``[examples, factors]``, integers.
      codes_test: Codes on which they are scored.
      y_test: Their factors.
      importance_fn: Maps the four to importances ``[dims, factors]`` and scores ``[factors]``, such as test accuracies,
        or ``clip(R^2, 0, 1)`` of regressions.
      variant: See :func:`dci_from_importance`.

    Returns:
      The scores.

    Raises:
      ValueError: As for :func:`dci_from_importance`; or shapes do not match, or codes are not finite.
    """
    check_codes("codes", codes)
    check_codes("codes_test", codes_test)
    check_factors("y", y, codes.shape[0])
    check_factors("y_test", y_test, codes_test.shape[0])
    check_several_factors(y.shape[1])
    importance, scores = importance_fn(codes, y, codes_test, y_test)
    return dci_from_importance(importance, variant)._replace(informativeness=np.mean(np.asarray(scores)))
