"""Checks of arguments."""

import jax
import numpy as np


def check_finite(name: str, x: jax.Array) -> None:
    """Raises a ValueError for NaN or infinite entries, unless the array is traced."""
    if not isinstance(x, jax.core.Tracer) and not np.isfinite(np.asarray(x)).all():
        raise ValueError(f"{name}: expected finite numbers, got NaN or infinity")


def check_operators(name: str, ops: jax.Array) -> None:
    """Raises a ValueError unless these are operators ``[..., p, d]``, at least one, and finite."""
    if ops.ndim < 3 or 0 in ops.shape:
        raise ValueError(f"{name}: expected operators [..., p, d], got shape {list(ops.shape)}")
    check_finite(name, ops)


def check_length(n: int) -> None:
    """Raises a ValueError unless a length is at least 1."""
    if n < 1:
        raise ValueError(f"n: expected a length of at least 1, got {n}")


def check_tolerance(tol: float | None) -> None:
    """Raises a ValueError unless a tolerance is positive, or None."""
    if tol is not None and not tol > 0:
        raise ValueError(f"tol: expected a number above 0, got {tol}")


def check_heads(k: int, most: int, least: int = 1) -> None:
    """Raises a ValueError unless a number of heads is in range."""
    if not least <= k <= most:
        raise ValueError(f"k: expected {least} to {most} heads, got {k}")


def check_tokens(x: jax.Array, features: int) -> None:
    """Raises a ValueError unless tokens are ``[..., n, features]``."""
    if x.ndim < 2 or x.shape[-1] != features or x.shape[-2] < 1:
        raise ValueError(f"x: expected tokens [..., n, {features}], got shape {list(x.shape)}")
