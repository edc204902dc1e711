"""The public function: checks, the form of the sum, derivatives and shards."""

import functools

import jax
import jax.numpy as jnp

from subspace_jax import linalg
from subspace_jax.kernels._dispatch import check_implementation
from subspace_jax.kernels._shards import over_shards, vary_alike
from subspace_jax.kernels.subspace_residual import xla

_NO_KERNEL = "it has no kernel, because what XLA compiles reads the rows once and writes nothing but scores"


def subspace_residual(
    x: jax.Array,
    mean: jax.Array,
    basis: jax.Array | None = None,
    *,
    complement: jax.Array | None = None,
    implementation: str | None = None,
    block: int | None = None,
) -> jax.Array:
    """Squared distances of rows from an affine subspace, ``||(I - C C^T)(x - mean)||^2``.

    The anomaly score of SubspaceAD (arXiv 2602.23013, step 5 of the method, "reconstruction").  Give the basis C of the
    subspace, or that of its orthogonal complement, from :func:`complement_basis`::

        subspace_residual(x, mean, basis)                    # ||y - C C^T y||^2 with y = x - mean
        perp = complement_basis(basis)                       # once, after a fit
        subspace_residual(x, mean, complement=perp)          # ||perp^T y||^2

    For N rows of width D and a subspace of p dimensions the complement costs ``2 N D (D - p)`` FLOPs and the basis
    ``4 N D p``, so that the complement is cheaper for p > D / 3; it also cancels nothing.  A basis with p > D / 2 is
    made into ``I - C C^T`` first, ``2 N D^2`` FLOPs.  Never is the residual taken as a difference of energies, which
    in float32 would leave few digits of it.

    Memory: ``x`` is read once and scores are written, ``N D |x| + 4 N`` bytes.  Coordinates and reconstructions are
    made for a strip of rows at a time, of 16 MiB as float32 and 64 rows at least; on TPUs the complement form needs no
    strips.  The gradient makes them again, strip by strip: it reads ``x`` once more, and writes its own results.

    Sharded over Explicit mesh axes, each device scores the rows that it holds, and the columns of a complement may be
    split, for one sum of scores over the devices; other axes are gathered.  Under Auto axes the compiler does so if the
    rows are split over a power of two of devices up to 64, and their number is a multiple of it, of 16 times it on
    TPUs; it sums the gradients of ``mean`` and the basis over the devices once for each strip.
    Works under ``vmap``, which serves several subspaces too.

    Args:
      x: Rows ``[..., d]``, float32, bfloat16 or float64.
      mean: ``[d]``, float32 or float64.
      basis: Orthonormal columns ``[d, p]``, float32, bfloat16 or float64.  Its dtype decides how products are made:
        bfloat16 takes centred rows in bfloat16 to one pass of the matrix unit, which leaks about 2^-9 of their length
        into the residual; float32 keeps full float32 precision, whatever the dtype of ``x``.
      complement: Orthonormal columns ``[d, d - p]`` of the complement, in place of ``basis``; dtypes as there.
      implementation: None or "xla".
      block: Rows that are worked on at a time; None for a value by width.

    Returns:
      Scores ``[...]``, float32, or float64 if any argument is: squares, which float32 holds of distances between 1e-19
      and 1e19.  Derivatives are those of the formula used, for columns
      that are not orthonormal too.

    Raises:
      ValueError: Neither or both of ``basis`` and ``complement`` are given, shapes don't fit together, an axis is
        empty, or the implementation doesn't exist or can't serve.
      TypeError: A dtype is none of the above.
    """
    if (basis is None) == (complement is None):
        raise ValueError("basis, complement: expected one of the two, got " + ("neither" if basis is None else "both"))
    name, columns = ("basis", basis) if complement is None else ("complement", complement)
    _check(x, mean, name, columns, block)
    check_implementation("subspace_residual", implementation, x, refusal=_NO_KERNEL)
    return _subspace_residual(x, mean, columns, complement is not None, block)


def complement_basis(basis: jax.Array) -> jax.Array:
    """Orthonormal columns of the orthogonal complement of a subspace, by a full QR: for set-up, not for a step.

    Args:
      basis: Orthonormal columns ``[..., d, p]`` with p < d, float32, bfloat16 or float64.

    Returns:
      ``[..., d, d - p]``, float32, or float64 if ``basis`` is.  Any rotation of the columns would do as well.

    Raises:
      ValueError: ``basis`` is not taller than wide, or has no columns.
      TypeError: ``basis`` is none of these dtypes.
    """
    _check_dtype("basis", basis)
    if basis.ndim < 2 or not 1 <= basis.shape[-1] < basis.shape[-2]:
        raise ValueError(f"basis: expected [..., d, p] with 1 <= p < d, got {basis.shape}")
    basis = basis.astype(linalg.working_dtype(basis))
    rest = jnp.linalg.qr(basis, mode="complete")[0][..., basis.shape[-1] :]
    # Reflections leave several roundings; what of them lies in the subspace would be leaked into every score.
    rest = rest - linalg.times(basis, linalg.gram(basis, rest))
    return linalg.polar_step(rest)


def _check(x, mean, name, columns, block):
    if x.ndim < 1 or 0 in x.shape:
        raise ValueError(f"x: expected rows [..., d] without empty axes, got shape {x.shape}")
    d = x.shape[-1]
    if mean.shape != (d,):
        raise ValueError(f"mean: expected shape {(d,)} for rows of shape {x.shape}, got {mean.shape}")
    if columns.ndim != 2 or columns.shape[0] != d or not 1 <= columns.shape[1] <= d:
        raise ValueError(f"{name}: expected ({d}, p) with 1 <= p <= {d}, got {columns.shape}")
    _check_dtype("x", x)
    _check_dtype(name, columns)
    if mean.dtype not in (jnp.float32, jnp.float64):
        raise TypeError(f"mean: expected float32 or float64, got {mean.dtype}")
    if block is not None and (not isinstance(block, int) or block < 1):
        raise ValueError(f"block: expected a positive number of rows, or None, got {block!r}")


def _check_dtype(name, x):
    if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float64):
        raise TypeError(f"{name}: expected float32, bfloat16 or float64, got {x.dtype}")


@functools.partial(jax.jit, static_argnums=(3, 4))
def _subspace_residual(x, mean, columns, complement, block):
    return _residual(*vary_alike(x, mean, columns), complement, block)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _residual(x, mean, columns, complement, block):
    run = functools.partial(xla.residual, complement=complement, block=block)
    rows = _rows(x)
    return over_shards(run, f"{rows} d, d, d p -> {rows}", together=_together(complement))(x, mean, columns)


def _forward(x, mean, columns, complement, block):
    return _residual(x, mean, columns, complement, block), (x, mean, columns)


def _backward(complement, block, kept, weights):
    run = functools.partial(xla.gradients, complement=complement, block=block)
    rows = _rows(kept[0])
    rule = f"{rows} d, d, d p, {rows} -> {rows} d, d, d p"
    grads = over_shards(run, rule, together=_together(complement))(*kept, weights)
    return tuple(map(_sharded_like, grads, kept))


def _sharded_like(grad, x):
    """A gradient sharded as its argument is: an axis that was gathered is split again."""
    wanted = jax.typeof(x).sharding.spec
    return grad if jax.typeof(grad).sharding.spec == wanted else jax.sharding.reshard(grad, wanted)


_residual.defvjp(_forward, _backward)


def _rows(x) -> str:
    return " ".join(f"rows{i}" for i in range(x.ndim - 1))


def _together(complement) -> tuple[str, ...]:
    return ("d",) if complement else ("d", "p")
