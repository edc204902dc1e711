"""Riemannian preconditioned LoRA: a factor's gradient over the Gram matrix of its partner (arXiv 2402.02347)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from subspace_jax import linalg
from subspace_jax.optim import _adam, _checks
from subspace_jax.optim.lora import _factors
from subspace_jax.optim.lora._factors import PairRule

PyTree = Any


class ScaledGDLoRAState(NamedTuple):
    """State of :func:`scaled_gd_lora`: the number of steps taken, int32 scalar, and the state for other leaves."""

    count: jax.Array
    fallback: optax.OptState


class ScaledAdamWLoRAState(NamedTuple):
    """State of :func:`scaled_adamw_lora`; trees like the parameters, float32 (float64 for float64 factors).

    Attributes:
      count: Steps taken, int32 scalar.
      mu: First moments of the scaled gradients, like the factors.
      nu: Second moments.
      fallback: State for other leaves.
    """

    count: jax.Array
    mu: PyTree
    nu: PyTree
    fallback: optax.OptState


def scaled_gd_lora(
    learning_rate: optax.ScalarOrSchedule,
    *,
    reg: ArrayLike = 1e-6,
    weight_decay: ArrayLike = 0.0,
    pairs: PairRule | None = None,
    fallback: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Scaled gradient descent on LoRA factors (Zhang and Pilanci, arXiv 2402.02347).

    ``da = grad_a (b b^T + reg I)^-1`` and ``db = (a^T a + reg I)^-1 grad_b``, both from the old pair; decay is
    decoupled, of the old parameters.  There is no state but a counter.  ``O((in + out) r^2 + r^3)`` a step.

    Args:
      learning_rate: Fixed learning rate or schedule.
      reg: Added to the diagonal of the r x r matrices; at least what rounding asks for, ``16 eps`` of their trace, so
        that factors of any rank are stepped.
      weight_decay: Decoupled, for all leaves.
      pairs: See :func:`adaprelora`.
      fallback: See :func:`adaprelora`.

    Returns:
      The transform.  Its ``update`` needs ``params``.  Complex parameters are refused.

    Raises:
      ValueError: ``reg`` is negative; and see :func:`adaprelora` for factors that don't fit.
      TypeError: A factor is not of floating point.

    Examples:
      >>> import jax
      >>> from subspace_jax import optim
      >>> factors = {"q": {"a": jax.numpy.ones((8, 2)), "b": jax.numpy.ones((2, 4))}}
      >>> tx = optim.scaled_gd_lora(0.1)
      >>> updates, state = tx.update(factors, tx.init(factors), factors)
    """
    scaled = scale_by_scaled_gd_lora(reg=reg, pairs=pairs, fallback=fallback)
    return optax.chain(scaled, _adam.descend(learning_rate, weight_decay, after=False))


