"""A linear state-space layer as the fewest heads: on the host, in float64, before anything is compiled."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

from subspace_jax.interpret.attention_ssm._checks import check_heads, check_length, check_tolerance
from subspace_jax.interpret.attention_ssm.heads import HeadBank, Modes
from subspace_jax.interpret.attention_ssm.rank import check_lags
from subspace_jax.interpret.attention_ssm.ssm import LinearSSM, check_ssm, dense_transition

BASES = ("svd", "pivoted", "modal", "companion")
# Eigenvalues nearer than this, relative to the largest, are one; eigenvectors of a larger condition are refused.
_EQUAL, _CONDITION = 1e-8, 1e8
# Columns of the block Hankel matrix from which decays are read.
_HANKEL_COLUMNS = 512


class _Span(NamedTuple):
    """Lag operators as ``coordinates [n, r]`` in an orthonormal basis ``[r, p d]`` of their span."""

    coordinates: np.ndarray
    basis: np.ndarray


def heads_from_lags(lags: jax.Array, k: int | None = None, basis: str = "svd", *, tol: float | None = None) -> HeadBank:
    """Returns heads whose operators at each lag are those given (arXiv 2512.15115, head-count theorem).

    As many heads as the interaction rank are necessary and enough, with free coefficients; nothing is claimed of
    softmax, whose coefficients are positive and add up to 1.  Runs on the host.

    Args:
      lags: Operators by lag, ``[n, p, d]``.
      k: Number of heads; the interaction rank by default.  Fewer are the best ("svd") or good ("pivoted") ones.
      basis: "svd": orthonormal operators; "pivoted": some of the operators given, chosen one by one; "companion": the
        first of them that are independent; "modal": decays that explain all of them, read from the operators alone,
        which gives recurrences.  The latter two are exact or refused, and take no ``k``.
      tol: Relative threshold of singular values that are 0; ``10 sqrt(max(n, p d)) eps`` by default, about what the
        rounding of the operators makes of a 0.

    Returns:
      The heads, in the dtype of ``lags``, at least float32.  There are more of "modal" than the interaction rank where
      the operators of the decays are dependent.

    Raises:
      ValueError: ``lags`` are no operators or not finite, ``k``, ``basis`` or ``tol`` is out of range, the basis
        takes no ``k``, or no recurrence explains the operators.
    """
    check_lags(lags)
    _check_options(k, basis, tol)
    own = np.asarray(lags, np.float64)
    flat = own.reshape(len(own), -1)
    tol = 10 * np.sqrt(max(flat.shape)) * float(jnp.finfo(_dtype(lags)).eps) if tol is None else tol
    u, s, vt = np.linalg.svd(flat, full_matrices=False)
    span = _Span(u * s, vt)
    if basis == "modal":
        decays, residues = _decays_of_lags(span, own, tol)
        return _modal_bank(decays, residues, own[0], len(own), tol, _dtype(lags))
    return _bank(span, own.shape[1:], k, basis, tol, _dtype(lags))


def heads_from_ssm(
    ssm: LinearSSM, n: int, k: int | None = None, basis: str = "svd", *, tol: float | None = None
) -> HeadBank:
    """Returns heads that equal a linear state-space layer on sequences of up to ``n`` tokens.

    Takes memory for ``n`` coefficients of each head, and never holds the operators of all lags: these lie in the span
    of the first ``N + 1`` of them, to which some at growing distances are added, for slow modes hardly differ in the
    first.  Coefficients come from ``sqrt(n)`` small and ``sqrt(n)`` large powers of ``A``.  Runs on the host.

    Args:
      ssm: The layer.
      n: Number of lags.
      k: Number of heads, see :func:`heads_from_lags`.
      basis: See :func:`heads_from_lags`; "modal" takes the eigenvalues of ``A``, equal ones together: a real one is a
        head, a complex pair two.
      tol: See :func:`heads_from_lags`; ``eps`` is that of float64, as the layer is taken to be exact.

    Returns:
      The heads, in the dtype of the layer.

    Raises:
      ValueError: The layer is malformed or not finite, ``n``, ``k``, ``basis`` or ``tol`` is out of range, or ``A``
        has no basis of eigenvectors (for "modal").
    """
    check_length(n)
    check_ssm(ssm)
    _check_options(k, basis, tol)
    real = jnp.real(ssm.B)
    p, d = ssm.C.shape[0], ssm.B.shape[1]
    tol = 10 * np.sqrt(max(n, p * d)) * np.finfo(np.float64).eps if tol is None else tol
    if basis == "modal":
        decays, residues = _decays_of_ssm(ssm)
        first = np.sum(residues.real, axis=0) + _skip(ssm)
        return _modal_bank(decays, residues, first, n, tol, _dtype(real))
    return _bank(_span_of_ssm(ssm, n), (p, d), k, basis, tol, _dtype(real))


def _check_options(k: int | None, basis: str, tol: float | None) -> None:
    if basis not in BASES:
        raise ValueError(f"basis: expected one of {BASES}, got {basis!r}")
    check_tolerance(tol)
    if k is not None and basis in ("modal", "companion"):
        raise ValueError(f"k: the basis {basis!r} has as many heads as it needs; expected None, got {k}")


def _dtype(x: jax.Array) -> np.dtype:
    return np.dtype(np.float64 if x.dtype == np.float64 else np.float32)


def _skip(ssm: LinearSSM) -> np.ndarray:
    return np.zeros((ssm.C.shape[0], ssm.B.shape[1])) if ssm.D is None else np.asarray(ssm.D, np.float64)


def _span_of_ssm(ssm: LinearSSM, n: int) -> _Span:
    a = dense_transition(ssm)
    b, c = (
        np.asarray(x).astype(a.dtype if np.iscomplexobj(a) else np.result_type(x.dtype, np.float64)) for x in ssm[1:3]
    )
    states, p, d = len(a), len(c), b.shape[1]
    count = min(n, states + 1)
    far = np.unique(np.round(np.geomspace(max(count, 1), n, 4 * count)).astype(int) - 1)
    sampled, power, at = [], b, 0
    for lag in np.unique(np.concatenate([np.arange(count), far])):
        power = np.linalg.matrix_power(a, lag - at) @ power
        sampled.append((c @ power).real)
        at = lag
    sampled[0] = sampled[0] + _skip(ssm)
    flat = np.reshape(sampled, (len(sampled), p * d))
    _, s, basis = np.linalg.svd(flat, full_matrices=False)
    basis = basis[: max(1, int(np.sum(s > np.finfo(np.float64).eps * s[0])))]
    # coordinates[l, h] = <basis_h, Re C A^l B> = Re <(A^T)^j C^T basis_h, A^(l - j) B>, l - j a multiple of the size.
    size = int(np.ceil(np.sqrt(n)))
    left = [np.einsum("pN,hpd->hNd", c, basis.reshape(-1, p, d))]
    for _ in range(size - 1):
        left.append(np.einsum("MN,hMd->hNd", a, left[-1]))
    stride, right = np.linalg.matrix_power(a, size), [b]
    for _ in range(-(-n // size) - 1):
        right.append(stride @ right[-1])
    products = np.reshape(right, (len(right), -1)) @ np.reshape(left, (size * len(basis), -1)).T
    coordinates = products.real.reshape(-1, len(basis))[:n]
    coordinates[0] = basis @ flat[0]
    return _Span(coordinates, basis)


def _bank(span: _Span, shape: tuple[int, int], k: int | None, basis: str, tol: float, dtype: np.dtype) -> HeadBank:
    """Returns the heads of the operators of a span."""
    most = min(len(span.coordinates), shape[0] * shape[1])
    u, s, vt = np.linalg.svd(span.coordinates, full_matrices=False)
    rank = max(1, int(np.sum(s > tol * s[0])))
    if k is not None:
        check_heads(k, most)
        # Beyond the span of the operators heads are 0.
        rank = min(k, len(s))
    if basis == "svd":
        coef, chosen = u[:, :rank] * s[:rank], vt[:rank]
    else:
        rows = _pivots(span.coordinates, rank) if basis == "pivoted" else _first_independent(span.coordinates, rank)
        chosen = span.coordinates[rows]
        coef = np.linalg.lstsq(chosen.T, span.coordinates.T, rcond=None)[0].T
        if k is None:
            _check_residual(coef @ chosen - span.coordinates, span.coordinates, tol, basis)
    values = (chosen @ span.basis).reshape(rank, *shape)
    if k is not None and k > rank:
        coef, values = np.pad(coef, ((0, 0), (0, k - rank))), np.pad(values, ((0, k - rank), (0, 0), (0, 0)))
    return HeadBank(jnp.asarray(coef.astype(dtype)), jnp.asarray(values.astype(dtype)))


def _pivots(coordinates: np.ndarray, count: int) -> np.ndarray:
    return scipy.linalg.qr(coordinates.T, mode="r", pivoting=True)[1][:count]


def _first_independent(coordinates: np.ndarray, count: int) -> np.ndarray:
    """Returns the first rows that are not in the span of earlier ones."""
    rows, known = [], np.zeros((0, coordinates.shape[1]))
    for row, x in enumerate(coordinates):
        rest = x - known.T @ (known @ x)
        rest = rest - known.T @ (known @ rest)
        if np.linalg.norm(rest) > _EQUAL * np.linalg.norm(x):
            rows.append(row)
            known = np.concatenate([known, rest[None] / np.linalg.norm(rest)])
        if len(rows) == count:
            break
    return np.asarray(rows)


def _check_residual(residual: np.ndarray, of: np.ndarray, tol: float, basis: str) -> None:
    share = np.linalg.norm(residual) / max(np.linalg.norm(of), np.finfo(np.float64).tiny)
    if share > max(np.sqrt(tol), _EQUAL):
        raise ValueError(
            f"basis: {basis!r} leaves a relative error of {share:.1e} of these operators; 'svd' serves them"
        )


def _decays_of_ssm(ssm: LinearSSM) -> tuple[np.ndarray, np.ndarray]:
    """Returns eigenvalues ``[N]`` and their residues ``[N, p, d]``: ``K_l = Re sum_m decay_m^l residue_m``."""
    a, b, c = dense_transition(ssm), np.asarray(ssm.B), np.asarray(ssm.C)
    if ssm.A.ndim == 1:
        decays, right, left = np.diagonal(a), c, b
    else:
        decays, vectors = np.linalg.eig(a)
        if np.linalg.cond(vectors) > _CONDITION:
            raise ValueError("A: has no well-conditioned basis of eigenvectors, for 'modal'; basis 'svd' serves it")
        right, left = c @ vectors, np.linalg.solve(vectors, b.astype(vectors.dtype))
    return decays.astype(np.complex128), np.einsum("pm,md->mpd", right, left).astype(np.complex128)


def _decays_of_lags(span: _Span, lags: np.ndarray, tol: float) -> tuple[np.ndarray, np.ndarray]:
    """Reads decays and residues from operators, by the shift invariance of their block Hankel matrix (Ho, Kalman)."""
    rows = span.coordinates[1:]  # lag 0 has D
    count = len(rows)
    if not np.any(np.abs(rows) > tol * np.linalg.norm(span.coordinates)):
        return np.zeros(0, np.complex128), np.zeros((0, *lags.shape[1:]), np.complex128)
    width = max(1, min(count // 2, _HANKEL_COLUMNS // rows.shape[1]))
    hankel = np.concatenate([rows[i : count - width + 1 + i] for i in range(width)], axis=1)
    u, s, _ = np.linalg.svd(hankel, full_matrices=False)
    order = int(np.sum(s > tol * s[0]))
    if order >= len(u):
        raise ValueError(f"basis: 'modal' finds no recurrence of less than {len(u)} decays in {len(lags)} lags")
    shift = np.linalg.lstsq(u[:-1, :order], u[1:, :order], rcond=None)[0]
    decays = np.linalg.eigvals(shift).astype(np.complex128)
    powers = decays[None] ** np.arange(1, count + 1)[:, None]
    residues = np.linalg.lstsq(powers, rows.astype(np.complex128), rcond=None)[0]
    _check_residual(powers @ residues - rows, span.coordinates, tol, "modal")
    return decays, (residues @ span.basis).reshape(order, *lags.shape[1:])


def _modal_bank(
    decays: np.ndarray, residues: np.ndarray, first: np.ndarray, n: int, tol: float, dtype: np.dtype
) -> HeadBank:
    """Returns heads of ``K_l = Re sum_m decay_m^l residue_m`` for ``l >= 1``, and ``K_0 = first``."""
    decays, residues = _merged(decays, residues)
    scale = max([np.linalg.norm(first), *np.linalg.norm(residues.reshape(len(residues), -1), axis=1)])
    found = []
    for decay, residue in zip(decays, residues, strict=True):
        # Re(decay^l R) = Re(decay^l) Re R + Re(-i decay^l) (-Im R)
        parts = ((1.0, residue.real),) if decay.imag == 0 else ((1.0, residue.real), (-1j, -residue.imag))
        found += [(decay, phase, 0.0, value) for phase, value in parts if np.linalg.norm(value) > tol * scale]
    own = np.sum([phase.real * value for _, phase, _, value in found], axis=0) if found else np.zeros_like(first)
    skip = first - own
    if np.linalg.norm(skip) > tol * scale:
        values = np.reshape([value for *_, value in found], (len(found), -1))
        direct = np.linalg.lstsq(values.T, skip.reshape(-1), rcond=None)[0] if found else np.zeros(0)
        if np.linalg.norm(direct @ values - skip.reshape(-1)) <= tol * scale:
            found = [(*head[:2], gain, head[3]) for head, gain in zip(found, direct, strict=True)]
        else:
            found.append((0.0, 0.0, 1.0, skip))
    if not found:
        found.append((0.0, 0.0, 1.0, first))
    decay, phase, direct, values = (np.asarray(x) for x in zip(*found, strict=True))
    coef = np.real(phase * decay[None].astype(np.complex128) ** np.arange(n)[:, None])
    coef[0] += direct
    complex_dtype = np.result_type(dtype, np.complex64)
    modes = Modes(
        *(jnp.asarray(x.astype(to)) for x, to in ((decay, complex_dtype), (phase, complex_dtype), (direct, dtype)))
    )
    return HeadBank(jnp.asarray(coef.astype(dtype)), jnp.asarray(values.astype(dtype)), modes)


def _merged(decays: np.ndarray, residues: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Adds the residues of equal and of conjugate decays; leaves out those of 0, which only lag 0 sees."""
    largest = np.max(np.abs(decays), initial=0.0)
    kept, sums = [], []
    for decay, residue in zip(decays, residues, strict=True):
        if abs(decay) <= np.finfo(np.float64).eps * largest:
            continue
        if decay.imag < 0:
            decay, residue = decay.conjugate(), residue.conj()
        if decay.imag <= _EQUAL * largest:
            decay, residue = complex(decay.real), residue.real.astype(np.complex128)
        near = [i for i, other in enumerate(kept) if abs(other - decay) <= _EQUAL * largest]
        if near:
            sums[near[0]] = sums[near[0]] + residue
        else:
            kept.append(decay)
            sums.append(residue)
    return np.asarray(kept, np.complex128), np.reshape(sums, (len(kept), *residues.shape[1:])).astype(np.complex128)
