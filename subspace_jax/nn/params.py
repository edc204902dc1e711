"""Parameters before they exist: shapes, logical axes and initial values, in the layout of the parameters themselves."""

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
    """One parameter before it exists.

    Attributes:
      shape: Its shape.
      axes: Logical name of each axis, or None for one that is never split.
      stddev: Standard deviation of the initial values; None for a parameter that begins constant.
      value: The constant.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    stddev: float | None = None
    value: float = 0.0


def dense_specs(
    rows: int, columns: int, axes: tuple[str | None, str | None], *, bias: bool = True, stddev: float = 0.02
) -> dict[str, ParamSpec]:
    """The parameters of a linear map."""
    spec = {"kernel": ParamSpec((rows, columns), axes, stddev)}
    return {**spec, "bias": ParamSpec((columns,), axes[1:])} if bias else spec


def norm_specs(width: int, scale: float = 1.0) -> dict[str, ParamSpec]:
    """The parameters of a normalisation."""
    return {"scale": ParamSpec((width,), (None,), value=scale), "bias": ParamSpec((width,), (None,))}


def conv_specs(side: int, entering: int, leaving: int, groups: int = 1) -> dict[str, ParamSpec]:
    """A kernel ``[side, side, entering / groups, leaving]``.

    Its deviation ``sqrt(2 groups / (side^2 leaving))`` keeps the variance of what flows back through a ReLU (He et al.,
    arXiv 1502.01852).
    """
    stddev = math.sqrt(2 / (side * side * leaving / groups))
    return {"kernel": ParamSpec((side, side, entering // groups, leaving), (None, None, "embed", None), stddev)}


def spec_axes(specs: PyTree) -> PyTree:
    """Returns the logical axis names of every parameter, a tree of ``PartitionSpec``."""
    return map_specs(lambda spec: P(*spec.axes), specs)


def spec_shapes(specs: PyTree, dtype: DTypeLike = jnp.float32) -> PyTree:
    """Returns every parameter as a ``ShapeDtypeStruct``."""
    return map_specs(lambda spec: jax.ShapeDtypeStruct(spec.shape, dtype), specs)


def spec_count(specs: PyTree) -> int:
    """Number of parameters."""
    return sum(math.prod(spec.shape) for spec in jax.tree.leaves(specs, is_leaf=_is_spec))


def draw_params(key: jax.Array, specs: PyTree, dtype: DTypeLike = jnp.float32) -> PyTree:
    """Draws fresh parameters: normal where a deviation is given, constant elsewhere.

    Args:
      key: Random key.  A parameter's values depend on the key, its name and its shape, and on no other parameter.
      specs: Nested dict of :class:`ParamSpec`.
      dtype: Type of the parameters.

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
