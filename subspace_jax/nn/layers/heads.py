"""Classification heads: linear softmax, cosine softmax, and one subspace per class.

The Grassmann head is that of "Get the Best of Both Worlds: Improving Accuracy and Transferability by Grassmann Class
Representation" (Wang, Li, Zhang, ICCV 2023, arXiv 2308.01547).
"""

import numbers
from collections import Counter
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike, DTypeLike

from subspace_jax import kernels
from subspace_jax.linalg import random_orthonormal, working_dtype
from subspace_jax.nn.layers.linear import Linear, linear


def normalize(x: jax.Array, eps: float = 1e-12) -> jax.Array:
    """Scales vectors along the last axis to unit length: ``x / max(||x||, eps)``.

    The norm is accumulated in at least float32.  A zero vector stays zero, with a finite gradient.

    Args:
      x: ``[..., n]``, floating point.
      eps: Lower bound of the divisor.

    Returns:
      ``[..., n]`` in float32, or float64 where ``x`` is float64.

    Raises:
      TypeError: ``x`` is not floating point.
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"x: expected floating point, got {x.dtype}")
    x = x.astype(working_dtype(x))
    return x / jnp.maximum(safe_norm(x, keepdims=True), eps)


def safe_norm(x: jax.Array, keepdims: bool = False) -> jax.Array:
    """Euclidean norm over the last axis, with gradient zero instead of NaN at zero.

    Args:
      x: ``[..., n]``, at least float32.
      keepdims: Whether to keep the reduced axis with size one.

    Returns:
      ``[...]`` (or ``[..., 1]``).
    """
    q = jnp.sum(jnp.square(x), axis=-1, keepdims=keepdims)
    positive = q > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, q, 1.0)), 0.0)


def grassmann_logits(x: jax.Array, bases: jax.Array | Sequence[jax.Array], gamma: ArrayLike = 25.0) -> jax.Array:
    """Length of each feature's projection onto each class subspace: ``gamma * ||S_c^T x / ||x||||``.

    Source: arXiv 2308.01547, section 3.  Matmuls run in the dtype of ``x`` with float32 accumulation; the length is
    float32 (float64 for float64 ``x``).  For orthonormal bases the logits are in ``[0, gamma]`` and invariant to a
    change of basis.  They are computed by :func:`subspace_jax.kernels.grassmann_logits`, which never stores
    ``[batch, classes, k]``, in the backward pass either.

    Args:
      x: Features ``[batch, n]``, floating point.
      bases: Orthonormal bases ``[classes, n, k]``, or a sequence of such arrays with different ``k``.
      gamma: Scale of the logits.

    Returns:
      Logits ``[batch, classes]``; for a sequence, those of the arrays are concatenated.

    Raises:
      ValueError: Shapes don't match, or an axis is missing or empty.
      TypeError: ``x`` is not floating point.
    """
    groups = bases if isinstance(bases, Sequence) else (bases,)
    for group in groups:
        if x.ndim != 2 or group.ndim != 3 or x.shape[-1] != group.shape[-2]:
            raise ValueError(
                f"grassmann_logits: expected x [batch, n] and bases [classes, n, k]; got {x.shape} and {group.shape}"
            )
    unit = normalize(x).astype(x.dtype)
    logits = [kernels.grassmann_logits(unit, group, gamma) for group in groups]
    return logits[0] if len(logits) == 1 else jnp.concatenate(logits, axis=-1)


def cosine_logits(x: jax.Array, kernel: jax.Array, gamma: float = 25.0) -> jax.Array:
    """Scaled cosine of features and class vectors, ``gamma * cos(x, w_c)``.

    Args:
      x: Features ``[batch, n]``, floating point.
      kernel: Class vectors ``[n, classes]``, of any norm.
      gamma: Scale of the logits.

    Returns:
      Logits ``[batch, classes]``, at least float32.

    Raises:
      ValueError: Widths do not match.
      TypeError: An array is not floating point.
    """
    unit = normalize(kernel.T).T.astype(x.dtype)
    logits = linear(normalize(x).astype(x.dtype), unit)
    return gamma * logits.astype(working_dtype(logits))


class GrassmannHead(nnx.Module):
    """A subspace of R^n per class; the logit is the length of the projection onto it.

    The parameter ``bases`` is one array ``[classes, n, k]`` where all dimensions are equal, otherwise one array for
    each dimension, in ascending order (logits are in class order).  The bases are points on Grassmann manifolds: train
    them with :func:`subspace_jax.optim.riemannian_sgd`, see :func:`subspace_jax.optim.with_geometry`.  With different
    dimensions, Explicit mesh axes must not shard the classes.

    Args:
      in_features: Feature width n.
      num_classes: Number of classes.
      dims: Dimension of every class subspace, or one for each class.
      gamma: Scale of the logits.
      param_dtype: Dtype of the bases, float32 or float64.
      rngs: Random number generators; the ``params`` stream is used.

    Raises:
      ValueError: There is no class, a dimension is below 1 or above ``in_features``, ``dims`` does not have one entry
        for each class, or ``param_dtype`` is not float32 or float64.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        dims: int | Sequence[int] = 8,
        gamma: float = 25.0,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if num_classes < 1:
            raise ValueError(f"num_classes: expected at least 1, got {num_classes}")
        # A number is not expanded: iterating over ten million classes takes longer than compiling their step.
        per_class = None if isinstance(dims, numbers.Real) else list(dims)
        if per_class is not None and len(per_class) != num_classes:
            raise ValueError(f"dims: expected one for each of the {num_classes} classes, got {len(per_class)}")
        counts = Counter(per_class) if per_class is not None else {dims: num_classes}
        for k in counts:
            if not isinstance(k, numbers.Integral) or not 1 <= k <= in_features:
                raise ValueError(
                    f"dims: a class subspace of R^{in_features} has 1 to {in_features} dimensions, got {k}"
                )
        if not jnp.issubdtype(param_dtype, jnp.floating) or jnp.dtype(param_dtype).itemsize < 4:
            raise ValueError(f"param_dtype: bases stay orthonormal in float32 or float64, got {jnp.dtype(param_dtype)}")
        self.gamma = gamma

        def group(k: int) -> nnx.Param:
            value = random_orthonormal(rngs.params(), in_features, k, (counts[k],), param_dtype)
            return nnx.Param(value, axes=("class", "embed", None))

        groups = [group(k) for k in sorted(counts)]
        if len(groups) == 1:
            self.bases = groups[0]
            return
        self.bases = nnx.List(groups)
        # Position of each class in the concatenated groups; static, so that classes are no nodes of the graph.
        by_group = np.argsort(per_class, kind="stable")
        self.position = nnx.static(tuple(np.argsort(by_group, kind="stable").tolist()))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps features ``[batch, n]`` to logits ``[batch, classes]``."""
        if isinstance(self.bases, nnx.Variable):
            return grassmann_logits(x, self.bases.get_value(), self.gamma)
        logits = grassmann_logits(x, tuple(group.get_value() for group in self.bases), self.gamma)
        return logits[:, np.asarray(self.position)]


class CosineHead(nnx.Module):
    """A vector per class; the logit is ``gamma`` times the cosine.

    Args:
      in_features: Feature width n.
      num_classes: Number of classes.
      gamma: Scale of the logits.
      param_dtype: Dtype of the class vectors.
      rngs: Random number generators; the ``params`` stream is used.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        gamma: float = 25.0,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        init = jax.nn.initializers.lecun_normal()
        self.kernel = nnx.Param(init(rngs.params(), (in_features, num_classes), param_dtype), axes=("embed", "class"))
        self.gamma = gamma

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps features ``[batch, n]`` to logits ``[batch, classes]``."""
        return cosine_logits(x, self.kernel.get_value(), self.gamma)


class SoftmaxHead(nnx.Module):
    """A linear classifier with a bias; logits are at least float32.

    Args:
      in_features: Feature width n.
      num_classes: Number of classes.
      param_dtype: Dtype of the parameters.
      rngs: Random number generators; the ``params`` stream is used.
    """

    def __init__(self, in_features: int, num_classes: int, *, param_dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        self.linear = Linear(in_features, num_classes, axes=("embed", "class"), param_dtype=param_dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps features ``[batch, n]`` to logits ``[batch, classes]``."""
        logits = self.linear(x)
        return logits.astype(working_dtype(logits))
