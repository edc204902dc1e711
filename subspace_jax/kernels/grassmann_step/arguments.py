"""Arguments of one step, as its implementations take them."""

from typing import NamedTuple

import jax


class StepArrays(NamedTuple):
    """Arrays of one step.

    Attributes:
      s: Bases ``[..., n, k]``, orthonormal up to drift.
      grads: Gradients, of the same shape and dtype.
      rates: ``[2]``, the factors of momentum and gradient in the direction.
      size: Step size ``[...]``.
      momentum: Like ``grads``; None if the direction is the gradient.
      due: Whether to remove drift, boolean scalar; None for never.
    """

    s: jax.Array
    grads: jax.Array
    rates: jax.Array
    size: jax.Array
    momentum: jax.Array | None = None
    due: jax.Array | None = None


class StepOptions(NamedTuple):
    """Static options of one step.

    Attributes:
      transport: "euclidean", "project" or "parallel", see :func:`subspace_jax.kernels.grassmann_step`.
      retraction: "exp", "qr", "polar" or "cayley".
      difference: Whether to return ``new - s`` instead of the new bases.
      implementation: See :func:`subspace_jax.kernels.grassmann_step`.
      block: Likewise.
    """

    transport: str
    retraction: str
    difference: bool = True
    implementation: str | None = None
    block: int | None = None
