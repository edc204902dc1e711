"""Decoders of sparse codes: linear, and polynomial with a shared or a separate factor of each order."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from subspace_jax import linalg
from subspace_jax.interpret.polysae.settings import PolySAEConfig
from subspace_jax.interpret.polysae.shards import Shards, first_feature, total
from subspace_jax.interpret.polysae.sparsify import SparseCode

Params = Mapping[str, jax.Array]
Code = jax.Array | SparseCode
_WHOLE = Shards()
_LEAST_NORM = 1e-8


def poly_decode(
    params: Params, z: Code, order: int = 3, *, dtype: DTypeLike | None = None, shards: Shards = _WHOLE
) -> jax.Array:
    """Decodes by a polynomial with one factor for all orders.

    ``a = z U``, ``x = b + a C1^T + lambda2 (a[:, :R2]^2) C2^T + lambda3 (a[:, :R3]^3) C3^T``, which equals ``b + A z +
    lambda2 B(z, z) + lambda3 Gamma(z, z, z)`` with symmetric tensors that are never made (arXiv 2602.01322).  The ranks
    are those of the parameters.

    Args:
      params: ``U [m, R1]``, ``C1 [d, R1]``, ``b_dec [d]``; of order 2 and more ``C2 [d, R2]`` and ``lambda2``, of order
        3 ``C3 [d, R3]`` and ``lambda3``, scalars.
      z: Code ``[B, m]``, or a :class:`SparseCode`, of which k rows of U are read and no ``[B, m]`` is made.
      order: Degree, 1 to 3.
      dtype: Type of the factors of matmuls, that of the arrays by default; sums and powers are at least float32.
      shards: Mesh axes, inside ``shard_map``, where codes and U are those of this device's features.

    Returns:
      Reconstructions, ``[B, d]``.

    Raises:
      ValueError: The order is not 1, 2 or 3, or code and factor differ in the number of features.
    """
    _check_order(order)
    a = _project(z, params["U"], dtype, shards)
    out = params["b_dec"][None] + matmul(a, params["C1"].T, dtype)
    for power in range(2, order + 1):
        c = params[f"C{power}"]
        out = out + params[f"lambda{power}"] * matmul(a[:, : c.shape[1]] ** power, c.T, dtype)
    return out


def poly_decode_separate(
    params: Params, z: Code, order: int = 3, *, dtype: DTypeLike | None = None, shards: Shards = _WHOLE
) -> jax.Array:
    """Decodes by a polynomial with a factor ``U1 [m, R1]``, ``U2 [m, R2]``, ``U3 [m, R3]`` of each order.

    With ``p_j = z U_j`` the terms are ``p1 C1^T``, ``(p1[:, :R2] p2) C2^T`` and ``(p1[:, :R3] p2[:, :R3] p3) C3^T``.
    Other arguments, and what is raised: see :func:`poly_decode`.
    """
    _check_order(order)
    projected = [_project(z, params[f"U{j}"], dtype, shards) for j in range(1, order + 1)]
    out = params["b_dec"][None] + matmul(projected[0], params["C1"].T, dtype)
    for power in range(2, order + 1):
        rank = projected[power - 1].shape[1]
        product = functools.reduce(jnp.multiply, [p[:, :rank] for p in projected[:power]])
        out = out + params[f"lambda{power}"] * matmul(product, params[f"C{power}"].T, dtype)
    return out


def linear_decode(params: Params, z: Code, *, dtype: DTypeLike | None = None, shards: Shards = _WHOLE) -> jax.Array:
    """Decodes by a dictionary ``W_dec [m, d]``: ``z W_dec + b_dec``; see :func:`poly_decode`."""
    return params["b_dec"][None] + _project(z, params["W_dec"], dtype, shards)


def decode(config: PolySAEConfig, params: Params, z: Code, shards: Shards = _WHOLE) -> jax.Array:
    """Decodes as a config says, ``[B, d]``; the division of ``rescale`` is left to the caller."""
    if config.decoder == "linear":
        return linear_decode(params, z, dtype=config.dtype, shards=shards)
    poly = poly_decode if config.decoder == "shared" else poly_decode_separate
    return poly(params, z, config.order, dtype=config.dtype, shards=shards)


def decoder_norms(config: PolySAEConfig, params: Params) -> jax.Array:
    """Returns the norm of what each feature alone, at 1, adds to a reconstruction, ``[m]``.

    Of the shared factor: the norms of the rows of ``U C1^T + lambda2 (U[:, :R2]^2) C2^T + lambda3 (U[:, :R3]^3) C3^T``.
    """
    if config.decoder == "linear":
        return jnp.linalg.norm(params["W_dec"], axis=1)
    names = ("U",) * 3 if config.decoder == "shared" else ("U1", "U2", "U3")
    rows = jnp.zeros((), params["C1"].dtype)
    for power in range(1, config.order + 1):
        c = params[f"C{power}"]
        factors = functools.reduce(jnp.multiply, [params[name][:, : c.shape[1]] for name in names[:power]])
        term = matmul(factors, c.T, config.dtype)
        rows = term if power == 1 else rows + params[f"lambda{power}"] * term
    return jnp.linalg.norm(rows, axis=1)


def linear_directions(config: PolySAEConfig, params: Params) -> jax.Array:
    """Returns the unit vectors along which features act to first order, ``[m, d]``; norms below 1e-8 count as that."""
    if config.decoder == "linear":
        rows = params["W_dec"]
    else:
        rows = linalg.times(params["U" if config.decoder == "shared" else "U1"], params["C1"].T)
    return rows / jnp.maximum(jnp.linalg.norm(rows, axis=1, keepdims=True), _LEAST_NORM)


def interaction_strength(params: Params, pairs: jax.Array | None = None) -> jax.Array:
    """Returns ``|lambda2| ||B[:, i, j]||`` of pairs of features, how much two of them add beyond their sum.

    The square is the form ``(U_i U_j)^T (C2^T C2) (U_i U_j)`` of products of R2 entries.

    Args:
      params: Parameters of the shared or the separate form, of order 2 or more.
      pairs: Pairs of features, ``[pairs, 2]`` integers; all of them by default, which takes ``m^2`` numbers.

    Returns:
      ``[pairs]``, or ``[m, m]``.

    Raises:
      ValueError: The decoder has no second order.
    """
    if "C2" not in params:
        raise ValueError(f"params: expected a decoder of order 2 or 3, got {sorted(params)}")
    c = params["C2"]
    u, v = (params.get(name, params.get("U"))[:, : c.shape[1]] for name in ("U1", "U2"))
    size = jnp.abs(params["lambda2"])
    if pairs is not None:
        first, second = pairs[:, 0], pairs[:, 1]
        products = (u[first] * v[second] + u[second] * v[first]) / 2
        return size * jnp.linalg.norm(linalg.times(products, c.T), axis=1)
    g = linalg.gram(c, c)

    def of_feature(i):
        products = (u[i][None] * v + v[i][None] * u) / 2
        return jnp.sqrt(jnp.maximum(jnp.sum(linalg.times(products, g) * products, axis=1), 0))

    return size * jax.lax.map(of_feature, jnp.arange(len(u)))


def matmul(x: jax.Array, y: jax.Array, dtype: DTypeLike | None = None) -> jax.Array:
    """Multiplies with factors rounded to a type and sums of at least float32."""
    kept = linalg.working_dtype(x)
    if dtype is not None and jnp.dtype(dtype) == jnp.bfloat16:
        x, y = x.astype(jnp.bfloat16), y.astype(jnp.bfloat16)
    return jnp.matmul(x, y, preferred_element_type=kept)


def _project(z: Code, table: jax.Array, dtype: DTypeLike | None, shards: Shards) -> jax.Array:
    """Returns ``z @ table`` for rows of a table by feature, over all devices."""
    if isinstance(z, SparseCode):
        start = first_feature(len(table), shards.features)
        local = z.indices - start
        there = (local >= 0) & (local < len(table))
        values = jnp.where(there, z.values, 0)
        return total(gather_rows(values, jnp.where(there, local, 0), jnp.asarray(table)), shards.features)
    if z.shape[1] != len(table):
        raise ValueError(f"z: expected codes of {len(table)} features, as the decoder has, got shape {list(z.shape)}")
    return total(matmul(z, table, dtype), shards.features)


@jax.custom_vjp
def gather_rows(values: jax.Array, indices: jax.Array, table: jax.Array) -> jax.Array:
    """Returns weighted sums of rows of a table, one feature of each code at a time.

    Neither this nor its derivative makes an array ``[B, k, R]`` or ``[B, m]``.

    Args:
      values: ``[B, k]``.
      indices: ``[B, k]`` integers, rows of the table.
      table: ``[m, R]``.

    Returns:
      ``[B, R]``.
    """

    def add(j, sums):
        return sums + values[:, j, None] * table[indices[:, j]]

    start = jnp.zeros((len(values), table.shape[1]), table.dtype)
    return jax.lax.fori_loop(0, values.shape[1], add, start)


def _gather_forward(values, indices, table):
    return gather_rows(values, indices, table), (values, indices, table)


def _gather_backward(kept, g):
    values, indices, table = kept

    def add(j, grads):
        of_values, of_table = grads
        rows = indices[:, j]
        of_values = of_values.at[:, j].set(jnp.sum(table[rows] * g, axis=1))
        return of_values, of_table.at[rows].add(values[:, j, None] * g)

    grads = jax.lax.fori_loop(0, values.shape[1], add, (jnp.zeros_like(values), jnp.zeros_like(table)))
    return grads[0], None, grads[1]


gather_rows.defvjp(_gather_forward, _gather_backward)


def _check_order(order: int) -> None:
    if order not in (1, 2, 3):
        raise ValueError(f"order: expected 1, 2 or 3, got {order!r}")
