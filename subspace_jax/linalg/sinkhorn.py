"""Doubly stochastic matrices near a kernel, by Sinkhorn's iteration on logarithms (Cuturi 2013, arXiv 1306.0895)."""

import functools
import math
import numbers
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from subspace_jax.linalg._checks import check_finite
from subspace_jax.linalg.products import times, working_dtype

GRADIENTS = ("stop_v", "unrolled", "implicit")
_STILL = 1e-12  # a change of potentials below which further iterations are idle


class SinkhornResult(NamedTuple):
    """A plan and its potentials.

    Attributes:
      plan: ``[n, n]``, ``n exp((S + u 1^T + 1 v^T) / eta)``: rows and columns sum to 1 at convergence.
      u: ``[n]``, potentials of the rows; a constant for derivatives.
      v: ``[n]``, of the columns; likewise.
    """

    plan: jax.Array
    u: jax.Array
    v: jax.Array


def sinkhorn(s: jax.Array, eta: float, n_iter: int = 5, grad: str = "stop_v") -> SinkhornResult:
    """Projects a kernel onto doubly stochastic matrices with an entropy: ``max <P, S> + eta H(P)``.

    Potentials start at 0 and take turns, ``u`` first: ``u_i = -eta (ln n + logsumexp_j (S_ij + v_j) / eta)``, and ``v``
    alike over the columns.  An odd number of iterations ends with ``u``: then the rows sum to 1 but for rounding, and
    the plan is ``softmax_j((S_ij + v_j) / eta)``.  They end early where the potentials stand still.

    Gradients in ``S``:

    - "stop_v" takes ``v`` as a constant, and costs no memory for iterations; that of the layer in CPP, the code of
      arXiv 2306.05272;
    - "unrolled" differentiates all iterations and keeps ``n_iter`` times ``[n, n]`` numbers;
    - "implicit" is that of the limit, by conjugate gradients: exact where ``n_iter`` is large enough to converge.

    Args:
      s: Kernel ``[n, n]``, floating point; logarithms are float32 or wider.
      eta: Weight of the entropy, above 0; a constant for derivatives.
      n_iter: Updates of a potential, static.
      grad: "stop_v", "unrolled" or "implicit".

    Returns:
      The plan and the potentials; float32 or wider.

    Raises:
      ValueError: ``s`` is not square or (where its values are known) not finite, ``eta`` is not above 0, ``n_iter`` is
        below 1, or ``grad`` is unknown.
    """
    if s.ndim != 2 or s.shape[0] != s.shape[1] or not s.size:
        raise ValueError(f"s: expected a square kernel [n, n], got shape {s.shape}")
    check_sinkhorn(eta, n_iter)
    if grad not in GRADIENTS:
        raise ValueError(f"grad: expected one of {GRADIENTS}, got {grad!r}")
    check_finite("s", s)
    s = s.astype(working_dtype(s))
    eta = jax.lax.stop_gradient(jnp.asarray(eta, s.dtype))
    if grad == "implicit":
        plan, u, v = _implicit(s, eta, n_iter)
    elif grad == "unrolled":
        plan, u, v = _plan(s, *_unrolled(s, eta, n_iter), eta)
    else:
        plan, u, v = _plan(s, *_potentials(s, eta, n_iter), eta)
    return SinkhornResult(plan, jax.lax.stop_gradient(u), jax.lax.stop_gradient(v))


def check_sinkhorn(eta: float, n_iter: int) -> None:
    """Raises unless the weight of the entropy is above 0, where it is known, and there is an iteration."""
    if isinstance(eta, numbers.Real) and not eta > 0:
        raise ValueError(f"eta: expected a weight of the entropy above 0, got {eta}")
    if n_iter < 1:
        raise ValueError(f"n_iter: expected at least 1 iteration, got {n_iter}")


def alternating_potentials(
    of_v: Callable[[jax.Array], jax.Array], of_u: Callable[[jax.Array], jax.Array], v: jax.Array, n_iter: int
) -> tuple[jax.Array, jax.Array]:
    """Updates the two potentials in turns until they stand still, for kernels that are no arrays.

    It has no derivatives in reverse mode.

    Args:
      of_v: Returns ``u [n]`` of ``v [n]``.
      of_u: Returns ``v`` of ``u``.
      v: Where ``v`` starts.
      n_iter: Updates of a potential, at most; at least 1.

    Returns:
      ``u`` and ``v``.
    """
    v = _settled(of_v, of_u, v, (n_iter - 1) // 2)
    u = of_v(v)
    return u, v if n_iter % 2 else of_u(u)


def _settled(of_v, of_u, v, pairs):
    def step(carry):
        u, v, _, count = carry
        new = of_v(v)
        return new, of_u(new), jnp.max(jnp.abs(new - u)), count + 1

    def moves(carry):
        return (carry[2] > _STILL) & (carry[3] < pairs)

    start = (jnp.full_like(v, jnp.inf), v, jnp.asarray(jnp.inf, v.dtype), jnp.int32(0))
    return jax.lax.while_loop(moves, step, start)[1]


def _half(s: jax.Array, other: jax.Array, eta: jax.Array) -> jax.Array:
    """The potential of the rows, given that of the columns."""
    return -eta * (math.log(s.shape[0]) + jax.nn.logsumexp((s + other[None]) / eta, axis=1))


def _potentials(s, eta, n_iter):
    """Potentials of which the last update of ``u`` alone has a derivative in ``s``."""
    fixed, zeros = jax.lax.stop_gradient(s), jnp.zeros(s.shape[0], s.dtype)
    v = _settled(lambda v: _half(fixed, v, eta), lambda u: _half(fixed.T, u, eta), zeros, (n_iter - 1) // 2)
    u = _half(s, v, eta)
    return u, v if n_iter % 2 else _half(fixed.T, jax.lax.stop_gradient(u), eta)


def _unrolled(s, eta, n_iter):
    def pair(v, _):
        return _half(s.T, _half(s, v, eta), eta), None

    v, _ = jax.lax.scan(pair, jnp.zeros(s.shape[0], s.dtype), length=(n_iter - 1) // 2)
    u = _half(s, v, eta)
    return u, v if n_iter % 2 else _half(s.T, u, eta)


def _plan(s, u, v, eta):
    return s.shape[0] * jnp.exp((s + u[:, None] + v[None]) / eta), u, v


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _implicit(s, eta, n_iter):
    return _plan(s, *_potentials(s, eta, n_iter), eta)


def _implicit_forward(s, eta, n_iter):
    found = _implicit(s, eta, n_iter)
    return found, (found[0], eta)


def _implicit_backward(n_iter, kept, cotangents):
    """Sums of rows and columns stay 1 as ``S`` moves: ``[I, P; P^T, I] [du; dv] = -[(P dS) 1; (P dS)^T 1]``."""
    del n_iter
    plan, eta = kept
    h = cotangents[0] * plan / eta
    a, b = jnp.sum(h, axis=1), jnp.sum(h, axis=0)

    def schur(y):
        # Constants are its null space, and where rounding would grow.
        return _centered(y - times(plan.T, times(plan, y[:, None]))[:, 0])

    right = _centered(b - times(plan.T, a[:, None])[:, 0])
    y, _ = jax.scipy.sparse.linalg.cg(schur, right, tol=20 * jnp.finfo(plan.dtype).eps, maxiter=len(right))
    x = a - times(plan, y[:, None])[:, 0]
    return h - plan * (x[:, None] + y[None]), jnp.zeros_like(eta)


def _centered(y):
    return y - jnp.mean(y, keepdims=True)


_implicit.defvjp(_implicit_forward, _implicit_backward)
