"""Frozen weights in int8, with a scale for each output."""

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from subspace_jax import linalg, nn
from subspace_jax.adapters.rules import match_rules, path_of
from subspace_jax.adapters.structured import StructuredWeight, as_dense, is_structured

PyTree = Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Int8Weight(StructuredWeight):
    """A weight ``values * scale``; replaces a kernel or an embedding table, by itself or as the base of an adapter.

    Matmuls cast the integers to the dtype of the activations, which bfloat16 holds exactly, accumulate in float32 and
    scale the result.

    Attributes:
      scale: ``[..., out]``, float32.
      values: ``[..., *window, in, out]``, int8, from -127 to 127.
      window: Number of axes of a convolution's window.
    """

    # First, so that the first array of the pytree has the dtype in which a table is looked up.
    scale: jax.Array
    values: jax.Array
    window: int = field(default=0, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return self.values.shape

    @property
    def ndim(self) -> int:
        """Number of axes of the weight."""
        return _num_axes(self.values)

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of the dequantized weight."""
        return self.scale.dtype

    @property
    def names(self) -> P | None:
        """Logical axes of the weight, in a tree of axes."""
        return self.values

    def linear(self, x: jax.Array) -> jax.Array:
        """Returns ``x @ W``, ``[..., out]``."""
        if self.window or x.shape[-1] != self.shape[0]:
            raise ValueError(f"linear: x of shape {x.shape} does not fit a quantized weight {self.shape}")
        wide = linalg.working_dtype(x)

        # The backward pass of a scan over layers keeps the integers, not what they are cast to.
        @functools.partial(jax.checkpoint, prevent_cse=False)
        def product(x, values):
            return jnp.matmul(x, values.astype(x.dtype), preferred_element_type=wide)

        return self._scaled(product(x, self.values), x.dtype)

    def conv(self, x: jax.Array, **how) -> jax.Array:
        """Returns :func:`subspace_jax.nn.conv` of ``x`` with the weight."""
        return self._scaled(nn.conv(x, self.values.astype(x.dtype), **how), x.dtype)

    def lookup(self, tokens: jax.Array, dtype: DTypeLike) -> jax.Array:
        """Returns the rows of tokens, ``[..., out]``."""
        # An integer has no NaN for a token outside the table.
        inside = (tokens >= 0) & (tokens < self.shape[0])
        rows = self._scaled(self.values.at[tokens].get(mode="clip").astype(self.dtype), dtype)
        return jnp.where(inside[..., None], rows, jnp.nan)

    def scores(self, x: jax.Array) -> jax.Array:
        """Returns ``x @ W.T``, ``[..., in]``."""
        return nn.unembed(self._scaled(x, x.dtype), self.values)

    def dense(self) -> jax.Array:
        """Returns the dequantized weight, ``[..., *window, in, out]`` in the dtype of ``scale``."""
        return self.values.astype(self.dtype) * _along(self.scale, self.values, self.window)

    def as_matrix(self, window: int) -> "Int8Weight":
        """Returns a convolution's kernel as the matrix ``[..., rows, out]``."""
        return Int8Weight(self.scale, _as_matrix(self.values, window))

    def adapted_norm(self, a: jax.Array, b: jax.Array, scale: jax.Array) -> jax.Array:
        """Returns the column norms ``[out]`` of ``W + scale * a @ b`` for one matrix W, which is never formed.

        The factored sum of arXiv 2603.22276 on the integers.  Cancellation is not guarded against: the squared
        quantization error exceeds what cancels, unless the update is ``-W`` to within a percent.
        """
        full = jax.lax.Precision.HIGHEST
        wide = self.values.astype(self.dtype)
        a, b, scale = a.astype(self.dtype), b.astype(self.dtype), jnp.asarray(scale, self.dtype)
        energy = jnp.sum(jnp.square(wide), axis=0) * jnp.square(self.scale)
        cross = jnp.matmul(a.T, wide, precision=full) * self.scale[None]
        own = jnp.matmul(jnp.matmul(a.T, a, precision=full), b, precision=full)
        total = (energy + 2 * scale * jnp.sum(b * cross, axis=0)) + jnp.square(scale) * jnp.sum(b * own, axis=0)
        # The square root has no derivative at zero.
        positive = total > 0
        return jnp.where(positive, jnp.sqrt(jnp.where(positive, total, 1)), 0)

    def _scaled(self, x: jax.Array, dtype: DTypeLike) -> jax.Array:
        scale = self.scale[(None,) * (x.ndim - 1)]
        return (x.astype(scale.dtype) * scale).astype(dtype)


def quantize(params: PyTree, rules: Iterable[str | re.Pattern], *, window: int = 0) -> PyTree:
    """Quantizes weights to int8, symmetrically, with a scale for each output.

    ``values = round(W / scale)`` with ``scale = max |W| / 127`` over all axes but the outputs, for each stacked weight
    on its own; the error of an entry is at most ``scale / 2``.  The models of :mod:`subspace_jax.nn` take the result
    as it is, and :func:`subspace_jax.adapters.init` puts adapters on it; only these get gradients.  Configs that factor
    the weight (PiSSA, LoRA-GA, SVFit, Effort) come first: quantize the frozen tree of ``prepare``.

    Given a tree of logical axes, the result is the tree of axes.

    Args:
      params: Tree of arrays.
      rules: Globs or regular expressions, see :func:`match_rules`.
      window: Number of axes of the windows, where the rules name kernels of convolutions.

    Returns:
      ``params`` with an :class:`Int8Weight` for each weight that a rule matches.

    Raises:
      ValueError: A rule matches nothing.
      TypeError: A weight is not floating point.

    Examples:
      >>> import jax.numpy as jnp
      >>> got = quantize({"up": {"kernel": jnp.array([[1.27, -0.5], [0.3, 0.2]])}}, ["up"])["up"]["kernel"]
      >>> got.values.tolist()
      [[127, -127], [30, 51]]
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    at = {path_of(path): leaf for path, leaf in leaves}

    def admits(path, _):
        return _num_axes(at[path]) >= 2 + window and path.split("/")[-1] not in ("scale", "bias")

    chosen = match_rules(dict.fromkeys(rules, True), at, admits)
    new = [_quantized(path, leaf, window) if path in chosen else leaf for path, leaf in at.items()]
    return jax.tree_util.tree_unflatten(treedef, new)


def dequantize(params: PyTree) -> PyTree:
    """Returns ``params`` with an array for each quantized weight."""
    return jax.tree.map(as_dense, params, is_leaf=is_structured)


def as_matrix(w: jax.Array | StructuredWeight, window: int) -> jax.Array | StructuredWeight:
    """Returns a kernel ``[..., *window, in, out]`` as a matrix ``[..., rows, out]``."""
    if not window:
        return w
    return w.as_matrix(window) if is_structured(w) else _as_matrix(w, window)


def _as_matrix(w: jax.Array, window: int) -> jax.Array:
    return w.reshape(*w.shape[: w.ndim - 2 - window], -1, w.shape[-1])


def _quantized(path: str, w: jax.Array | P, window: int) -> Int8Weight:
    if isinstance(w, P):
        return Int8Weight(P(*w[: len(w) - 2 - window], w[-1]), w, window)
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise TypeError(f"{path}: expected a floating-point weight, got {w.dtype}")
    dtype = linalg.working_dtype(w)
    largest = jnp.max(jnp.abs(w), axis=tuple(range(-2 - window, -1))).astype(dtype)
    # A column of zeros has no scale.
    scale = jnp.where(largest > 0, largest / 127, 1)
    values = jnp.round(w.astype(dtype) / _along(scale, w, window))
    return Int8Weight(scale, jnp.clip(values, -127, 127).astype(jnp.int8), window)


def _along(scale: jax.Array, w: jax.Array, window: int) -> jax.Array:
    """Adds axes of size one for the window and the inputs of w."""
    return jnp.expand_dims(scale, tuple(range(w.ndim - 2 - window, w.ndim - 1)))


def _num_axes(leaf: Any) -> int:
    return len(leaf) if isinstance(leaf, P) else leaf.ndim
