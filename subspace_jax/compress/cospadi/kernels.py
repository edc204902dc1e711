"""One unit of a model compressed: kernels and sums of their inputs in, what is stored out."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from subspace_jax import interop, linalg, nn
from subspace_jax.compress.cospadi.core import (
    asvd_compress,
    basis_sharing_compress,
    joined,
    sparse_factors,
    svd_compress,
)
from subspace_jax.compress.cospadi.gram import gram_factor
from subspace_jax.compress.cospadi.sizes import allocate

_TILE_BYTES = 2**25


class Learning(NamedTuple):
    """How CoSpaDi learns; see :func:`subspace_jax.linalg.fit_dictionary`.

    Attributes:
      n_iter: Most rounds.
      solver: "power", "svd" or "mod".
      init: "data" or "svd".
      tol: Share by which a round has to improve.
      seed: Seed of the draws.
      tile: Columns at a time in sparse coding; 0 takes what 32 MiB hold.
    """

    n_iter: int = 60
    solver: str = "power"
    init: str = "data"
    tol: float = 0.0
    seed: int = 42
    tile: int = 0


class Compressed(NamedTuple):
    """Kernels that were compressed together.

    Attributes:
      kernels: What is stored of each; the first factor of all but the first is theirs.
      errors: Relative output error of each on the calibration inputs, of the numbers that are stored.
    """

    kernels: list[interop.CompressedKernel]
    errors: list[float]


def compress_kernels(
    ws: Sequence[np.ndarray], sums: Sequence[linalg.GramState], ratio: float, method: str, learning: Learning
) -> Compressed:
    """Compresses kernels with their common factor.

    What the inputs' Gram matrices are factored for is computed in float64 on the host, the dictionary in float32 on the
    default device; not under jit.

    Args:
      ws: Kernels ``[d1, d2]`` of the layers that share.
      sums: Sums of the inputs of each.
      ratio: Share of the storage that is removed.
      method: One of :data:`subspace_jax.compress.cospadi.METHODS`.
      learning: How CoSpaDi learns.
    """
    with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
        wide = [jnp.asarray(w, jnp.float64) for w in ws]
        factor = gram_factor(jnp.asarray(sum(s.gram for s in sums), jnp.float64))
        if method == "cospadi":
            y = np.asarray(linalg.times(factor, joined(wide, factor)), np.float32)
    if method == "cospadi":
        k, s = allocate(*y.shape, ratio)
        learnt = jax.tree.map(np.asarray, _fit(y, k, s, learning._replace(tile=learning.tile or _tile(k, s))))
    with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
        if method == "cospadi":
            learnt = jax.tree.map(jnp.asarray, learnt._replace(dictionary=learnt.dictionary.astype(np.float64)))
            found = sparse_factors(learnt, factor, len(ws), jnp.float64)
        elif method == "svd":
            found = [svd_compress(w, ratio) for w in wide]
        elif method == "asvd":
            found = [
                asvd_compress(w, jnp.asarray(s.absolute / s.count), ratio) for w, s in zip(wide, sums, strict=True)
            ]
        else:
            found = basis_sharing_compress(wide, factor, ratio)
        stored = [_stored(x) for x in found]
        errors = [_error(x, w, s) for x, w, s in zip(stored, wide, sums, strict=True)]
    return Compressed(stored, errors)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _fit(y: jax.Array, k: int, s: int, learning: Learning) -> linalg.DictState:
    options = learning._asdict()
    return linalg.fit_dictionary(y, k, s, key=jax.random.key(options.pop("seed")), **options)


def _tile(k: int, s: int) -> int:
    """Returns the columns whose factors in sparse coding take 32 MiB: what a step reads, and a cache may hold."""
    return max(8, _TILE_BYTES // (4 * k * s))


def _stored(factor: nn.SparseFactor | nn.LowRankFactor) -> interop.CompressedKernel:
    if isinstance(factor, nn.LowRankFactor):
        return interop.CompressedKernel(
            "low_rank", *(np.asarray(x).astype(ml_dtypes.bfloat16) for x in (factor.a, factor.b))
        )
    dictionary = np.asarray(factor.dictionary).astype(ml_dtypes.bfloat16)
    values = np.asarray(nn.truncate_bf16(factor.values.astype(jnp.float32)))
    words = interop.pack_coefficients(values, np.asarray(factor.indices), dictionary.shape[1])
    return interop.CompressedKernel("sparse", dictionary, words)


def kernel_of(stored: interop.CompressedKernel) -> nn.SparseFactor | nn.LowRankFactor:
    """Returns a stored kernel as a structured weight of float32."""
    first = jnp.asarray(stored.first.astype(np.float32))
    if stored.kind == "low_rank":
        return nn.LowRankFactor(first, jnp.asarray(stored.second.astype(np.float32)))
    values, indices = interop.unpack_coefficients(stored.second, first.shape[1])
    return nn.SparseFactor(first, jnp.asarray(values.astype(np.float32)), jnp.asarray(indices))


def _error(stored: interop.CompressedKernel, w: jax.Array, sums: linalg.GramState) -> float:
    """Returns ``||X (W - V)|| / ||X W||`` from the Gram matrix alone."""
    gram = jnp.asarray(sums.gram, jnp.float64)
    difference = w - kernel_of(stored).dense().astype(jnp.float64)
    energy, whole = (jnp.vdot(x, linalg.times(gram, x)) for x in (difference, w))
    return float(jnp.sqrt(jnp.maximum(energy, 0) / jnp.maximum(whole, jnp.finfo(whole.dtype).tiny)))
