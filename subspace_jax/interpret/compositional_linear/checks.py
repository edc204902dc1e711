"""Checks of embeddings, labels and factors; values of traced or distributed arrays are not looked at."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

METHODS = ("means", "lstsq")


def check_examples(x: jax.Array, labels: jax.Array, n_values: Sequence[int], least: int = 2) -> None:
    """Raises unless these are embeddings of ``least`` examples or more, and their labels."""
    if x.ndim != 2 or 0 in x.shape:
        raise ValueError(f"x: expected embeddings [examples, d], got shape {list(x.shape)}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"x: expected floating-point embeddings, got {x.dtype}")
    if len(x) < least:
        raise ValueError(f"x: expected {least} examples or more, got {len(x)}")
    check_labels(labels, n_values)
    if len(labels) != len(x):
        raise ValueError(f"labels: expected those of {len(x)} examples, got {len(labels)}")
    if is_known(x):
        wrong = np.flatnonzero(~np.asarray(_finite_rows(x)))
        if len(wrong):
            raise ValueError(f"x: expected finite embeddings, got NaN or infinity in example {wrong[0]}")


_finite_rows = jax.jit(lambda x: jnp.all(jnp.isfinite(x), axis=1))
_alike = jax.jit(lambda x: jnp.all(x == x[:1]))


def check_labels(labels: jax.Array, n_values: Sequence[int]) -> None:
    """Raises unless these are labels ``[examples, concepts]`` from 0 and below ``n_values``."""
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"labels: expected integers, got {labels.dtype}")
    if labels.ndim != 2 or not labels.shape[1]:
        raise ValueError(f"labels: expected [examples, concepts], got shape {list(labels.shape)}")
    if len(n_values) != labels.shape[1] or min(n_values) < 1:
        raise ValueError(
            f"n_values: expected a number above 0 for each of {labels.shape[1]} concepts, got {tuple(n_values)}"
        )
    if is_known(labels):
        low, high = np.min(np.asarray(labels), axis=0), np.max(np.asarray(labels), axis=0)
        for i, n in enumerate(n_values):
            if low[i] < 0 or high[i] >= n:
                raise ValueError(f"labels: expected 0 to {n - 1} for concept {i}, got {low[i]} to {high[i]}")


def check_varies(x: jax.Array) -> None:
    """Raises ValueError where all embeddings are the same: there is no variance to explain."""
    if is_known(x) and bool(_alike(x)):
        raise ValueError(f"x: expected embeddings that differ, got the same one in all {len(x)} examples")


def check_method(method: str) -> None:
    """Raises ValueError for an unknown way to compute factors."""
    if method not in METHODS:
        raise ValueError(f"method: expected one of {METHODS}, got {method!r}")


def check_weights(weights: Sequence[jax.Array], d: int | None = None) -> None:
    """Raises ValueError unless these are matrices ``[values, d]`` of one width."""
    if not len(weights):
        raise ValueError("weights: expected those of one concept or more, got none")
    d = weights[0].shape[-1] if d is None else d
    for i, w in enumerate(weights):
        if w.ndim != 2 or w.shape[1] != d or not w.shape[0]:
            raise ValueError(f"weights: expected [values, {d}] for concept {i}, got shape {list(w.shape)}")
        if is_known(w) and not np.all(np.asarray(_finite_rows(w))):
            raise ValueError(f"weights: expected finite numbers, got NaN or infinity in concept {i}")


def is_known(x: Any) -> bool:
    """Whether the values of an array can be looked at here."""
    return not isinstance(x, jax.core.Tracer) and getattr(x, "is_fully_addressable", True)
