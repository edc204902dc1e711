"""Arguments of one step, as its implementations take them."""

from typing import NamedTuple

import jax


class AdamArrays(NamedTuple):
    """Arrays of one step; see :func:`subspace_jax.kernels.projected_adam_step` for shapes.

    Attributes:
      w: Weights.
      grad: Gradients.
      basis: Orthonormal columns.
      mu: First moment.
      nu: Second moment.
      scalars: ``[1 - b1, 1 - b2, eps, learning_rate c, 1 - learning_rate weight_decay]``.
    """

    w: jax.Array
    grad: jax.Array
    basis: jax.Array
    mu: jax.Array
    nu: jax.Array
    scalars: jax.Array
