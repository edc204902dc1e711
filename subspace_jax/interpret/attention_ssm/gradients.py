"""How gradients travel with distance: the exact Jacobian of attention, profiles, and inputs that carry them far."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax.interpret.attention_ssm._checks import check_finite, check_length, check_tokens
from subspace_jax.interpret.attention_ssm.ssm import einsum
from subspace_jax.linalg import working_dtype


class AttentionHead(NamedTuple):
    """A head of causal softmax attention, or several with a leading axis, whose outputs are added.

    Matrices act on columns; scores are divided by ``sqrt(k)``.

    Attributes:
      query: ``[k, d]``.
      key: ``[k, d]``.
      value: ``[p, d]``.
    """

    query: jax.Array
    key: jax.Array
    value: jax.Array


class GradientDecay(NamedTuple):
    """How a gradient profile falls with distance.

    Attributes:
      half_distance: First distance from which on the norms stay at half of the largest or less; the number of
        distances where they don't.
      log_slope: Slope of the logarithm of the norms over the last half of the distances that have a gradient, by least
        squares; of a linear state-space layer about the logarithm of its spectral radius.  NaN of a single distance.
    """

    half_distance: jax.Array
    log_slope: jax.Array


def attention_jacobian(params: AttentionHead, x: jax.Array, i: int | jax.Array, j: int | jax.Array) -> jax.Array:
    """Returns ``dy_i / dx_j`` of causal softmax attention in closed form (arXiv 2512.15115).

    ``alpha_ij (V + (V x_j - y_i) (W_K^T q_i)^T / sqrt(k))``, and for ``j = i`` also the path through the query.

    Args:
      params: A head, or several.
      x: Tokens ``[n, d]``.
      i: Position of the output, below ``n``; may be traced.
      j: Position of the input.  A later one than ``i`` gives 0.

    Returns:
      ``[p, d]``.

    Raises:
      ValueError: Shapes don't match, entries are not finite, or a position that is known is out of range.
    """
    params = _check_heads(params, x)
    n = len(x)
    for name, position in (("i", i), ("j", j)):
        if not isinstance(position, jax.core.Tracer) and not 0 <= int(position) < n:
            raise ValueError(f"{name}: expected a position from 0 to {n - 1}, got {int(position)}")
    if params.value.ndim == 2:
        return _jacobian(params, x, i, j)
    return jnp.sum(jax.vmap(lambda head: _jacobian(head, x, i, j))(params), axis=0)


def causal_attention(params: AttentionHead, x: jax.Array) -> jax.Array:
    """Returns the outputs of a head or several, ``[n, p]``, for tokens ``[n, d]``.

    Raises:
      ValueError: Shapes don't match, or entries are not finite.
    """
    params = _check_heads(params, x)
    stacked = params if params.value.ndim == 3 else AttentionHead(*(m[None] for m in params))
    weights = jax.vmap(lambda head: _weights(head, x))(stacked)
    return einsum("hij,hjp->ip", weights, einsum("hpd,jd->hjp", stacked.value, x))


def gradient_profile(fn: Callable[[jax.Array], jax.Array], x: jax.Array, query: int = -1) -> jax.Array:
    """Returns the spectral norms of ``dy_q / dx_(q - l)`` by distance ``l``.

    Args:
      fn: Maps tokens ``[n, d]`` to ``[n, p]``.
      x: Tokens ``[n, d]``.
      query: Position ``q`` of the output, the last by default.

    Returns:
      ``[q + 1]``, from distance 0.

    Raises:
      ValueError: ``x`` are no tokens or not finite, or ``query`` is out of range.
    """
    if x.ndim != 2:
        raise ValueError(f"x: expected tokens [n, d], got shape {list(x.shape)}")
    check_finite("x", x)
    n = len(x)
    if not -n <= query < n:
        raise ValueError(f"query: expected a position of {n} tokens, got {query}")
    query %= n
    rows = jax.jacrev(lambda x: fn(x)[query])(x)
    return jnp.flip(jnp.linalg.norm(jnp.moveaxis(rows, 1, 0)[: query + 1], 2, axis=(-2, -1)))


def gradient_decay(profile: jax.Array) -> GradientDecay:
    """Returns half-distance and slope of a profile ``[n]`` of :func:`gradient_profile`, ``n`` at least 4.

    Raises:
      ValueError: ``profile`` has another shape.
    """
    if profile.ndim != 1 or len(profile) < 4:
        raise ValueError(f"profile: expected norms [n] of at least 4 distances, got shape {list(profile.shape)}")
    n = len(profile)
    distance = np.arange(n, dtype=np.int32)
    above = profile > jnp.max(profile) / 2
    half = jnp.max(jnp.where(above, distance + 1, 0))
    # Beyond a window, or the powers of a nilpotent matrix, there is nothing to fit.
    last = jnp.max(jnp.where(profile > 0, distance + 1, 0))
    late = ((profile > 0) & (distance >= last // 2)).astype(profile.dtype)
    steps = jnp.asarray(distance, profile.dtype)
    centered = late * (steps - jnp.sum(late * steps) / jnp.sum(late))
    logs = jnp.log(jnp.where(profile > 0, profile, 1))
    return GradientDecay(half, jnp.sum(centered * logs) / jnp.sum(jnp.square(centered)))


def highway_input(key: jax.Array, n: int, d: int, distance: int, score: float = 64.0) -> jax.Array:
    """Returns tokens through which attention carries a gradient over a distance without loss.

    The last token and the one at the distance are the same vector, of which both scores are ``score``; all others are
    unit vectors orthogonal to it, of score 0.  With ``query`` and ``key`` the identity the last token attends to the
    two with weight 1/2 each, so that ``||dy_n / dx_(n - distance)||`` is ``||V|| / 2``, whatever the distance.

    Args:
      key: Random key of directions.
      n: Number of tokens, at least 2.
      d: Their width, at least 2.
      distance: 1 to ``n - 1``.
      score: The score, above 0; others weigh ``exp(-score)``.

    Returns:
      ``[n, d]`` float32, or float64 where that is enabled.

    Raises:
      ValueError: An argument is out of range.
    """
    check_length(n)
    if n < 2 or d < 2:
        raise ValueError(f"n, d: expected at least 2 tokens of width 2, got {n} and {d}")
    if not 1 <= distance < n:
        raise ValueError(f"distance: expected 1 to {n - 1} for {n} tokens, got {distance}")
    if not score > 0:
        raise ValueError(f"score: expected a number above 0, got {score}")
    draws = jax.random.normal(key, (n, d), jax.dtypes.canonicalize_dtype(np.float64))
    u = draws[-1] / jnp.linalg.norm(draws[-1])
    rest = draws - einsum("nd,d->n", draws, u)[:, None] * u[None]
    rest = rest / jnp.linalg.norm(rest, axis=-1, keepdims=True)
    return rest.at[np.array([n - 1, n - 1 - distance])].set(np.sqrt(score * np.sqrt(d)) * u)


def _check_heads(params: AttentionHead, x: jax.Array) -> AttentionHead:
    params = AttentionHead(*params)
    if x.ndim != 2:
        raise ValueError(f"x: expected tokens [n, d], got shape {list(x.shape)}")
    for name, matrix in params._asdict().items():
        if matrix.ndim not in (2, 3) or matrix.ndim != params.value.ndim:
            raise ValueError(f"{name}: expected a matrix of a head, or of each of several, got {list(matrix.shape)}")
        check_tokens(x, matrix.shape[-1])
        check_finite(name, matrix)
    if params.query.shape != params.key.shape or params.key.shape[:-2] != params.value.shape[:-2]:
        shapes = ", ".join(str(list(matrix.shape)) for matrix in params)
        raise ValueError(f"query, key, value: expected [k, d], [k, d] and [p, d] of as many heads, got {shapes}")
    check_finite("x", x)
    dtype = working_dtype(x)
    return AttentionHead(*(matrix.astype(dtype) for matrix in params))


def _weights(head: AttentionHead, x: jax.Array) -> jax.Array:
    """Returns the attention weights of all queries, ``[n, n]``."""
    query, key = (einsum("kd,nd->nk", matrix, x) for matrix in (head.query, head.key))
    scores = einsum("ik,jk->ij", query, key) / np.sqrt(query.shape[1])
    n = len(x)
    return jax.nn.softmax(jnp.where(np.tril(np.ones((n, n), bool)), scores, -jnp.inf), axis=-1)


@jax.jit
def _jacobian(head: AttentionHead, x: jax.Array, i: int | jax.Array, j: int | jax.Array) -> jax.Array:
    n, scale = len(x), 1 / np.sqrt(head.query.shape[0])
    query, keys = einsum("kd,d->k", head.query, x[i]), einsum("kd,nd->nk", head.key, x)
    scores = scale * einsum("nk,k->n", keys, query)
    weights = jax.nn.softmax(jnp.where(np.arange(n) <= i, scores, -jnp.inf))
    values = einsum("pd,nd->np", head.value, x)
    spread = values - einsum("n,np->p", weights, values)[None]
    by_key = scale * jnp.outer(spread[j], einsum("kd,k->d", head.key, query))
    # Only the query's own token moves the query.
    by_query = scale * einsum("n,np,nk->pk", weights, spread, keys)
    own = jnp.where(i == j, 1.0, 0.0).astype(x.dtype)
    return weights[j] * (head.value + by_key) + own * einsum("pk,kd->pd", by_query, head.query)
