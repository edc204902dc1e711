"""Specs of parameters: shapes, logical axes and initial values, as trees with the layout of the parameters."""

import math
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

PyTree = Any


class ParamSpec(NamedTuple):
    """The spec of one parameter.

    Attributes:
      shape: Its shape.
      axes: Logical name of each axis, or None for an axis that is never sharded.
      stddev: Standard deviation of the normal initial values; None for constant ones.
      value: The constant.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    stddev: float | None = None
    value: float = 0.0


def dense_specs(
    fan_in: int, fan_out: int, axes: tuple[str | None, str | None], *, bias: bool = True, stddev: float = 0.02
) -> dict[str, ParamSpec]:
    """Returns the specs of a linear layer, ``{kernel, bias}``."""
    spec = {"kernel": ParamSpec((fan_in, fan_out), axes, stddev)}
    return {**spec, "bias": ParamSpec((fan_out,), axes[1:])} if bias else spec


def norm_specs(width: int, scale: float = 1.0) -> dict[str, ParamSpec]:
    """Returns the specs of a normalization, ``{scale, bias}``."""
    return {"scale": ParamSpec((width,), (None,), value=scale), "bias": ParamSpec((width,), (None,))}


def conv_specs(side: int, fan_in: int, fan_out: int, groups: int = 1) -> dict[str, ParamSpec]:
    """Returns the spec of a convolution, ``{kernel}`` of shape ``[side, side, fan_in / groups, fan_out]``.

    The standard deviation is ``sqrt(2 groups / (side^2 fan_out))`` (He et al., arXiv 1502.01852, fan-out mode).
    """
    stddev = math.sqrt(2 / (side * side * fan_out / groups))
    return {"kernel": ParamSpec((side, side, fan_in // groups, fan_out), (None, None, "embed", None), stddev)}


def spec_axes(specs: PyTree) -> PyTree:
    """Returns the logical axis names of the parameters as ``PartitionSpec``."""
    return map_specs(lambda spec: P(*spec.axes), specs)


def spec_shapes(specs: PyTree, dtype: DTypeLike = jnp.float32) -> PyTree:
    """Returns the parameters as ``ShapeDtypeStruct``."""
    return map_specs(lambda spec: jax.ShapeDtypeStruct(spec.shape, dtype), specs)


def spec_count(specs: PyTree) -> int:
    """Returns the number of parameters."""
    return sum(math.prod(spec.shape) for spec in jax.tree.leaves(specs, is_leaf=_is_spec))


def draw_params(key: jax.Array, specs: PyTree, dtype: DTypeLike = jnp.float32) -> PyTree:
    """Initializes parameters: normal where a standard deviation is given, constant elsewhere.

    Args:
      key: Random key.  A parameter's values depend on the key, its name and its shape only.
      specs: Nested dict of :class:`ParamSpec`.
      dtype: Dtype of the parameters.

    Returns:
      Nested dict of arrays with the layout of ``specs``.
    """

    def draw(path, spec: ParamSpec) -> jax.Array:
        if spec.stddev is None:
            return jnp.full(spec.shape, spec.value, dtype)
        name = "/".join(entry.key for entry in path)
        own = jax.random.fold_in(key, zlib.crc32(name.encode()))
        return (spec.stddev * jax.random.normal(own, spec.shape, jnp.float32)).astype(dtype)

    return jax.tree_util.tree_map_with_path(draw, specs, is_leaf=_is_spec)


def map_specs(f: Callable[[ParamSpec], Any], specs: PyTree) -> PyTree:
    """Applies a function to every spec of a tree."""
    return jax.tree.map(f, specs, is_leaf=_is_spec)


def _is_spec(x: Any) -> bool:
    return isinstance(x, ParamSpec)
