"""What a few-shot classifier's error is bounded by: domain gap, capacity and number of examples.

A design choice: arXiv 2401.01736 has a bound of these three factors.  Here they stand in the bounds of Ben-David et
al., "A theory of learning from different domains", Machine Learning 79, 2010 (theorems 2 and 3).  At few shots the
values are far above 1: they compare methods and sizes, and predict no error.
"""

import jax
import jax.numpy as jnp

Scalar = jax.typing.ArrayLike


def vc_width(m: Scalar, v: Scalar, delta: Scalar) -> jax.Array:
    """Returns the sample-size term ``sqrt(4 / m (v ln(2 e m / v) + ln(4 / delta)))``.

    Args:
      m: Number of labelled examples.
      v: VC dimension: ``n + 1`` for a linear probe, the number of parameters for an adapter, the number of keys for
        Tip-Adapter.  Above ``2 m``, where the term stops growing, it counts as ``2 m``.
      delta: Probability that the bound does not hold, in (0, 1).

    Raises:
      ValueError: ``delta`` is not in (0, 1), or ``m`` or ``v`` not positive; traced values pass.
    """
    _check(m=m, v=v)
    _check_probability(delta)
    m, v, delta = map(jnp.asarray, (m, v, delta))
    m, v = (x.astype(jnp.result_type(float)) for x in (m, v))
    v = jnp.minimum(v, 2.0 * m)
    return jnp.sqrt(4.0 / m * (v * jnp.log(2.0 * jnp.e * m / v) + jnp.log(4.0 / delta)))


def domain_bound(source_error: Scalar, width: Scalar, gap: Scalar, joint_error: Scalar) -> jax.Array:
    """Bounds the error in the target domain of a classifier that was fitted in the source.

    Args:
      source_error: Error on the source sample.
      width: Sample-size term, :func:`vc_width`.
      gap: ``d_HdeltaH``, for which :func:`subspace_jax.metrics.proxy_a_distance` stands.
      joint_error: Least sum of the errors in both domains of any classifier, ``lambda*``.

    Returns:
      ``source_error + width + gap / 2 + joint_error``.
    """
    return jnp.asarray(source_error) + width + 0.5 * jnp.asarray(gap) + joint_error


def mixture_bound(
    alpha: Scalar, beta: Scalar, m: Scalar, v: Scalar, delta: Scalar, gap: Scalar, joint_error: Scalar
) -> jax.Array:
    """Bounds how far the classifier of least mixed error, ``alpha target + (1 - alpha) source``, is from the best.

    Args:
      alpha: Weight of the target's error, in [0, 1]; 1 leaves the domain gap out.
      beta: Fraction of the examples that are of the target, in (0, 1).
      m: Number of labelled examples of both domains.
      v: VC dimension, see :func:`vc_width`.
      delta: Probability that the bound does not hold, in (0, 1).
      gap: See :func:`domain_bound`.
      joint_error: See :func:`domain_bound`.

    Returns:
      The bound on the excess error in the target domain.

    Raises:
      ValueError: ``delta`` or ``beta`` is not in (0, 1), or ``m`` or ``v`` not positive; traced values pass.
    """
    _check(m=m, v=v)
    _check_probability(delta)
    _check_probability(beta, "beta")
    real = jnp.result_type(float)
    alpha, beta, m, v, delta, gap = (jnp.asarray(x, real) for x in (alpha, beta, m, v, delta, gap))
    spread = jnp.sqrt(jnp.square(alpha) / beta + jnp.square(1.0 - alpha) / (1.0 - beta))
    width = jnp.sqrt((2.0 * v * jnp.log(2.0 * (m + 1.0)) + 2.0 * jnp.log(8.0 / delta)) / m)
    return 4.0 * spread * width + 2.0 * (1.0 - alpha) * (0.5 * gap + joint_error)


def best_alpha(beta: Scalar, m: Scalar, v: Scalar, delta: Scalar, gap: Scalar, joint_error: Scalar) -> jax.Array:
    """Returns the weight of the target's error that minimizes :func:`mixture_bound`.

    With ``a = alpha - beta``, the spread is ``sqrt(1 + a^2 / (beta (1 - beta)))``: the bound is convex, and its least
    value in closed form.

    Args:
      beta: See :func:`mixture_bound`.
      m: See :func:`mixture_bound`.
      v: See :func:`mixture_bound`.
      delta: See :func:`mixture_bound`.
      gap: See :func:`mixture_bound`.
      joint_error: See :func:`mixture_bound`.

    Returns:
      The weight, in [beta, 1].

    Raises:
      ValueError: See :func:`mixture_bound`.
    """
    # The slope of the bound is 4 width a / (s^2 sqrt(1 + a^2 / s^2)) - pull, with s^2 = beta (1 - beta).
    width = mixture_bound(beta, beta, m, v, delta, 0.0, 0.0) / 4.0
    real = jnp.result_type(float)
    beta, gap, joint_error = (jnp.asarray(x, real) for x in (beta, gap, joint_error))
    pull, variance = 2.0 * (0.5 * gap + joint_error), beta * (1.0 - beta)
    ratio = pull * variance / (4.0 * width)
    # a / sqrt(1 + a^2 / s^2) = ratio has a solution below s only, as a / sqrt(1 + a^2 / s^2) < s.
    inside = jnp.square(ratio) / variance
    a = jnp.where(inside < 1.0, ratio / jnp.sqrt(jnp.where(inside < 1.0, 1.0 - inside, 1.0)), jnp.inf)
    return jnp.minimum(beta + a, 1.0)


def _check(**values: Scalar) -> None:
    for name, value in values.items():
        if not isinstance(value, jax.core.Tracer) and not bool(jnp.all(jnp.asarray(value) > 0)):
            raise ValueError(f"{name}: expected a positive number, got {value}")


def _check_probability(value: Scalar, name: str = "delta") -> None:
    if not isinstance(value, jax.core.Tracer) and not bool(
        jnp.all((jnp.asarray(value) > 0) & (jnp.asarray(value) < 1))
    ):
        raise ValueError(f"{name}: expected a number in (0, 1), got {value}")
