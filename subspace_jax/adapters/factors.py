"""The maths that LoRA and DoRA share: low-rank updates, scales by layer, column norms, dropout.

The kernel ``[*window, in / groups, out]`` of a convolution is treated as a matrix with ``window x in / groups`` rows.
Its ``a`` is a convolution to the rank, and its ``b`` a 1x1 convolution; with groups each group has its own part of the
rank, so that ``b [rank / groups, out]`` stands for a block-diagonal matrix.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from subspace_jax import kernels, linalg
from subspace_jax.adapters.structured import StructuredWeight, as_dense, axes_of, is_structured


def adapted(w: jax.Array | StructuredWeight, a: jax.Array, b: jax.Array, scale: jax.Array | float) -> jax.Array:
    """Returns ``w + scale * a @ b`` in float32, or in float64 if any argument is."""
    w = as_dense(w)
    dtype = linalg.working_dtype(w, a, b)
    update = jnp.matmul(a.astype(dtype), b.astype(dtype), precision=jax.lax.Precision.HIGHEST)
    scale = jnp.asarray(scale, dtype)
    return w.astype(dtype) + scale.reshape(*scale.shape, *(1,) * (w.ndim - scale.ndim)) * update


def remove(w: jax.Array, a: jax.Array, b: jax.Array, scale: float | tuple[float, ...]) -> jax.Array:
    """Returns ``w - scale * a @ b`` in the dtype of w."""
    return adapted(w, a, b, -jnp.asarray(scale, linalg.working_dtype(w, a, b))).astype(w.dtype)


def scaled(b: jax.Array, scale: float | tuple[float, ...]) -> jax.Array:
    """Returns ``scale * b``, in the dtype of b."""
    scale = jnp.asarray(scale, b.dtype)
    return scale.reshape(*scale.shape, *(1,) * (b.ndim - scale.ndim)) * b if scale.ndim else scale * b


def factor_axes(names: P, window: int) -> dict[str, P]:
    """Returns the logical axes of ``a`` and ``b`` from those of their weight.

    The rank has a name too: where the weight is sharded along one side only, the factor of the other side, and its
    optimizer state, would be replicated otherwise.
    """
    return {"a": P(*names[:-1], "rank"), "b": P(*names[: len(names) - 2 - window], "rank", names[-1])}


def scale_fields(scale: float | tuple[float, ...], base: jax.Array | P) -> dict:
    """Returns the fields of a structured weight for a scale: an array where layers differ, or its axes."""
    if isinstance(scale, tuple):
        names = axes_of(base)
        scales = jnp.asarray(scale, linalg.working_dtype(base)) if names is None else P(*names[:-2])
        return {"scales": scales, "scale": 0.0}
    return {"scale": scale}


def dropout_fields(rate: float, key: jax.Array | None, base: jax.Array | P, window: int) -> dict:
    """Returns the fields of a structured weight for dropout: a key for each stacked weight, or its axes."""
    if key is None or not rate:
        return {}
    names = axes_of(base)
    if names is not None:
        return {"key": P(*names[: len(names) - 2 - window]), "dropout": rate}
    lead = base.shape[: base.ndim - 2 - window]
    return {"key": jax.random.split(key, lead) if lead else key, "dropout": rate}


def drop_features(x: jax.Array, key: jax.Array | None, rate: float) -> jax.Array:
    """Applies dropout; without a key, returns x."""
    if key is None:
        return x
    kept = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(kept, x * jnp.asarray(1 / (1 - rate), x.dtype), 0)


def block_diagonal(b: jax.Array, groups: int) -> jax.Array:
    """Returns the matrix ``[..., rank, out]`` that ``b [..., rank / groups, out]`` stands for."""
    if groups == 1:
        return b
    *lead, rank, out = b.shape
    apart = b.reshape(*lead, rank, groups, out // groups)
    return jnp.einsum("...jho,gh->...gjho", apart, jnp.eye(groups, dtype=b.dtype)).reshape(*lead, -1, out)


def grouped_matmul(x: jax.Array, b: jax.Array, groups: int) -> jax.Array:
    """Multiplies channels ``[..., rank]`` by ``b [rank / groups, out]``, each group by its own columns."""
    b = b.astype(x.dtype)
    if groups == 1:
        return jnp.matmul(x, b)
    rank, out = b.shape
    apart = x.reshape(*x.shape[:-1], groups, rank)
    y = jnp.einsum("...gj,jgo->...go", apart, b.reshape(rank, groups, out // groups))
    return y.reshape(*x.shape[:-1], out)


def column_norm(w: jax.Array | StructuredWeight, a: jax.Array, b: jax.Array, scale: jax.Array | float) -> jax.Array:
    """Returns the norms ``[..., out]`` of the columns of ``w + scale * a @ b``.

    Stacked weights are mapped one at a time, so that a scan over layers gets the same bits.
    """
    if jnp.ndim(scale):
        return jax.lax.map(lambda xs: column_norm(*xs), (w, a, b, scale))
    if w.ndim > 2:
        return jax.lax.map(lambda xs: column_norm(*xs, scale), (w, a, b))
    return w.adapted_norm(a, b, scale) if is_structured(w) else kernels.dora_weight_norm(w, a, b, scale)


def gain(magnitude: jax.Array, norm: jax.Array, detach_norm: bool, dtype: jnp.dtype) -> jax.Array:
    """Returns ``magnitude / norm``, where the norm has a lower bound that depends on the dtype of the weight."""
    norm = jax.lax.stop_gradient(norm) if detach_norm else norm
    return magnitude.astype(norm.dtype) / jnp.maximum(norm, kernels.least_norm(dtype))
