"""How well a fresh linear probe tells two kinds of examples apart."""

import numpy as np

_L2 = 1e-3
_NEWTON_STEPS = 50


def balanced_probe_accuracy(
    train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray, test_y: np.ndarray, *, weighted: bool = False
) -> float:
    """Balanced accuracy of a logistic probe: the mean of the shares of either kind that it finds.

    Features are standardized by the training set, and half of 0.001 times the squares of the weights is added to the
    mean loss.  Solved by Newton's method on the host.

    Args:
      train_x: ``[rows, features]``.
      train_y: ``[rows]`` bool.
      test_x: ``[others, features]``.
      test_y: ``[others]`` bool.
      weighted: Whether both kinds weigh the same in the loss, whatever their numbers: a stricter test of what can be
        told of a rare kind, for which a probe otherwise seldom decides.

    Returns:
      A share; 0.5 is that of chance.

    Raises:
      ValueError: A set has one kind only, shapes do not match, or a feature is not finite.
    """
    for name, x, y in (("train", train_x, train_y), ("test", test_x, test_y)):
        if x.ndim != 2 or y.shape != x.shape[:1]:
            raise ValueError(f"{name}_x, {name}_y: expected [rows, features] and [rows], got {x.shape} and {y.shape}")
        if not np.isfinite(x).all():
            raise ValueError(f"{name}_x: expected finite features, got NaN or infinity")
        if y.all() or not y.any():
            raise ValueError(f"{name}_y: expected both kinds, got {len(y)} rows of one")
    mean, std = np.mean(train_x, axis=0, dtype=np.float64), np.std(train_x, axis=0, dtype=np.float64)
    train, test = ((x - mean) / np.maximum(std, 1e-12) for x in (train_x, test_x))
    weights = logistic_weights(np.c_[train, np.ones(len(train))], np.asarray(train_y, bool), weighted=weighted)
    found = np.c_[test, np.ones(len(test))] @ weights > 0
    test_y = np.asarray(test_y, bool)
    return float((np.mean(found[test_y]) + np.mean(~found[~test_y])) / 2)


def logistic_weights(x: np.ndarray, y: np.ndarray, *, weighted: bool = False, l2: float = _L2) -> np.ndarray:
    """Minimizes ``mean loss + l2 / 2 ||w||^2``, the last entry of ``w`` (the bias) but for 1e-9 not penalized.

    Args:
      x: ``[rows, features]`` float64, the last of them ones.
      y: ``[rows]`` bool.
      weighted: Whether both kinds weigh the same.
      l2: The penalty.

    Returns:
      Weights, ``[features]``.
    """
    shares = np.where(y, 0.5 / y.sum(), 0.5 / (~y).sum()) if weighted else np.full(len(y), 1 / len(y))
    signs = np.where(y, 1.0, -1.0)
    penalty = np.full(x.shape[1], l2)
    penalty[-1] = 1e-9  # none on the bias

    def objective(w):
        return shares @ np.logaddexp(0, -signs * (x @ w)) + 0.5 * penalty @ np.square(w)

    w = np.zeros(x.shape[1])
    value = objective(w)
    for _ in range(_NEWTON_STEPS):
        p = 0.5 * (1 + np.tanh(x @ w / 2))
        gradient = x.T @ (shares * (p - y)) + penalty * w
        hessian = (x * (shares * p * (1 - p))[:, None]).T @ x + np.diag(penalty)
        step, size = np.linalg.solve(hessian, gradient), 1.0
        while (new := objective(w - size * step)) > value and size > 1e-6:
            size /= 2
        if value - new < 1e-10:
            break
        w, value = w - size * step, new
    return w
