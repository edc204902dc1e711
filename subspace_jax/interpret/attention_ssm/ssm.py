"""Linear state-space layers: a scan, an associative scan, a convolution, and their interaction operators."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax.interpret.attention_ssm._checks import check_finite, check_length, check_tokens
from subspace_jax.linalg import working_dtype

einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
# Powers whose norms a decay bound takes one by one; larger ones are bounded by products of these.
_EXACT_POWERS = 16_384


class LinearSSM(NamedTuple):
    """A linear state-space layer ``h_i = A h_{i-1} + B x_i``, ``y_i = Re(C h_i) + D x_i``, from ``h = 0``.

    Matrices act on columns.  ``A``, ``B`` and ``C`` may be complex; the output is real.

    Attributes:
      A: ``[N, N]``, or its diagonal ``[N]``.
      B: ``[N, d]``.
      C: ``[p, N]``.
      D: ``[p, d]``, real, or None for none.
    """

    A: jax.Array
    B: jax.Array
    C: jax.Array
    D: jax.Array | None = None


def ssm_scan(ssm: LinearSSM, x: jax.Array) -> jax.Array:
    """Runs a state-space layer token by token.

    Args:
      ssm: The layer.
      x: Tokens ``[..., n, d]``.

    Returns:
      ``[..., n, p]`` in the dtype of ``x``; computed in at least float32.

    Raises:
      ValueError: Shapes don't match.
    """
    check_ssm(ssm)
    check_tokens(x, ssm.B.shape[1])
    own, drive = _driven(ssm, x)

    def step(h, b):
        h = _advance(own.A, h) + b
        return h, h

    _, states = jax.lax.scan(step, jnp.zeros_like(drive[0]), drive)
    return _read(own, states, x)


def ssm_associative_scan(ssm: LinearSSM, x: jax.Array) -> jax.Array:
    """Runs a state-space layer with a diagonal ``A`` in ``log n`` parallel steps.

    Arguments and result: see :func:`ssm_scan`.

    Raises:
      ValueError: Shapes don't match, or ``A`` is neither ``[N]`` nor a diagonal matrix whose values are known.
    """
    check_ssm(ssm)
    check_tokens(x, ssm.B.shape[1])
    own, drive = _driven(ssm._replace(A=_diagonal(ssm.A)), x)
    return _read(own, _states_of_diagonal(own.A, drive), x)


@jax.jit
def _states_of_diagonal(a: jax.Array, drive: jax.Array) -> jax.Array:
    decay = jnp.broadcast_to(a, (len(drive), *(1,) * (drive.ndim - 2), len(a)))

    def after(first, second):
        return first[0] * second[0], jnp.broadcast_to(second[0], second[1].shape) * first[1] + second[1]

    return jax.lax.associative_scan(after, (decay, drive))[1]


def ssm_convolve(ssm: LinearSSM, x: jax.Array) -> jax.Array:
    """Runs a state-space layer as a convolution with its lag operators, by FFT.

    Holds the operators of all lags, ``[n, p, d]``; for long sequences see
    :func:`subspace_jax.interpret.attention_ssm.apply_heads`.

    Arguments, result and errors: see :func:`ssm_scan`.
    """
    check_ssm(ssm)
    check_tokens(x, ssm.B.shape[1])
    n, dtype = x.shape[-2], working_dtype(x)
    kernel = jnp.fft.rfft(lag_operators(ssm, n).astype(dtype), 2 * n, axis=0)
    spectrum = einsum("fpd,...fd->...fp", kernel, jnp.fft.rfft(x.astype(dtype), 2 * n, axis=-2))
    return jnp.fft.irfft(spectrum, 2 * n, axis=-2)[..., :n, :].astype(x.dtype)


def lag_operators(ssm: LinearSSM, n: int) -> jax.Array:
    """Returns the interaction operators by lag: ``K_0 = C B + D``, ``K_l = C A^l B`` (arXiv 2512.15115).

    Args:
      ssm: The layer.
      n: Number of lags, the length of a sequence.

    Returns:
      ``[n, p, d]``, real.

    Raises:
      ValueError: Shapes of the layer don't match, its entries are not finite, or ``n`` is below 1.
    """
    check_length(n)
    check_ssm(ssm)
    own = _in_one_dtype(ssm, _real_dtype(ssm))

    def step(power, _):
        return _advance(own.A, power.mT).mT, jnp.real(einsum("pN,Nd->pd", own.C, power))

    lags = jax.lax.scan(step, own.B, length=n)[1]
    return lags if ssm.D is None else lags.at[0].add(ssm.D.astype(lags.dtype))


def ssm_decay_bound(ssm: LinearSSM, n: int, *, margin: float = 0.05) -> np.ndarray:
    """Returns a geometric bound ``c rate^l`` of the spectral norms of the lag operators of a stable layer.

    For a normal ``A`` the rate is its spectral radius ``rho`` and ``c = ||C|| ||B||``.  For any other it is
    ``rho + margin (1 - rho)``, and ``c`` has a factor that bounds the transient growth of the powers of ``A``.  The
    bound of lag 0 also has ``||D||``.  Runs on the host, in float64.

    Args:
      ssm: The layer.
      n: Number of lags.
      margin: Distance of the rate from the spectral radius, above 0 and below 1.

    Returns:
      ``[n]`` float64.

    Raises:
      ValueError: The spectral radius is 1 or more, ``margin`` or ``n`` is out of range, or the layer is malformed.
    """
    check_length(n)
    check_ssm(ssm)
    if not 0 < margin < 1:
        raise ValueError(f"margin: expected a number between 0 and 1, got {margin}")
    a = dense_transition(ssm)
    rho = spectral_radius(ssm)
    if rho >= 1:
        raise ValueError(f"A: expected a spectral radius below 1 for a decay bound, got {rho:.6g}")
    norm = np.linalg.norm(a, 2)
    normal = norm <= rho * (1 + 1e-12)
    rate = rho if normal else rho + margin * (1 - rho)
    growth = 1.0 if normal else _growth(a / rate)
    scale = growth * np.linalg.norm(np.asarray(ssm.B), 2) * np.linalg.norm(np.asarray(ssm.C), 2)
    bound = scale * rate ** np.arange(n, dtype=np.float64)
    if ssm.D is not None:
        bound[0] += np.linalg.norm(np.asarray(ssm.D), 2)
    return bound


def spectral_radius(ssm: LinearSSM) -> float:
    """Returns the largest magnitude of an eigenvalue of ``A``; runs on the host."""
    a = np.asarray(ssm.A)
    values = a if a.ndim == 1 else np.linalg.eigvals(a.astype(np.result_type(a, np.float64)))
    return float(np.max(np.abs(values)))


def hippo_legs(states: int, step: float) -> LinearSSM:
    """Returns HiPPO-LegS (Gu et al., arXiv 2008.07669) with the bilinear discretisation, whose outputs are its states.

    Args:
      states: Number of states, ``N``, each the coefficient of a Legendre polynomial.
      step: Length of a step, above 0.

    Returns:
      The layer, of one input, ``A [N, N]``, ``B [N, 1]`` and ``C = I``, float32, or float64 where that is enabled.

    Raises:
      ValueError: An argument is out of range.
    """
    if states < 1 or not step > 0:
        raise ValueError(f"states, step: expected at least 1 and a number above 0, got {states} and {step}")
    root = np.sqrt(2 * np.arange(states) + 1.0)
    a = -np.tril(np.outer(root, root), -1) - np.diag(np.arange(states) + 1.0)
    eye = np.eye(states)
    inverse = np.linalg.inv(eye - step / 2 * a)
    return LinearSSM(
        jnp.asarray(inverse @ (eye + step / 2 * a)), jnp.asarray(inverse @ (step * root[:, None])), jnp.asarray(eye)
    )


def check_ssm(ssm: LinearSSM) -> None:
    """Raises a ValueError unless the matrices of a layer fit each other and are finite."""
    for name, matrix in ssm._asdict().items():
        axes = (1, 2) if name == "A" else (2,)
        if matrix is not None and (matrix.ndim not in axes or 0 in matrix.shape):
            raise ValueError(f"{name}: expected a matrix, got shape {list(matrix.shape)}")
    states, d, p = ssm.A.shape[0], ssm.B.shape[1], ssm.C.shape[0]
    expected = {"A": ssm.A.ndim * (states,), "B": (states, d), "C": (p, states), "D": (p, d)}
    for name, shape in expected.items():
        matrix = getattr(ssm, name)
        if matrix is None:
            continue
        if matrix.shape != shape:
            raise ValueError(
                f"{name}: expected shape {list(shape)} for {states} states, {d} inputs and {p} outputs, got "
                f"{list(matrix.shape)}"
            )
        check_finite(name, matrix)


def dense_transition(ssm: LinearSSM) -> np.ndarray:
    """Returns ``A [N, N]`` on the host, in double precision."""
    a = np.asarray(ssm.A)
    a = a.astype(np.result_type(a, np.float64))
    return np.diag(a) if a.ndim == 1 else a


def _growth(scaled: np.ndarray) -> float:
    """Returns an upper bound of ``||M^l||`` over all ``l``, for ``M`` of spectral radius below 1."""
    power, most = np.eye(len(scaled), dtype=scaled.dtype), 1.0
    # With ||M^L|| <= 1 no later power exceeds the largest of the first L, as M^(q L + r) = (M^L)^q M^r.
    for _ in range(_EXACT_POWERS):
        power = power @ scaled
        # The Frobenius norm is an upper bound of the spectral one, which takes a decomposition.
        if np.linalg.norm(power) <= 1:
            return most
        most = max(most, float(np.linalg.norm(power)))
    while (norm := float(np.linalg.norm(power))) > 1:
        most *= norm
        power = power @ power
    return most


def _real_dtype(ssm: LinearSSM) -> jnp.dtype:
    return working_dtype(*(jnp.real(x) for x in ssm if x is not None))


def _in_one_dtype(ssm: LinearSSM, dtype: jnp.dtype) -> LinearSSM:
    """Casts A, B and C to a common dtype, complex where one of them is; D, which is real, to the given one."""
    own = (ssm.A, ssm.B, ssm.C)
    to = np.result_type(dtype, jnp.complex64) if any(jnp.iscomplexobj(x) for x in own) else dtype
    return LinearSSM(*(x.astype(to) for x in own), None if ssm.D is None else ssm.D.astype(dtype))


def _driven(ssm: LinearSSM, x: jax.Array) -> tuple[LinearSSM, jax.Array]:
    """Returns the layer in the dtype of the computation, and ``B x``, ``[n, ..., N]``."""
    own = _in_one_dtype(ssm, working_dtype(x))
    drive = einsum("Nd,...nd->...nN", own.B, x.astype(own.B.dtype))
    return own, jnp.moveaxis(drive, -2, 0)


def _advance(a: jax.Array, h: jax.Array) -> jax.Array:
    """Returns ``A h`` for states ``[..., N]``."""
    if a.ndim == 1:
        return h * jnp.broadcast_to(a, h.shape)
    return einsum("MN,...N->...M", a, h)


def _read(ssm: LinearSSM, states: jax.Array, x: jax.Array) -> jax.Array:
    """Returns the outputs ``[..., n, p]`` of states ``[n, ..., N]``."""
    y = jnp.moveaxis(jnp.real(einsum("pN,...N->...p", ssm.C, states)), 0, -2)
    if ssm.D is not None:
        y = y + einsum("pd,...nd->...np", ssm.D, x.astype(ssm.D.dtype))
    return y.astype(x.dtype)


def _diagonal(a: jax.Array) -> jax.Array:
    if a.ndim == 1:
        return a
    known = not isinstance(a, jax.core.Tracer)
    if known and not np.any(np.asarray(a) - np.diag(np.diagonal(np.asarray(a)))):
        return jnp.diagonal(a)
    raise ValueError(f"A: an associative scan needs a diagonal matrix; expected its diagonal [N], got {list(a.shape)}")
