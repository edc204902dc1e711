"""Initializations of the factors of LoRA and DoRA: kaiming, gaussian, PiSSA and LoRA-GA."""

import math
import warnings

import jax
import jax.numpy as jnp

from subspace_jax import linalg
from subspace_jax.adapters.factors import remove
from subspace_jax.adapters.quantized import as_matrix
from subspace_jax.adapters.structured import StructuredWeight

INITS = ("kaiming", "gaussian", "pissa", "pissa_randomized", "lora_ga")
# Those whose update begins at zero.
ZERO_UPDATE = ("kaiming", "gaussian")

Factors = dict[str, jax.Array]


def init_adapter(
    key: jax.Array, w: jax.Array | StructuredWeight, config, *, table: bool, gradient: jax.Array | None
) -> tuple[jax.Array | StructuredWeight, Factors]:
    """Draws ``a`` and ``b`` for a matrix, an embedding table or a convolution; returns the frozen part with them.

    Args:
      key: Random key.
      w: The weight.
      config: A :class:`subspace_jax.adapters.LoRA`.
      table: Whether the weight is an embedding table.
      gradient: Gradient of the weight, for LoRA-GA.
    """
    window, groups = config.window, config.groups
    if w.ndim < 2 + window or w.shape[-1] % groups:
        raise ValueError(f"window, groups: a weight {w.shape} is no kernel with a window of {window} axes, {groups=}")
    gradient = None if gradient is None else as_matrix(gradient, window)
    base, factors = _init_factors(key, as_matrix(w, window), config, table, gradient)
    if window:
        # With groups b is zero, for which any part of it will do.
        factors["b"] = factors["b"][..., : config.rank // groups, :]
        factors["a"] = factors["a"].reshape(*w.shape[:-1], -1)
        base = w if config.keeps_base else base.reshape(w.shape)
    return base, factors


def _init_factors(key, w, config, table, gradient):
    *lead, rows, columns = w.shape
    width = max(config.rank) if isinstance(config.rank, tuple) else config.rank
    for name, given in (("rank", config.rank), ("alpha", config.alpha)):
        if isinstance(given, tuple) and (len(lead) != 1 or len(given) != lead[0]):
            raise ValueError(f"{name}: {len(given)} for the layers of a weight {w.shape}")
    if width > min(rows, columns):
        warnings.warn(f"rank {width} exceeds the {min(rows, columns)} of a weight {w.shape}", stacklevel=5)
    if config.init in ZERO_UPDATE:
        return w, _zero_update(key, w, config, width, table)
    if isinstance(config.scale, tuple):
        raise ValueError(f"alpha: {config.init!r} takes one for all layers, got {config.alpha}")
    dtype = linalg.working_dtype(w)
    if config.init == "lora_ga":
        if gradient is None or gradient.shape != w.shape:
            got = None if gradient is None else gradient.shape
            raise ValueError(f"gradients: LoRA-GA needs that of each weight, for {w.shape} got {got}")
        a, b = lora_ga_factors(gradient.astype(dtype), width, key=key)
    else:
        if width > min(rows, columns):
            raise ValueError(
                f"rank: PiSSA has at most {min(rows, columns)} triplets of a weight {w.shape}, got {width}"
            )
        a, b = _pissa(key, w.astype(dtype), config, width)
    return remove(w, a, b, config.scale), {"a": a, "b": b}


def _zero_update(key, w, config, width, table) -> Factors:
    """One factor is random and the other zero; columns beyond the rank of a layer are zero."""
    *lead, rows, columns = w.shape
    dtype, ranks = linalg.working_dtype(w), config.rank
    used = jnp.arange(width)[None] < jnp.reshape(jnp.asarray(ranks), (-1, 1))
    used = used.astype(dtype).reshape(*(lead if isinstance(ranks, tuple) else [1] * len(lead)), 1, width)
    if table:
        b = jax.random.normal(key, (*lead, width, columns), dtype)
        return {"a": jnp.zeros((*lead, rows, width), dtype), "b": b * jnp.swapaxes(used, -1, -2)}
    if config.init == "kaiming":
        bound = 1 / math.sqrt(rows)
        a = jax.random.uniform(key, (*lead, rows, width), dtype, -bound, bound)
    else:
        a = jax.random.normal(key, (*lead, rows, width), dtype) / jnp.maximum(jnp.sum(used, -1, keepdims=True), 1)
    return {"a": a * used, "b": jnp.zeros((*lead, width, columns), dtype)}


def _pissa(key, w, config, width) -> tuple[jax.Array, jax.Array]:
    """The leading singular triplets, their values split evenly between both factors."""
    if config.init == "pissa":
        u, s, vt = linalg.canonical_svd(w)
        u, s, vt = u[..., :width], s[..., :width], vt[..., :width, :]
    else:
        u, s, vt = linalg.randomized_svd(key, w, width, oversample=16, power_steps=4)
    root = jnp.sqrt(s / config.scale)
    return u * root[..., None, :], root[..., :, None] * vt


def lora_ga_factors(
    gradient: jax.Array, rank: int, *, gamma: float = 16.0, key: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Returns the factors of LoRA-GA, whose first step best approximates that of the full weight.

    With the singular value decomposition ``u s vt`` of the gradient, ``a = c u[:, :r]`` and ``b = c vt[r:2r]`` where
    ``c = out^(1/4) / sqrt(gamma)``.  Subtract ``s a b`` from the frozen weight.

    Source: arXiv 2407.05000 ("ArB2r", stable scale), with the weights transposed.

    Args:
      gradient: Gradient of the weight over some batches, ``[..., in, out]``.
      rank: The rank r; ``2 r`` is at most the smaller side.
      gamma: Larger values give smaller factors.
      key: Random key of a sketch of ``4 r`` columns, for large gradients; None for an exact SVD.

    Returns:
      ``a [..., in, r]`` and ``b [..., r, out]``.

    Raises:
      ValueError: The rank is too large, or gamma is not positive.
    """
    least = min(gradient.shape[-2:])
    if not 1 <= rank <= least // 2:
        raise ValueError(f"rank: LoRA-GA takes twice the rank of triplets, {least} there are; got {rank}")
    if not gamma > 0:
        raise ValueError(f"gamma: expected a positive number, got {gamma}")
    full = gradient.astype(linalg.working_dtype(gradient))
    if key is None or 4 * rank >= least:
        u, _, vt = linalg.canonical_svd(full)
    else:
        u, _, vt = linalg.randomized_svd(key, full, 2 * rank, oversample=2 * rank, power_steps=4)
    size = gradient.shape[-1] ** 0.25 / math.sqrt(gamma)
    return size * u[..., :rank], size * vt[..., rank : 2 * rank, :]
