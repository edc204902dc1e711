"""The public function: checks, derivatives and shards."""

import functools

import jax
import jax.numpy as jnp

from subspace_jax import linalg
from subspace_jax.kernels._dispatch import check_implementation
from subspace_jax.kernels._shards import leading_axes, over_shards, sharded_like, vary_alike
from subspace_jax.kernels.subspace_residual import xla

_NO_KERNEL = "it has no kernel, because XLA reads the rows once and writes nothing but scores"


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

    The anomaly score of SubspaceAD (arXiv 2602.23013, step 5 of the method, "reconstruction").  Takes the basis C of
    the subspace, or that of its orthogonal complement, from :func:`complement_basis`::

        subspace_residual(x, mean, basis)                    # ||y - C C^T y||^2 with y = x - mean
        perp = complement_basis(basis)                       # once, after a fit
        subspace_residual(x, mean, complement=perp)          # ||perp^T y||^2

    For N rows of width D and a subspace of p dimensions the complement costs ``2 N D (D - p)`` FLOPs and the basis
    ``4 N D p``: the complement is cheaper for p > D / 3, and has no cancellation.  A basis with p > D / 2 is replaced
    by ``I - C C^T`` first, ``2 N D^2`` FLOPs.  The residual is never computed as a difference of energies, which would
    leave few digits in float32.

    Memory: ``x`` is read once and scores are written, ``N D |x| + 4 N`` bytes.  Coordinates and reconstructions exist
    for one strip of rows at a time, of 16 MiB as float32 and at least 64 rows; on TPUs the complement form needs no
    strips.  The gradient recomputes them strip by strip: it reads ``x`` once more, and writes its own results.

    Sharded over Explicit mesh axes, each device scores its rows, and the columns of a complement may be sharded, for
    one sum of scores over the devices; other axes are gathered.  Under Auto axes the compiler does so if the rows are
    sharded over a power of two of devices up to 64, and their number is a multiple of it, of 16 times it on TPUs; it
    sums the gradients of ``mean`` and the basis over the devices once per strip.  Works under ``vmap``, over subspaces
    too.

    Args:
      x: Rows ``[..., d]``, float32, bfloat16 or float64.
      mean: ``[d]``, float32 or float64.
      basis: Orthonormal columns ``[d, p]``, float32, bfloat16 or float64.  Its dtype is that of the matmuls: bfloat16
        rounds centered rows to bfloat16 for one pass of the matrix unit, which leaks about 2^-9 of their length into
        the residual; float32 keeps full float32 precision, for any dtype of ``x``.
      complement: Orthonormal columns ``[d, d - p]`` of the complement, instead of ``basis``; same dtypes.
      implementation: None or "xla".
      block: Rows per strip; None for a value by width.

    Returns:
      Scores ``[...]``, float32, or float64 if any argument is.  They are squares: distances between 1e-19 and 1e19 are
      in the range of float32.  Derivatives are those of the formula used, also for columns that are not orthonormal.

    Raises:
      ValueError: Neither or both of ``basis`` and ``complement`` are given, shapes do not match, an axis is empty, or
        the implementation does not exist or is not supported.
      TypeError: A dtype is not supported.
    """
    if (basis is None) == (complement is None):
        raise ValueError("basis, complement: expected one of the two, got " + ("neither" if basis is None else "both"))
    name, columns = ("basis", basis) if complement is None else ("complement", complement)
    _check(x, mean, name, columns, block)
    check_implementation("subspace_residual", implementation, _NO_KERNEL)
    return _subspace_residual(x, mean, columns, complement is not None, block)


def complement_basis(basis: jax.Array) -> jax.Array:
    """Returns orthonormal columns of the orthogonal complement of a subspace, by a full QR: for set-up.

    Args:
      basis: Orthonormal columns ``[..., d, p]`` with p < d, float32, bfloat16 or float64.

    Returns:
      ``[..., d, d - p]``, float32, or float64 if ``basis`` is; unique up to a rotation of the columns.

    Raises:
      ValueError: ``basis`` is not taller than wide, or has no columns.
      TypeError: The dtype is not supported.
    """
    _check_dtype("basis", basis)
    if basis.ndim < 2 or not 1 <= basis.shape[-1] < basis.shape[-2]:
        raise ValueError(f"basis: expected [..., d, p] with 1 <= p < d, got {basis.shape}")
    basis = basis.astype(linalg.working_dtype(basis))
    rest = jnp.linalg.qr(basis, mode="complete")[0][..., basis.shape[-1] :]
    # Reflections leave several roundings, which would leak into every score.
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
    rows = leading_axes(x, 1)
    return over_shards(run, f"{rows} d, d, d p -> {rows}", gathered=_gathered(complement))(x, mean, columns)


def _forward(x, mean, columns, complement, block):
    return _residual(x, mean, columns, complement, block), (x, mean, columns)


def _backward(complement, block, kept, weights):
    run = functools.partial(xla.gradients, complement=complement, block=block)
    rows = leading_axes(kept[0], 1)
    rule = f"{rows} d, d, d p, {rows} -> {rows} d, d, d p"
    grads = over_shards(run, rule, gathered=_gathered(complement))(*kept, weights)
    return tuple(map(sharded_like, grads, kept))


_residual.defvjp(_forward, _backward)


def _gathered(complement) -> tuple[str, ...]:
    return ("d",) if complement else ("d", "p")