def scale_by_scaled_gd_lora(
    *,
    reg: ArrayLike = 1e-6,
    pairs: PairRule | None = None,
    fallback: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The directions of :func:`scaled_gd_lora`, positive ascends, for use in a chain.

    Args:
      reg: See :func:`scaled_gd_lora`, as all others.
      pairs: Which leaves are factors.
      fallback: Transform for other leaves.

    Returns:
      The transform.

    Raises:
      ValueError: See :func:`scaled_gd_lora`.
      TypeError: See :func:`scaled_gd_lora`.

    Examples:
      >>> import optax
      >>> from subspace_jax import optim
      >>> tx = optax.chain(optim.scale_by_scaled_gd_lora(), optax.trace(0.9), optax.scale_by_learning_rate(0.1))
    """
    _checks.check_number("reg", reg, 0)

    def step(t, factors, slots):
        del t
        return [(_scaled(f.grad_a, f.b, reg), _scaled(f.grad_b, f.a, reg)) for f in factors], slots

    return _factors.on_factors(ScaledGDLoRAState, lambda a, b: (), step, pairs=pairs, fallback=fallback)


def scaled_adamw_lora(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-6,
    reg: ArrayLike = 1e-6,
    weight_decay: ArrayLike = 0.0,
    bias_correction: bool = True,
    gauss_seidel: bool = False,
    pairs: PairRule | None = None,
    fallback: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """AdamW on the gradients of :func:`scaled_gd_lora` (Zhang and Pilanci, arXiv 2402.02347).

    State of a pair: ``2 (in + out) r`` entries.  Decay comes after the step.

    Args:
      learning_rate: Fixed learning rate or schedule.
      b1: Decay of the first moment of the scaled gradients.
      b2: Decay of the second moment.
      eps: Added to the root of the raw second moment.
      reg: Added to the diagonal of the r x r matrices; at least what rounding asks for, ``16 eps`` of their trace, so
        that factors of any rank are stepped.
      weight_decay: Decoupled, for all leaves.
      bias_correction: Whether steps are multiplied by ``sqrt(1 - b2^t) / (1 - b1^t)``.
      gauss_seidel: Whether ``b`` is preconditioned by the new ``a``, as in the authors' code; else by the old one.
      pairs: See :func:`adaprelora`.
      fallback: See :func:`adaprelora`.

    Returns:
      The transform.  Its ``update`` needs ``params``.  State is float32 for 16-bit parameters, where Optax keeps their
      dtype; complex parameters are refused.

    Raises:
      ValueError: A number is out of range; and see :func:`adaprelora` for factors that don't fit.
      TypeError: A factor is not of floating point.

    Examples:
      >>> import jax
      >>> from subspace_jax import optim
      >>> factors = {"q": {"a": jax.numpy.ones((8, 2)), "b": jax.numpy.ones((2, 4))}}
      >>> tx = optim.scaled_adamw_lora(1e-3, gauss_seidel=True)
      >>> updates, state = tx.update(factors, tx.init(factors), factors)
    """

    def moved(t, a, direction):
        # The same number as the last transform of the chain computes, whose counter begins at zero.
        rate = learning_rate(t - 1) if callable(learning_rate) else learning_rate
        rate, decay = (jnp.asarray(x).astype(a.dtype) for x in (rate, weight_decay))
        return (a - rate * direction) * (1 - rate * decay)

    options = {"adam": (b1, b2, eps), "reg": reg, "bias_correction": bias_correction}
    scaled = _scale_by_adam(moved if gauss_seidel else None, pairs=pairs, fallback=fallback, **options)
    return optax.chain(scaled, _adam.descend(learning_rate, weight_decay))


def scale_by_scaled_adamw_lora(
    *,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-6,
    reg: ArrayLike = 1e-6,
    bias_correction: bool = True,
    pairs: PairRule | None = None,
    fallback: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The directions of :func:`scaled_adamw_lora`, positive ascends, for use in a chain.

    Both use the old pair: the Gauss-Seidel order needs the final step of ``a``.

    Args:
      b1: See :func:`scaled_adamw_lora`, as all others.
      b2: Decay of the second moment.
      eps: Added to the root of the second moment.
      reg: Added to the diagonals.
      bias_correction: Whether moments are corrected.
      pairs: Which leaves are factors.
      fallback: Transform for other leaves.

    Returns:
      The transform.

    Raises:
      ValueError: See :func:`scaled_adamw_lora`.
      TypeError: See :func:`scaled_adamw_lora`.

    Examples:
      >>> import optax
      >>> from subspace_jax import optim
      >>> tx = optax.chain(optim.scale_by_scaled_adamw_lora(b2=0.98), optax.scale_by_learning_rate(1e-3))
    """
    options = {"adam": (b1, b2, eps), "reg": reg, "bias_correction": bias_correction}
    return _scale_by_adam(None, pairs=pairs, fallback=fallback, **options)


def _scale_by_adam(moved, *, adam, reg, bias_correction, pairs, fallback):
    """Adam on scaled gradients; ``moved(t, a, direction)`` is the new ``a`` that ``b`` is scaled by, if not the old."""
    _checks.check_moments(*adam)
    _checks.check_number("reg", reg, 0)

    def start(a, b):
        return tuple((_factors.zeros(a), _factors.zeros(b)) for _ in range(2))

    def pair(t, f, slots):
        f = _factors.bounded(f)
        (mu_a, mu_b), (nu_a, nu_b) = slots
        factor = _adam.correction(t, *adam[:2], f.a.dtype) if bias_correction else 1
        mu_a, nu_a, da = _adam.moments(_scaled(f.grad_a, f.b, reg), mu_a, nu_a, *adam)
        da = factor * da
        a = f.a if moved is None else moved(t, f.a, da)
        mu_b, nu_b, db = _adam.moments(_scaled(f.grad_b, a, reg), mu_b, nu_b, *adam)
        return (da, factor * db), ((mu_a, mu_b), (nu_a, nu_b))

    def step(t, factors, slots):
        made = [pair(t, *args) for args in zip(factors, slots, strict=True)]
        return [directions for directions, _ in made], [new for _, new in made]

    return _factors.on_factors(ScaledAdamWLoRAState, start, step, pairs=pairs, fallback=fallback)


def _scaled(g, partner, reg):
    """``g (x^T x + reg I)^-1`` for a tall gradient and a tall partner x."""
    m = linalg.gram(partner, partner)
    return linalg.times(g, _factors.damped_inverse(m, jnp.asarray(reg).astype(m.dtype)))
