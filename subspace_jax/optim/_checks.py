"""Checks of arguments that all transforms share.

Arrays, into which ``optax.inject_hyperparams`` turns numbers, are not checked: a traced one has no value, and another
would block on the device.
"""

import math
import numbers
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any

# The largest number of float32, in which steps are computed.
_LARGEST = float(np.finfo(np.float32).max)


def static_int(name: str, value: Any, minimum: int) -> int:
    """The value as an int.

    Raises:
      TypeError: It is an array, traced or not, or no whole number.
      ValueError: It is below the minimum.
    """
    if isinstance(value, jax.Array):
        raise TypeError(
            f"{name}: expected a Python integer, which fixes shapes and branches when the step is compiled, got "
            f"{type(value).__name__}; under optax.inject_hyperparams name it in static_args"
        )
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected an integer, got {value!r}") from None
    if isinstance(value, bool) or number < minimum:
        raise ValueError(f"{name}: expected an integer of at least {minimum}, got {value!r}")
    return number


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raises ValueError unless the value is one of the choices."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}: expected one of {choices}, got {value!r}")


def check_number(name: str, value: Any, low: float, high: float = math.inf, *, closed: bool = True) -> None:
    """Raises unless a number is in ``[low, high)``, or in ``(low, high)`` where ``closed`` is False.

    Raises:
      TypeError: The value is neither a number nor an array.
      ValueError: A Python number is out of the range, or of that of float32.
    """
    if isinstance(value, jax.Array | np.ndarray):
        return
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    # Compared this way round, NaN is in no range.
    if not (low <= value if closed else low < value) or not (value < high and abs(value) <= _LARGEST):
        least = "" if low == -math.inf else f" at least {low}" if closed else f" above {low}"
        most = f" and below {high}" if high < math.inf else " that float32 holds" if not least else " and finite"
        raise ValueError(f"{name}: expected a number{least}{most}, got {value!r}")


def check_rate(name: str, value: Any, low: float = -math.inf) -> None:
    """Raises as :func:`check_number` does; schedules pass."""
    if not callable(value):
        check_number(name, value, low)


def check_moments(b1: Any, b2: Any, eps: Any) -> None:
    """Raises unless these are decays in [0, 1) and a number of at least 0."""
    check_number("b1", b1, 0, 1)
    check_number("b2", b2, 0, 1)
    check_number("eps", eps, 0)


def check_transform(name: str, value: Any) -> None:
    """Raises TypeError unless the value is an Optax transform."""
    if not (callable(getattr(value, "init", None)) and callable(getattr(value, "update", None))):
        raise TypeError(f"{name}: expected an optax.GradientTransformation, got {value!r}")


def check_rule(name: str, value: Callable | None) -> None:
    """Raises TypeError unless the value can be called or is None."""
    if value is not None and not callable(value):
        raise TypeError(f"{name}: expected a function or None, got {value!r}")


def path_name(path: tuple) -> str:
    """The path of a leaf, as in ``"layers/attn/q/kernel"``: the same for a tree of arrays and for one of variables."""
    # The array in a variable of Flax is its attribute.
    inside = path[:-1] if path and path[-1] == jax.tree_util.GetAttrKey("value") else path
    return jax.tree_util.keystr(inside, simple=True, separator="/")


def check_real(tree: PyTree) -> None:
    """Raises TypeError for a complex leaf, whose imaginary part would be lost."""
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        if jnp.issubdtype(jnp.result_type(x), jnp.complexfloating):
            raise TypeError(
                f"{path_name(path) or 'params'}: expected a real array, got {jnp.result_type(x)}; "
                "wrap the transform in optax.contrib.split_real_and_imaginary"
            )


def require_params(params: PyTree, what: str) -> None:
    """Raises ValueError where ``update`` was called without parameters."""
    if params is None:
        raise ValueError(f"params: got None, expected {what}; call update(gradients, state, params)")
