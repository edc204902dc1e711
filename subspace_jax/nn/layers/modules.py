"""Flax NNX modules of layers: a linear layer, batch normalization, and classification heads.

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
from jax.typing import DTypeLike

from subspace_jax.linalg import random_orthonormal, working_dtype
from subspace_jax.nn.layers.batch_norm import batch_norm
from subspace_jax.nn.layers.factored import SparseFactor
from subspace_jax.nn.layers.heads import cosine_logits, grassmann_logits
from subspace_jax.nn.layers.linear import linear


class Linear(nnx.Module):
    """A linear layer whose parameters have logical axis names.

    Args:
      in_features: Width of the input.
      out_features: Width of the output.
      axes: Logical names of the kernel's two axes; the bias takes the second.
      use_bias: Whether there is a bias.
      param_dtype: Dtype of the parameters.
      rngs: Random number generators; the ``params`` stream is used.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        axes: tuple[str | None, str | None] = ("embed", "mlp"),
        use_bias: bool = True,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        init = jax.nn.initializers.lecun_normal()
        self.kernel = nnx.Param(init(rngs.params(), (in_features, out_features), param_dtype), axes=axes)
        self.bias = nnx.Param(jnp.zeros((out_features,), param_dtype), axes=axes[1:]) if use_bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``[..., in_features]`` to ``[..., out_features]``."""
        return linear(x, self.kernel.get_value(), None if self.bias is None else self.bias.get_value())


class SparseDictDense(nnx.Module):
    """A linear layer with a compressed kernel, ``(x D) S``.

    Args:
      kernel: Its :class:`subspace_jax.nn.SparseFactor` for one matrix ``[in, out]``.
      bias: ``[out]``, or None.
    """

    def __init__(self, kernel: SparseFactor, bias: jax.Array | None = None):
        self.dictionary, self.values = nnx.Param(kernel.dictionary), nnx.Param(kernel.values)
        self.indices = nnx.Variable(kernel.indices)
        self.bias = None if bias is None else nnx.Param(bias)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``[..., in]`` to ``[..., out]``."""
        kernel = SparseFactor(self.dictionary.get_value(), self.values.get_value(), self.indices.get_value())
        return linear(x, kernel, None if self.bias is None else self.bias.get_value())


class BatchNorm(nnx.Module):
    """Batch normalization, see :func:`subspace_jax.nn.batch_norm`; a new module normalizes by running statistics.

    Args:
      features: Number of channels.
      axis: Logical name of the channels.
    """

    def __init__(self, features: int, *, axis: str | None = None):
        ones, zeros = (make((features,), jnp.float32) for make in (jnp.ones, jnp.zeros))
        self.scale, self.bias = nnx.Param(ones, axes=(axis,)), nnx.Param(zeros, axes=(axis,))
        self.mean, self.var = nnx.BatchStat(zeros, axes=(axis,)), nnx.BatchStat(ones, axes=(axis,))
        self.use_running_average = True

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalizes ``[batch, ..., features]``; in training mode it updates the running statistics."""
        held = [part.get_value() for part in (self.scale, self.bias, self.mean, self.var)]
        y, (mean, var) = batch_norm(x, *held, train=not self.use_running_average)
        if not self.use_running_average:
            self.mean.set_value(mean)
            self.var.set_value(var)
        return y


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
