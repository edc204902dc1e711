"""Kernels in fewer numbers: CoSpaDi, and the low-rank methods that it is compared with.

"CoSpaDi: Compressing LLMs via Calibration-Guided Sparse Dictionary Learning", arXiv 2509.22075.  A kernel is
``[d1, d2]``, inputs by outputs; ``l [d1, d1]`` is the factor of :func:`gram_factor`.
"""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from subspace_jax import linalg
from subspace_jax.compress.cospadi.sizes import allocate, allocate_rank
from subspace_jax.nn import LowRankFactor, SparseFactor


def compress(
    w: jax.Array,
    l: jax.Array | None,
    ratio: float,
    *,
    init: jax.Array | Literal["data", "weight", "svd"] = "data",
    key: jax.Array | None = None,
    rho: float = 2.0,
    dtype: DTypeLike | None = None,
    **options: Any,
) -> SparseFactor:
    """Compresses a kernel to a dictionary and sparse coefficients by the error of its outputs.

    Learns ``L W = D S`` and returns ``L^{-1} D`` and ``S``.  Works under jit and vmap.

    Args:
      w: ``[d1, d2]``, float32 or float64.
      l: ``[d1, d1]``, upper triangular; None for the error of the kernel itself.
      ratio: Share of the storage that is removed, in (0, 1).
      init: First atoms, see :func:`subspace_jax.linalg.fit_dictionary`; "weight" draws columns of ``w``, as the paper
        says, which starts far from them.
      key: Key of the draws.
      rho: Atoms for each coefficient.
      dtype: Dtype of the dictionary learning, that of ``w`` by default.
      **options: Fields of :class:`subspace_jax.linalg.DictOptions`.

    Returns:
      The compressed kernel in the dtype of ``w``.

    Raises:
      ValueError: Shapes don't match, the ratio is out of range or leaves nothing, or an option is wrong.
    """
    return compress_group([w], l, ratio, init=init, key=key, rho=rho, dtype=dtype, **options)[0]


def compress_group(
    ws: Sequence[jax.Array],
    l: jax.Array | None,
    ratio: float,
    *,
    init: jax.Array | Literal["data", "weight", "svd"] = "data",
    key: jax.Array | None = None,
    rho: float = 2.0,
    dtype: DTypeLike | None = None,
    **options: Any,
) -> list[SparseFactor]:
    """Compresses kernels of several layers with one dictionary, in the metric of their summed Gram matrices.

    Args:
      ws: Kernels ``[d1, d2]``, each of its own layer.
      l: Factor of the sum of their Gram matrices.
      ratio: Share of the storage that is removed.  Other arguments: see :func:`compress`.
      init: First atoms.
      key: Key of the draws.
      rho: Atoms for each coefficient.
      dtype: Dtype of the dictionary learning.
      **options: Others.

    Returns:
      A compressed kernel for each layer, with the same dictionary.

    Raises:
      ValueError: See :func:`compress`.
    """
    w = joined(ws, l)
    k, s = allocate(*w.shape, ratio, rho)
    dtype = w.dtype if dtype is None else dtype
    key = jax.random.key(42) if key is None else key
    if isinstance(init, str) and init == "weight":
        init = linalg.first_atoms(key, w, k).astype(dtype)
    y = (w if l is None else linalg.times(l, w)).astype(dtype)
    learnt = linalg.fit_dictionary(y, k, s, init=init, key=key, **options)
    return sparse_factors(learnt, l, len(ws), w.dtype)


def sparse_factors(
    learnt: linalg.DictState,
    l: jax.Array | None,
    layers: int,
    dtype: DTypeLike,
) -> list[SparseFactor]:
    """Returns the kernels of what was learnt of ``L [W_1 ... W_m]``; the last step of :func:`compress_group`."""
    dictionary = _unwhitened(l, learnt.dictionary.astype(dtype))
    parts = (jnp.split(x, layers, axis=1) for x in (learnt.values.astype(dtype), learnt.indices))
    return [SparseFactor(dictionary, values, indices) for values, indices in zip(*parts, strict=True)]


