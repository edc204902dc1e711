"""LoRA-GA: factors that begin along the gradient of the weight (arXiv 2407.05000)."""

import math

import jax

from subspace_jax import linalg
from subspace_jax.adapters.lora import remove


def lora_ga_init(
    kernel: jax.Array,
    grad: jax.Array,
    rank: int,
    scale: float,
    gamma: float = 16.0,
    *,
    key: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Starts factors in the leading singular directions of a gradient, so that first steps are those of the weight.

    ``a`` has the first r left singular vectors of the gradient ``[in, out]`` as columns, ``b`` the next r right ones
    as rows, both times ``out^(1/4) / sqrt(gamma)``; the weight gives up ``scale a b``, so that the start changes
    nothing.  Use it once, for set-up: ``trainable[...]["kernel"] = {"a": a, "b": b}`` beside the new weight.

    Source: arXiv 2407.05000, the released code's "ArB2r" directions with its "stable" scale.

    Args:
      kernel: ``[..., in, out]``.
      grad: Gradient of the loss, averaged over some batches, of the same shape.
      rank: The rank r, at most half of the shorter side.
      scale: The scale s of the adapter.
      gamma: Divides the squared size.
      key: Random key of a sketch of 4 r columns and 4 power steps, as the authors have it; None takes the exact SVD.

    Returns:
      ``a [..., in, r]``, ``b [..., r, out]``, float32 or float64, and the new kernel in its dtype.

    Raises:
      ValueError: Shapes differ, the rank is out of range, or a number is not positive.

    Example:
      >>> import jax
      >>> from subspace_jax import adapters
      >>> kernel = jax.numpy.eye(8, 6)
      >>> a, b, kernel = adapters.lora_ga_init(kernel, kernel, rank=2, scale=4.0)
      >>> a.shape, b.shape, kernel.shape
      ((8, 2), (2, 6), (8, 6))
    """
    if grad.shape != kernel.shape or kernel.ndim < 2:
        raise ValueError(f"grad: expected the shape [..., in, out] of the kernel {kernel.shape}, got {grad.shape}")
    shorter = min(kernel.shape[-2:])
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= shorter // 2:
        raise ValueError(
            f"rank: expected 1 to {shorter // 2}, half of the shorter side of {kernel.shape}, got {rank!r}"
        )
    for name, value in (("scale", scale), ("gamma", gamma)):
        if not value > 0:
            raise ValueError(f"{name}: expected a positive number, got {value!r}")
    g = grad.astype(linalg.working_dtype(kernel, grad))
    if key is None:
        u, _, vt = linalg.canonical_svd(g)
    else:
        u, _, vt = linalg.randomized_svd(key, g, 2 * rank, oversample=2 * rank, power_steps=4)
    size = kernel.shape[-1] ** 0.25 / math.sqrt(gamma)
    a, b = size * u[..., :, :rank], size * vt[..., rank : 2 * rank, :]
    return a, b, remove(kernel, a, b, scale)
