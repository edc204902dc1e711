"""A frozen weight in eight bits, with a scale for each output."""

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

PyTree = Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Int8Weight:
    """A weight ``values * scale``; takes a kernel's or a table's place, by itself or below an adapter.

    Products are made with the integers, which bfloat16 holds exactly, summed in float32 and scaled at the end.

    Attributes:
      scale: ``[..., out]``, float32.
      values: ``[..., *window, in, out]``, int8, from -127 to 127.
      window: Number of axes of a convolution's window.
    """

    # First, so that the first array tells the type in which a table is looked up.
    scale: jax.Array
    values: jax.Array
    window: int = field(default=0, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the weight."""
        return self.values.shape

    @property
    def ndim(self) -> int:
        """Number of axes of the weight."""
        return len(self.values) if isinstance(self.values, P) else self.values.ndim

    @property
    def dtype(self) -> jnp.dtype:
        """That of the weight when it is formed."""
        return self.scale.dtype

    def linear(self, x: jax.Array) -> jax.Array:
        """Returns ``x @ W``, ``[..., out]``."""
        if self.window or x.shape[-1] != self.shape[0]:
            raise ValueError(f"linear: x of shape {x.shape} does not fit a quantised weight {self.shape}")
        wide = linalg.working_dtype(x)
        return self._scaled(jnp.matmul(x, self.values.astype(x.dtype), preferred_element_type=wide), x.dtype)

    def conv(self, x: jax.Array, **how) -> jax.Array:
        """Returns what :func:`subspace_jax.nn.conv` does with the weight."""
        return self._scaled(nn.conv(x, self.values.astype(x.dtype), **how), x.dtype)

    def lookup(self, tokens: jax.Array, dtype: DTypeLike) -> jax.Array:
        """Returns the rows of tokens, ``[..., out]``."""
        # Integers have no NaN to say that a token lies outside the table.
        inside = (tokens >= 0) & (tokens < self.shape[0])
        rows = self._scaled(self.values.at[tokens].get(mode="clip").astype(self.dtype), dtype)
        return jnp.where(inside[..., None], rows, jnp.nan)

    def scores(self, x: jax.Array) -> jax.Array:
        """Returns ``x @ W.T``, ``[..., in]``."""
        return nn.unembed(self._scaled(x, x.dtype), self.values)

    def dense(self) -> jax.Array:
        """Returns the weight itself, ``[..., *window, in, out]`` in the dtype of ``scale``."""
        return self.values.astype(self.dtype) * _along(self.scale, self.values, self.window)

    def _scaled(self, x: jax.Array, dtype: DTypeLike) -> jax.Array:
        scale = self.scale[(None,) * (x.ndim - 1)]
        return (x.astype(scale.dtype) * scale).astype(dtype)


def quantize(params: PyTree, rules: Iterable[str | re.Pattern], *, window: int = 0) -> PyTree:
    """Rounds weights to eight bits, symmetrically, with a scale for each output.

    ``values = round(W / scale)`` with ``scale = max |W| / 127`` over all but the outputs, for each stacked weight by
    itself; so an entry is off by ``scale / 2`` at most.  The models of :mod:`subspace_jax.nn` take the result as it
    is, and :func:`subspace_jax.adapters.init` puts adapters on it; gradients reach these only.  Settings that take the
    weight apart (PiSSA, LoRA-GA, SVFit, Effort) come first: quantise the frozen tree that ``prepare`` returned.

    Given a tree of logical axes, the result is that of the axes.

    Args:
      params: Tree of arrays.
      rules: Globs or regular expressions, see :func:`match_rules`.
      window: Number of axes of the windows, where the rules name kernels of convolutions.

    Returns:
      ``params`` with an :class:`Int8Weight` in the place of each weight that a rule names.

    Raises:
      ValueError: A rule matches nothing.
      TypeError: A weight is not of floating point.

    Examples:
      >>> import jax.numpy as jnp
      >>> got = quantize({"up": {"kernel": jnp.array([[1.27, -0.5], [0.3, 0.2]])}}, ["up"])["up"]["kernel"]
      >>> got.values.tolist()
      [[127, -127], [30, 51]]
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    at = {path_of(path): leaf for path, leaf in leaves}

    def admits(path, _):
        return _order(at[path]) >= 2 + window and path.split("/")[-1] not in ("scale", "bias")

    chosen = match_rules(dict.fromkeys(rules, True), at, admits)
    new = [_quantized(path, leaf, window) if path in chosen else leaf for path, leaf in at.items()]
    return jax.tree_util.tree_unflatten(treedef, new)


def dense_base(w: jax.Array | Int8Weight) -> jax.Array:
    """The weight as an array."""
    return w.dense() if isinstance(w, Int8Weight) else w


def names_of(base: Any) -> P | None:
    """Logical axes of a frozen weight, where a tree of axes is given in the place of arrays."""
    names = base.values if isinstance(base, Int8Weight) else base
    return names if isinstance(names, P) else None


def _quantized(path: str, w: jax.Array | P, window: int) -> Int8Weight:
    if isinstance(w, P):
        return Int8Weight(P(*w[: len(w) - 2 - window], w[-1]), w, window)
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise TypeError(f"{path}: expected a floating-point weight, got {w.dtype}")
    dtype = linalg.working_dtype(w)
    largest = jnp.max(jnp.abs(w), axis=tuple(range(-2 - window, -1))).astype(dtype)
    # A column of zeros stays one.
    scale = jnp.where(largest > 0, largest / 127, 1)
    values = jnp.round(w.astype(dtype) / _along(scale, w, window))
    return Int8Weight(scale, jnp.clip(values, -127, 127).astype(jnp.int8), window)


def _along(scale: jax.Array, w: jax.Array, window: int) -> jax.Array:
    """Scales with axes of size one for the window and the inputs of w."""
    return jnp.expand_dims(scale, tuple(range(w.ndim - 2 - window, w.ndim - 1)))


def _order(leaf: Any) -> int:
    return len(leaf) if isinstance(leaf, P) else leaf.ndim
