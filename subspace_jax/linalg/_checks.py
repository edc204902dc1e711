"""Checks of arguments."""

import operator
from typing import Any

import jax
import jax.numpy as jnp


def check_matrix(name: str, x: jax.Array) -> None:
    """Raises unless ``x`` is a stack of float32 or float64 matrices, with at least one row and one column."""
    if x.ndim < 2 or 0 in x.shape[-2:]:
        raise ValueError(f"{name}: expected matrices [..., m, n], got shape {x.shape}")
    if x.dtype not in (jnp.float32, jnp.float64):
        raise TypeError(f"{name}: expected float32 or float64, got {x.dtype}")


def check_tall(name: str, x: jax.Array) -> None:
    """Raises unless ``x`` is a stack of float32 or float64 matrices that are at least as tall as wide."""
    check_matrix(name, x)
    if x.shape[-1] > x.shape[-2]:
        raise ValueError(f"{name}: expected [..., n, k] with k <= n, got {x.shape}")


def check_square(name: str, x: jax.Array) -> None:
    """Raises unless ``x`` is a stack of square float32 or float64 matrices."""
    check_matrix(name, x)
    if x.shape[-1] != x.shape[-2]:
        raise ValueError(f"{name}: expected square matrices [..., k, k], got {x.shape}")


def check_same_space(a: jax.Array, b: jax.Array) -> None:
    """Raises unless both are stacks of floating-point bases, no wider than tall, of subspaces of one space."""
    for name, x in (("a", a), ("b", b)):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"{name}: expected a floating-point basis, got {x.dtype}")
        if x.ndim < 2 or not 1 <= x.shape[-1] <= x.shape[-2]:
            raise ValueError(f"{name}: expected a basis [..., n, k] with 1 <= k <= n, got {x.shape}")
    if a.shape[-2] != b.shape[-2]:
        raise ValueError(f"a, b: expected bases [..., n, p] and [..., n, q] of one space, got {a.shape} and {b.shape}")


def is_here(x: jax.Array) -> bool:
    """Whether the values of an array are known: it is not traced, and this process has all of it."""
    return not isinstance(x, jax.core.Tracer) and getattr(x, "is_fully_addressable", True)


def check_integer(name: str, value: Any) -> int:
    """Returns an integer, NumPy's included; raises a TypeError for anything else, such as 2.5 or a text."""
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected an integer, got {value!r}") from None


def check_finite(name: str, x: jax.Array) -> None:
    """Raises for NaN or infinity in an array whose values are known."""
    if not is_here(x):
        return
    with jax.ensure_compile_time_eval():  # a constant within a traced function is looked at, not traced
        finite = bool(jnp.all(jnp.isfinite(x)))
    if not finite:
        raise ValueError(f"{name}: expected finite numbers, got NaN or infinity")
