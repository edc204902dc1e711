"""The perceptron of transformer blocks."""

from typing import Any

import jax

from subspace_jax.nn.layers.activations import ACTIVATIONS
from subspace_jax.nn.layers.linear import linear

PyTree = Any


def mlp(params: PyTree, x: jax.Array, activation: str) -> jax.Array:
    """Returns ``down(act(up x))``, or ``down(act(gate x) * up x)`` where there is a gate (arXiv 2002.05202).

    The backward pass recomputes the activation function from its input: a GELU would otherwise store several arrays of
    the inner width.

    Args:
      params: ``{up, gate, down}/{kernel, bias}``; ``gate`` and the biases are optional.
      x: ``[..., d]``, floating point.
      activation: A key of ``ACTIVATIONS``.

    Returns:
      The shape and dtype of ``x``.
    """

    def project(x: jax.Array, name: str) -> jax.Array:
        return linear(x, params[name]["kernel"], params[name].get("bias"))

    act = jax.checkpoint(ACTIVATIONS[activation], prevent_cse=False)
    inner = act(project(x, "gate")) * project(x, "up") if "gate" in params else act(project(x, "up"))
    return project(inner, "down")
