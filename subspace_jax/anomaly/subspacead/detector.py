"""Scores of vectors in scikit-learn's manner: no images, no backbone."""

import numbers

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator, OutlierMixin
from sklearn.utils.validation import check_is_fitted, validate_data

from subspace_jax import linalg
from subspace_jax.anomaly.subspacead.core import METHODS, PCASubspace, fit_pca, padded_columns, residual_score


class SubspaceDetector(OutlierMixin, BaseEstimator):
    """Novelty detection by the distance from the subspace of normal examples.

    Computes in the dtype of the data, float32 or float64.

    Args:
      explained_variance: Share of the variance of the training data that the subspace has, in (0, 1].
      n_components: Dimensions of the subspace instead; None for the share.
      method: "reconstruction", "mahalanobis", "euclidean" or "cosine", see :func:`residual_score`.
      drop_leading: Leading directions that count as outside the subspace.
      contamination: Share of the training data that is to be predicted as anomalous, in (0, 0.5].

    Attributes:
      mean_: ``[features]``.
      components_: ``[n_components_, features]``.
      explained_variance_: Variances along all directions, ``[features]``.
      n_components_: Dimensions of the subspace.
      offset_: Threshold of :meth:`score_samples`.
      n_features_in_: Number of features.
    """

    def __init__(
        self,
        explained_variance: float = 0.99,
        n_components: int | None = None,
        method: str = "reconstruction",
        drop_leading: int = 0,
        contamination: float = 0.1,
    ):
        self.explained_variance = explained_variance
        self.n_components = n_components
        self.method = method
        self.drop_leading = drop_leading
        self.contamination = contamination

    def fit(self, X: ArrayLike, y: None = None) -> "SubspaceDetector":
        """Fits to normal examples.

        Args:
          X: ``[examples, features]``, finite.
          y: Ignored.

        Returns:
          The detector.

        Raises:
          ValueError: An option is out of range, or the data have fewer than two examples, or equal ones only.
          TypeError: An option is of another type.
        """
        for name in ("contamination", "explained_variance"):
            if not isinstance(getattr(self, name), numbers.Real):
                raise TypeError(f"{name}: expected a number, got {getattr(self, name)!r}")
        linalg.check_integer("drop_leading", self.drop_leading)
        if self.n_components is not None:
            linalg.check_integer("n_components", self.n_components)
        if not 0 < self.contamination <= 0.5:
            raise ValueError(f"contamination: expected a share in (0, 0.5], got {self.contamination}")
        if self.method not in METHODS:
            raise ValueError(f"method: expected one of {METHODS}, got {self.method!r}")
        if self.drop_leading < 0:
            raise ValueError(f"drop_leading: expected at least 0, got {self.drop_leading}")
        X = validate_data(self, X, dtype=(np.float64, np.float32), ensure_min_samples=2)
        if self.drop_leading > X.shape[1]:
            raise ValueError(f"drop_leading: expected at most {X.shape[1]}, the features, got {self.drop_leading}")
        if self.n_components is not None and not 0 <= self.n_components <= X.shape[1]:
            raise ValueError(f"n_components: expected 0 to {X.shape[1]}, the features, got {self.n_components}")
        with jax.enable_x64(X.dtype == np.float64):
            found = fit_pca(X, explained_variance=self.explained_variance, rank=self.n_components)
            self.mean_, self.components_, self.explained_variance_ = (
                np.asarray(x) for x in (found.mean, found.components.T, found.eigenvalues)
            )
        self.n_components_ = int(found.rank)
        self.offset_ = float(np.quantile(self._scores(X), self.contamination))
        return self

    def score_samples(self, X: ArrayLike) -> np.ndarray:
        """Negative anomaly scores of examples ``[examples, features]``: lower is more anomalous, as in scikit-learn."""
        check_is_fitted(self)
        return self._scores(validate_data(self, X, dtype=(np.float64, np.float32), reset=False))

    def decision_function(self, X: ArrayLike) -> np.ndarray:
        """Scores less the threshold: below 0 is anomalous."""
        return self.score_samples(X) - self.offset_

    def predict(self, X: ArrayLike) -> np.ndarray:
        """Returns 1 for normal and -1 for anomalous examples."""
        return np.where(self.decision_function(X) >= 0, 1, -1)

    def _scores(self, X: np.ndarray) -> np.ndarray:
        # In the precision of the model, so that one example has one score.
        X = X.astype(self.mean_.dtype, copy=False)
        with jax.enable_x64(X.dtype == np.float64):
            mean, variances = jnp.asarray(self.mean_), jnp.asarray(self.explained_variance_)
            subspace = PCASubspace(mean, padded_columns(self.components_.T), variances, np.int32(self.n_components_))
            return -np.asarray(
                _residual_score(subspace, jnp.asarray(X), method=self.method, drop_leading=self.drop_leading)
            )


_residual_score = jax.jit(residual_score, static_argnames=("method", "drop_leading"))
