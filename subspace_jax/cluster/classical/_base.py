"""What estimators of clusterings share: input and parameters as scikit-learn takes them."""

import numbers

import jax
import numpy as np
from sklearn.base import BaseEstimator, ClusterMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import validate_data

from subspace_jax import linalg

RandomState = int | np.random.RandomState | None

# Numbers of things, each at least 1; and other numbers, whose ranges the functions check.
_COUNTS = frozenset({"n_clusters", "n_components", "n_init", "n_neighbors", "n_nonzeros", "keep"})
_NUMBERS = frozenset({"gamma", "noise", "tau"})


class Clustering(ClusterMixin, BaseEstimator):
    """Input as scikit-learn takes it, and a key from ``random_state``."""

    def _rows(self, X, reset: bool) -> np.ndarray:
        if reset:
            self._check_parameters(np.inf)
        rows = validate_data(self, X, dtype=(np.float32, np.float64), reset=reset, ensure_min_samples=1 + reset)
        # float64 stays where JAX has it on.
        rows = rows.astype(jax.dtypes.canonicalize_dtype(rows.dtype), copy=False)
        if reset:
            self._check_parameters(len(rows))
        return rows

    def _check_parameters(self, n_samples: float) -> None:
        """Raises for a parameter of another type, a number of things below 1, or more clusters than rows."""
        for name, value in self.get_params(deep=False).items():
            if name in _COUNTS and linalg.check_integer(name, value) < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
            if name in _NUMBERS and not isinstance(value, numbers.Real):
                raise TypeError(f"{name}: expected a number, got {value!r}")
        if self.n_clusters > n_samples:
            raise ValueError(f"n_clusters: expected 1 to n_samples={n_samples}, got {self.n_clusters}")

    def _key(self) -> jax.Array:
        return jax.random.key(check_random_state(self.random_state).randint(2**31 - 1))
