"""From tables of :class:`ParamSpec` to arrays, shapes and logical axes."""

import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from subspace_jax.nn.causal_lm_params import ParamSpec

PyTree = Any


def dense(
    m: int, n: int, axes: tuple[str | None, str | None], stddev: float, bias: bool = True
) -> dict[str, ParamSpec]:
    """A kernel ``[m, n]`` and its bias."""
    spec = {"kernel": ParamSpec((m, n), axes, stddev)}
    return {**spec, "bias": ParamSpec((n,), axes[1:])} if bias else spec


def scale_and_bias(width: int, scale: float = 1.0) -> dict[str, ParamSpec]:
    """The parameters of a normalisation."""
    return {"scale": ParamSpec((width,), (None,), value=scale), "bias": ParamSpec((width,), (None,))}


def conv_kernel(side: int, m: int, n: int, groups: int = 1) -> dict[str, ParamSpec]:
    """A kernel ``[side, side, m / groups, n]``, normal with deviation ``sqrt(2 / (side^2 n))``.

    The deviation keeps the variance of what flows back through a ReLU (He et al., arXiv 1502.01852).
    """
    stddev = math.sqrt(2 / (side * side * n / groups))
    return {"kernel": ParamSpec((side, side, m // groups, n), (None, None, "embed", None), stddev)}


def draw(key: jax.Array, specs: PyTree, dtype: DTypeLike) -> PyTree:
    """Draws parameters; the values of one depend on the key, its name and its shape, and on no other parameter."""

    def one(path, spec: ParamSpec) -> jax.Array:
        if spec.stddev is None:
            return jnp.full(spec.shape, spec.value, dtype)
        own = jax.random.fold_in(key, zlib.crc32("/".join(entry.key for entry in path).encode()))
        return (spec.stddev * jax.random.normal(own, spec.shape, jnp.float32)).astype(dtype)

    return jax.tree_util.tree_map_with_path(one, specs, is_leaf=is_spec)


def axes_of(specs: PyTree) -> PyTree:
    """Logical axis names, a tree of ``PartitionSpec``."""
    return jax.tree.map(lambda spec: P(*spec.axes), specs, is_leaf=is_spec)


def shapes_of(specs: PyTree, dtype: DTypeLike) -> PyTree:
    """A tree of ``ShapeDtypeStruct``."""
    return jax.tree.map(lambda spec: jax.ShapeDtypeStruct(spec.shape, dtype), specs, is_leaf=is_spec)


def is_spec(x: Any) -> bool:
    """Whether ``x`` is a leaf of such a table."""
    return isinstance(x, ParamSpec)
