"""Compressed kernels: a small dictionary times sparse coefficients, and a product of two thin matrices."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from subspace_jax import kernels, linalg
from subspace_jax.nn.layers.structured import StructuredWeight

PyTree = Any


class _Factored(StructuredWeight):
    """What both kinds share: everything follows from the two factors."""

    @property
    def ndim(self) -> int:
        """Number of axes of the weight."""
        return len(self.shape)

    def adapted_norm(self, a: jax.Array, b: jax.Array, scale: jax.Array) -> jax.Array:
        """Returns the column norms ``[out]`` of ``W + scale * a @ b`` for one matrix W, which is made for it."""
        return kernels.dora_weight_norm(self.dense(), a, b, scale)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SparseFactor(_Factored):
    """A kernel ``D S`` with a dictionary ``D`` and ``s`` non-zero coefficients in each column of ``S``.

    Replaces a kernel ``[..., in, out]`` in a parameter tree; leading axes are stacked kernels.  ``S`` is made dense,
    one kernel at a time, unless there are so few inputs that it would be larger than what they need.

    Source: arXiv 2509.22075, section 3.

    Attributes:
      dictionary: ``[..., in, k]``.
      values: ``[..., s, out]``, the coefficients of each output.
      indices: ``[..., s, out]`` integers, their atoms, which differ within a column.
    """

    dictionary: jax.Array
    values: jax.Array
    indices: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the kernel."""
        return (*self.dictionary.shape[:-1], self.values.shape[-1])

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of the kernel."""
        return self.dictionary.dtype

    @property
    def names(self) -> P | None:
        """Logical axes of the kernel, in a tree of axes."""
        return P(*self.dictionary[:-1], self.values[-1]) if isinstance(self.dictionary, P) else None

    @staticmethod
    def axes(names: P) -> "SparseFactor":
        """Returns the logical axes of the arrays of a kernel with these axes."""
        right = P(*names[:-2], None, names[-1])
        return SparseFactor(P(*names[:-1], None), right, right)

    def linear(self, x: jax.Array) -> jax.Array:
        """Returns ``x @ D S``, ``[..., out]`` in the dtype of ``x``."""
        _check(x, self.shape)
        wide = linalg.working_dtype(x)
        coded = jnp.matmul(x, self.dictionary.astype(x.dtype), preferred_element_type=wide).astype(x.dtype)
        if math.prod(x.shape[:-1]) * self.values.shape[0] <= self.dictionary.shape[1]:
            picked = jnp.take(coded, self.indices.astype(jnp.int32), axis=-1)
            return jnp.einsum("...so,so->...o", picked, self.values.astype(x.dtype))
        s = linalg.densify(self.values.astype(x.dtype), self.indices.astype(jnp.int32), self.dictionary.shape[1])
        return jnp.matmul(coded, s)

    def coefficients(self) -> jax.Array:
        """Returns ``S`` as a dense array ``[..., k, out]``."""
        count = self.dictionary.shape[-1]
        flat = (x.reshape(-1, *x.shape[-2:]) for x in (self.values, self.indices.astype(jnp.int32)))
        made = jax.vmap(lambda values, indices: linalg.densify(values, indices, count))(*flat)
        return made.reshape(*self.values.shape[:-2], count, self.values.shape[-1])

    def dense(self) -> jax.Array:
        """Returns the kernel, ``[..., in, out]`` in the dtype of the dictionary."""
        return linalg.times(self.dictionary, self.coefficients().astype(self.dtype))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LowRankFactor(_Factored):
    """A kernel ``a b``; replaces a kernel ``[..., in, out]`` in a parameter tree.

    Attributes:
      a: ``[..., in, r]``.
      b: ``[..., r, out]``.
    """

    a: jax.Array
    b: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the kernel."""
        return (*self.a.shape[:-1], self.b.shape[-1])

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of the kernel."""
        return self.a.dtype

    @property
    def names(self) -> P | None:
        """Logical axes of the kernel, in a tree of axes."""
        return P(*self.a[:-1], self.b[-1]) if isinstance(self.a, P) else None

    @staticmethod
    def axes(names: P) -> "LowRankFactor":
        """Returns the logical axes of the arrays of a kernel with these axes."""
        return LowRankFactor(P(*names[:-1], None), P(*names[:-2], None, names[-1]))

    def linear(self, x: jax.Array) -> jax.Array:
        """Returns ``x @ a b``, ``[..., out]`` in the dtype of ``x``."""
        _check(x, self.shape)
        wide = linalg.working_dtype(x)
        inner = jnp.matmul(x, self.a.astype(x.dtype), preferred_element_type=wide).astype(x.dtype)
        return jnp.matmul(inner, self.b.astype(x.dtype))

    def dense(self) -> jax.Array:
        """Returns the kernel, ``[..., in, out]``."""
        return linalg.times(self.a, self.b)


def factored_axes(params: PyTree, axes: PyTree) -> PyTree:
    """Returns a tree of logical axes with compressed kernels where the parameters have them.

    Args:
      params: Parameters, or shapes.
      axes: ``PartitionSpec`` of each parameter of the uncompressed model, see :func:`subspace_jax.nn.param_axes`.
    """
    return jax.tree.map(
        lambda w, names: w.axes(names) if isinstance(w, _Factored) else names,
        params,
        axes,
        is_leaf=lambda w: isinstance(w, _Factored),
    )


def _check(x: jax.Array, shape: tuple[int, ...]) -> None:
    if len(shape) != 2 or x.shape[-1] != shape[0]:
        raise ValueError(f"linear: x of shape {x.shape} does not fit a compressed kernel {shape}")


def truncate_bf16(x: jax.Array, bits: int = 2) -> jax.Array:
    """Rounds to bfloat16, and clears the last bits of the mantissa.

    Two cleared bits of each coefficient make room for the mask of a :class:`SparseFactor` with ``k = 2 s``
    (arXiv 2509.22075, Eq. 11).

    Args:
      x: Floating-point array.
      bits: Bits that are cleared, 0 to 7.

    Returns:
      bfloat16 array of the same shape.

    Raises:
      ValueError: ``bits`` is out of range.

    Examples:
      >>> import jax.numpy as jnp
      >>> float(truncate_bf16(jnp.float32(1.0078125), 2)), float(truncate_bf16(jnp.float32(1.03125), 2))
      (1.0, 1.03125)
    """
    if not 0 <= bits <= 7:
        raise ValueError(f"bits: expected 0 to 7, the mantissa of bfloat16, got {bits}")
    words = jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16)
    return jax.lax.bitcast_convert_type(words & jnp.uint16(0xFFFF & ~(2**bits - 1)), jnp.bfloat16)