def svd_compress(w: jax.Array, ratio: float) -> LowRankFactor:
    """Truncates the singular value decomposition of a kernel.

    Args:
      w: ``[d1, d2]``, float32 or float64.
      ratio: Share of the storage that is removed.

    Returns:
      The best kernel of that rank in the Frobenius norm.
    """
    return basis_sharing_compress([w], None, ratio)[0]


def asvd_compress(w: jax.Array, mean_absolute: jax.Array, ratio: float, alpha: float = 0.5) -> LowRankFactor:
    """Truncates the decomposition of a kernel whose inputs are scaled by their size (ASVD, arXiv 2312.05821).

    Args:
      w: ``[d1, d2]``, float32 or float64.
      mean_absolute: Mean of ``|x| [d1]`` over the calibration inputs.
      ratio: Share of the storage that is removed.
      alpha: Power of the scales.

    Raises:
      ValueError: Shapes don't match, or the ratio is out of range.
    """
    _check_kernel(w)
    if mean_absolute.shape != w.shape[:1]:
        raise ValueError(
            f"mean_absolute: expected shape {w.shape[:1]} for a kernel {w.shape}, got {mean_absolute.shape}"
        )
    scales = (jnp.power(mean_absolute, alpha) + 1e-6)[:, None].astype(w.dtype)
    a, b = _truncated(scales * w, allocate_rank(*w.shape, ratio))
    return LowRankFactor(a / scales, b)


def svd_llm_compress(w: jax.Array, l: jax.Array, ratio: float) -> LowRankFactor:
    """Truncates the decomposition of ``L W``: the least output error of that rank (SVD-LLM, arXiv 2403.07378).

    The whitening step of the method, without its updates of the factors.

    Args:
      w: ``[d1, d2]``, float32 or float64.
      l: ``[d1, d1]``, upper triangular.
      ratio: Share of the storage that is removed.

    Raises:
      ValueError: Shapes don't match, or the ratio is out of range.
    """
    return basis_sharing_compress([w], l, ratio)[0]


def basis_sharing_compress(ws: Sequence[jax.Array], l: jax.Array | None, ratio: float) -> list[LowRankFactor]:
    """Gives kernels of several layers one basis, in the metric of their summed inputs (arXiv 2410.03765).

    Args:
      ws: Kernels ``[d1, d2]``, each of its own layer.
      l: Factor of the sum of their Gram matrices; None for the error of the kernels themselves.
      ratio: Share of the storage that is removed.

    Returns:
      A compressed kernel for each layer, with the same ``a``.

    Raises:
      ValueError: Shapes don't match, or the ratio is out of range.
    """
    w = joined(ws, l)
    rank = allocate_rank(*ws[0].shape, ratio, len(ws))
    a, b = _truncated(w if l is None else linalg.times(l, w), rank)
    return [LowRankFactor(_unwhitened(l, a), part) for part in jnp.split(b, len(ws), axis=1)]


def _truncated(w: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    """Returns the leading singular triplets, the values split evenly over both factors."""
    left, values, right = jnp.linalg.svd(w, full_matrices=False)
    root = jnp.sqrt(values[:rank])
    return left[:, :rank] * root[None], root[:, None] * right[:rank]


def _unwhitened(l: jax.Array | None, factor: jax.Array) -> jax.Array:
    if l is None:
        return factor
    return jax.lax.linalg.triangular_solve(l, factor, left_side=True, lower=False)


def joined(ws: Sequence[jax.Array], l: jax.Array | None) -> jax.Array:
    """Returns kernels of one shape side by side, ``[d1, m d2]``; raises ValueError where they don't match."""
    if not ws:
        raise ValueError("ws: expected at least one kernel, got none")
    for w in ws:
        _check_kernel(w)
        if w.shape != ws[0].shape:
            raise ValueError(f"ws: expected kernels of one shape, got {ws[0].shape} and {w.shape}")
    if l is not None and l.shape != (ws[0].shape[0],) * 2:
        raise ValueError(f"l: expected shape {(ws[0].shape[0],) * 2} for a kernel {ws[0].shape}, got {l.shape}")
    return jnp.concatenate(ws, axis=1)


def _check_kernel(w: jax.Array) -> None:
    if w.ndim != 2 or w.dtype not in (jnp.float32, jnp.float64):
        raise ValueError(f"w: expected a kernel [d1, d2] of float32 or float64, got shape {w.shape} and {w.dtype}")
