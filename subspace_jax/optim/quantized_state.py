"""Quantized optimizer state: float32 during an update, bfloat16 or int8 between updates.

Rounding is stochastic, and unbiased.  Moving averages change by less than the last bit of a quantized value in a step,
and rounded to the nearest they would never change.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from subspace_jax.optim import _checks
from subspace_jax.optim._arrays import automatic, spec_of
from subspace_jax.optim._basis import Basis

PyTree = Any

DTYPES = ("bfloat16", "int8")

# A scale costs four bytes: shorter rows than this are not quantized.
_SHORTEST_ROW = 16
_LEVELS = 127


class QuantizedState(NamedTuple):
    """State of :func:`quantize_state`.

    Attributes:
      count: Steps taken, int32 scalar.
      values: The inner state, with quantized arrays.
      scales: A tree like it: for int8 arrays the largest magnitude of each row, ``[..., 1]`` of float32; a float32
        scalar for bfloat16 arrays, a bool scalar for arrays that are not quantized, None for bases.
    """

    count: jax.Array
    values: optax.OptState
    scales: PyTree


def quantize_state(inner: optax.GradientTransformation, dtype: str) -> optax.GradientTransformationExtraArgs:
    """Keeps the float32 arrays of a transform's state as bfloat16, or as int8 with a scale for each row.

    Bases of subspaces (:class:`Basis`), which have to stay orthonormal, and scalars are not quantized.  Eight bits hold
    the fourth root of an entry over the largest of its row, that is of its last axis: eight decades, with steps of 3%
    at the upper end.  Nonzero entries never become zero.  Rows of fewer than 16 entries are not quantized.  The scheme
    follows Dettmers et al. (arXiv 2110.02861), with rows instead of blocks of 2048, which keep an array's sharding.

    Args:
      inner: Any transform, such as :func:`galore`, or Adam inside :func:`low_rank_projection`.
      dtype: "bfloat16" or "int8".

    Returns:
      The transform.

    Raises:
      ValueError: ``dtype`` is unknown.
      TypeError: ``inner`` is not a transform.

    Examples:
      >>> import jax
      >>> from subspace_jax import optim
      >>> tx = optim.quantize_state(optim.galore(1e-2, rank=16), "int8")
      >>> state = tx.init({"kernel": jax.numpy.ones((64, 32))})
      >>> moments = state.values[0].inner
      >>> moments.mu["kernel"].shape, str(moments.mu["kernel"].dtype), str(state.values[0].bases["kernel"].right.dtype)
      ((64, 16), 'int8', 'float32')
    """
    _checks.check_choice("dtype", dtype, DTYPES)
    _checks.check_transform("inner", inner)
    inner = optax.with_extra_args_support(inner)

    def quantized(state, count):
        leaves, structure = jax.tree.flatten(state, is_leaf=_is_basis)
        key = jax.random.fold_in(jax.random.key(0), count)
        pairs = [_quantize(x, dtype, jax.random.fold_in(key, i)) for i, x in enumerate(leaves)]
        return QuantizedState(count, *(structure.unflatten([pair[i] for pair in pairs]) for i in range(2)))

    def init(params):
        return quantized(inner.init(params), jnp.zeros((), jnp.int32))

    def update(updates, state, params=None, **extra_args):
        values, structure = jax.tree.flatten(state.values, is_leaf=_is_basis)
        scales = structure.flatten_up_to(state.scales)
        wide = structure.unflatten([_dequantize(x, scale) for x, scale in zip(values, scales, strict=True)])
        updates, wide = inner.update(updates, wide, params, **extra_args)
        return updates, quantized(wide, optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init, update)


def _is_basis(x):
    return isinstance(x, Basis)


def _quantize(x, dtype, key):
    """The quantized array and its float32 scale; or the array itself, and a bool scalar."""
    unchanged = jnp.zeros((), jnp.bool)
    if _is_basis(x):
        return x, None
    if jnp.ndim(x) == 0 or x.dtype != jnp.float32:
        return x, unchanged
    if dtype == "bfloat16":
        return automatic(_to_bfloat16, (x, key), lambda: spec_of(x)), jnp.zeros((), jnp.float32)
    if x.shape[-1] < _SHORTEST_ROW:
        return x, unchanged

    def specs():
        spec = spec_of(x)
        return spec, P(*spec[:-1], None) if len(spec) == x.ndim else spec

    return automatic(_to_int8, (x, key), specs)


def _dequantize(x, scale):
    if scale is None or scale.dtype == jnp.bool:
        return x
    if x.dtype == jnp.bfloat16:
        return x.astype(jnp.float32)
    ratio = jnp.square(jnp.square(x.astype(jnp.float32) / _LEVELS))
    return jnp.sign(x).astype(jnp.float32) * scale * ratio


def _to_bfloat16(x, key):
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    up = (bits + jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)) & jnp.uint32(0xFFFF0000)
    # Infinity and NaN are not rounded.
    bits = jnp.where(jnp.isfinite(x), up, bits)
    return jax.lax.bitcast_convert_type(bits, jnp.float32).astype(jnp.bfloat16)


def _to_int8(x, key):
    size = jnp.abs(x)
    scale = jnp.max(size, axis=-1, keepdims=True)
    size = size / jnp.where(scale > 0, scale, 1)
    below = jnp.clip(jnp.floor(_LEVELS * jnp.sqrt(jnp.sqrt(size))), 0, _LEVELS - 1)
    low, high = ((level / _LEVELS) ** 4 for level in (below, below + 1))
    level = below + (jax.random.uniform(key, x.shape, x.dtype) < (size - low) / (high - low)).astype(x.dtype)
    # Nonzero entries are not rounded to zero: first moments are divided by the roots of second ones.
    level = jnp.where(size > 0, jnp.maximum(level, 1), 0)
    return (jnp.sign(x) * level).astype(jnp.int8), scale
