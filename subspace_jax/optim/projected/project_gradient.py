"""Gradients projected onto given subspaces, or away from them."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from subspace_jax import linalg
from subspace_jax.optim import _checks
from subspace_jax.optim._arrays import automatic, spec_of
from subspace_jax.optim.projected._bases import with_bases

PyTree = Any


def project_gradient(
    bases: PyTree | Callable[[str, tuple[int, ...]], jax.Array | None],
    mode: Literal["same", "orth"] = "same",
    side: Literal["output", "input"] = "output",
) -> optax.GradientTransformationExtraArgs:
    """Projects gradients of kernels onto a subspace of their outputs, or away from it (arXiv 2505.14185).

    ``G L L^T`` for mode "same" and ``G - G L L^T`` for "orth", where a kernel is ``[..., in, out]``; from the left on
    the side of the inputs, where "orth" is :func:`project_out`.  Steps of SGD after it then keep ``W_t - W_0`` in or
    out of the subspace.  Weight decay and Adam's division do not: put this transform after Adam.

    Args:
      bases: Tree like the parameters.  Leaves are orthonormal columns ``L [..., out, k]``, or ``[..., in, k]``, zero
        columns allowed; or None for what is left as it is.  Or a rule ``bases(path, shape)`` that returns one of these
        for each leaf.
      mode: What is kept: the part in the subspace, "same", or the part orthogonal to it, "orth".
      side: The space of the subspace, that of outputs or of inputs.

    Returns:
      The transform; its state is empty.

    Raises:
      ValueError: ``mode`` or ``side`` is unknown; ``update`` raises it where a basis doesn't fit a kernel, or the trees
        differ.
      TypeError: ``update`` raises it for a complex kernel.

    Examples:
      >>> import jax, optax
      >>> from subspace_jax import optim
      >>> axes = jax.numpy.eye(8)[:, :3]
      >>> tx = optax.chain(optim.project_gradient({"kernel": axes, "bias": None}, "orth"), optax.sgd(0.1))
    """
    _checks.check_choice("mode", mode, ("same", "orth"))
    _checks.check_choice("side", side, ("output", "input"))

    def of_leaf(name: str, g: jax.Array, basis: jax.Array) -> jax.Array:
        axis, letters = (-1, "out") if side == "output" else (-2, "in")
        if g.ndim < 2 or basis.ndim < 2 or basis.shape[-2] != g.shape[axis]:
            raise ValueError(
                f"bases: expected [..., {letters}, k] for the kernel {name} [..., in, out] of shape {g.shape}, got "
                f"{basis.shape}"
            )
        if jnp.issubdtype(g.dtype, jnp.complexfloating):
            raise TypeError(f"{name}: expected a real kernel, got {g.dtype}")
        dtype = linalg.working_dtype(g)

        def projected(basis, x):
            if side == "output":
                part = linalg.times(linalg.times(x, basis), basis.mT)
            else:
                part = linalg.times(basis, linalg.gram(basis, x))
            return part if mode == "same" else x - part

        x = g.astype(dtype)
        return automatic(projected, (basis.astype(dtype), x), lambda: spec_of(x)).astype(g.dtype)

    return with_bases(bases, of_leaf)
