"""LoRA-Pro: factor gradients are adjusted so that the weight follows its own gradient (arXiv 2407.18242)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from subspace_jax import linalg
from subspace_jax.optim import _adam, _checks
from subspace_jax.optim._arrays import automatic, spec_of
from subspace_jax.optim.lora import _factors
from subspace_jax.optim.lora._factors import Factors, PairRule, ScaleRule

PyTree = Any

METHODS = ("sgd", "adamw")


class LoRAProState(NamedTuple):
    """State of :func:`lora_pro`; trees like the parameters, float32 (float64 for float64 factors).

    Attributes:
      count: Steps taken, int32 scalar.
      mu: First moments of the weight's equivalent gradient, ``[..., in, out]``, instead of ``a`` (``[1]`` in that
        of ``b``); None for "sgd".
      nu: Second moments.
      fallback: State for other leaves.
    """

    count: jax.Array
    mu: PyTree
    nu: PyTree
    fallback: optax.OptState


class LoRAProOptions(NamedTuple):
    """Decays and damping of :func:`lora_pro`.

    Attributes:
      b1: Decay of Adam's first moment.
      b2: Decay of Adam's second moment.
      eps: Added to the root of the corrected second moment.
      delta: Added to the diagonals of the r x r matrices that are inverted; at least what rounding asks for, ``16 eps``
        of their trace, so that factors of any rank are stepped.
    """

    b1: ArrayLike = 0.9
    b2: ArrayLike = 0.999
    eps: ArrayLike = 1e-8
    delta: ArrayLike = 1e-8


def lora_pro(
    learning_rate: optax.ScalarOrSchedule,
    *,
    scale: ArrayLike | tuple[float, ...] | ScaleRule = 1.0,
    method: str = "adamw",
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    delta: ArrayLike = 1e-8,
    weight_decay: ArrayLike = 0.0,
    pairs: PairRule | None = None,
    fallback: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """LoRA-Pro (Wang et al., arXiv 2407.18242) for factors ``a [..., in, r]``, ``b [..., r, out]`` of ``s a b``.

    Of all factor steps whose change of the weight is nearest to its gradient, this takes the one nearest to the
    factors' own gradients, by a Sylvester equation of r x r matrices.

    "adamw" runs Adam on the equivalent gradient of the weight and projects the result to factor steps: its state of a
    pair is ``2 in out`` entries, those of full fine-tuning.  "sgd" has no state but a counter.

    Args:
      learning_rate: Fixed learning rate or schedule.
      scale: See :func:`adaprelora`.
      method: "adamw" or "sgd".
      b1: Decay of Adam's first moment.
      b2: Decay of Adam's second moment.
      eps: Added to the root of the corrected second moment.
      delta: Damping, see :class:`LoRAProOptions`.
      weight_decay: Decoupled, for all leaves.
      pairs: See :func:`adaprelora`.
      fallback: See :func:`adaprelora`.

    Returns:
      The transform.  Its ``update`` needs ``params``.  State is float32 for 16-bit parameters, where Optax keeps their
      dtype; complex parameters are refused.

    Raises:
      ValueError: ``method`` is unknown or a number out of range; and see :func:`adaprelora` for factors that don't fit.
      TypeError: A factor is not of floating point.

    Examples:
      >>> import jax
      >>> from subspace_jax import optim
      >>> factors = {"q": {"a": jax.numpy.eye(8, 2), "b": jax.numpy.zeros((2, 4))}}
      >>> tx = optim.lora_pro(1e-3, scale=2.0, method="sgd")
      >>> updates, state = tx.update(factors, tx.init(factors), factors)
    """
    options = LoRAProOptions(b1, b2, eps, delta)
    scaled = scale_by_lora_pro(options, scale=scale, method=method, pairs=pairs, fallback=fallback)
    return optax.chain(scaled, _adam.descend(learning_rate, weight_decay, after=False))


def scale_by_lora_pro(
    options: LoRAProOptions | None = None,
    *,
    scale: ArrayLike | tuple[float, ...] | ScaleRule = 1.0,
    method: str = "adamw",
    pairs: PairRule | None = None,
    fallback: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The directions of :func:`lora_pro`, positive ascends, for use in a chain.

    Args:
      options: Decays and damping.
      scale: This and other arguments: see :func:`lora_pro`.  Scale of the update.
      method: "adamw" or "sgd".
      pairs: Which leaves are factors.
      fallback: Transform for other leaves.

    Returns:
      The transform.

    Raises:
      ValueError: See :func:`lora_pro`.
      TypeError: See :func:`lora_pro`.

    Examples:
      >>> import optax
      >>> from subspace_jax import optim
      >>> tx = optax.chain(optim.scale_by_lora_pro(method="sgd"), optax.trace(0.9), optax.scale_by_learning_rate(0.1))
    """
    _checks.check_choice("method", method, METHODS)
    b1, b2, eps, delta = options or LoRAProOptions()
    _checks.check_moments(b1, b2, eps)
    _checks.check_number("delta", delta, 0)

    def start(a, b):
        if method == "sgd":
            return (None, None), (None, None)
        return tuple((_zeros_of_the_weight(a, b), None) for _ in range(2))

    def pair(t, f, slots):
        if method == "sgd":
            return adjusted(f, delta), slots
        (mu, at_b), (nu, _) = slots
        f = _factors.bounded(f)
        da, db = nearest(f, delta)
        g = _adam.squarable(f.scale * (linalg.times(da, f.b.mT) + linalg.times(f.a, db.mT)))
        first, second, small = (jnp.asarray(x).astype(g.dtype) for x in (b1, b2, eps))
        t = t.astype(g.dtype)
        mu, nu = first * mu + (1 - first) * g, second * nu + (1 - second) * jnp.square(g)
        wanted = mu / (1 - first**t) / (jnp.sqrt(nu / (1 - second**t)) + small)
        grads = {"grad_a": f.scale * linalg.times(wanted, f.b), "grad_b": f.scale * linalg.gram(wanted, f.a)}
        return adjusted(f._replace(**grads), delta), ((mu, at_b), (nu, at_b))

    def step(t, factors, slots):
        made = [pair(t, *args) for args in zip(factors, slots, strict=True)]
        return [directions for directions, _ in made], [new for _, new in made]

    shared = {"pairs": pairs, "fallback": fallback, "scale": scale}
    return _factors.on_factors(LoRAProState, start, step, **shared)


def _zeros_of_the_weight(a, b):
    dtype = linalg.working_dtype(a, b)

    def specs():
        rows, columns = ([*spec, *[None] * (a.ndim - len(spec))] for spec in map(spec_of, (a, b)))
        # A mesh axis that splits both sides of the weight can split only one of them here.
        return P(*rows[:-1], None if columns[-1] in rows else columns[-1])

    def run(a, b):
        return jnp.zeros_like(jnp.max(a, axis=-1, keepdims=True) * jnp.max(b, axis=-2, keepdims=True), dtype)

    return automatic(run, (a, b), specs)


def nearest(f: Factors, delta: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """A step whose change of the weight is nearest to its gradient: the one that leaves the column space to ``a``."""
    over_a, over_b = (_over(x, delta) for x in (f.a, f.b))
    da = linalg.times(f.grad_a, over_b)
    inside = linalg.times(f.b, linalg.times(over_b, linalg.gram(f.b, f.grad_b)))
    db = linalg.times(f.grad_b - inside, over_a)
    return da / jnp.square(f.scale), db / jnp.square(f.scale)


def adjusted(f: Factors, delta: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """Of all such steps, tall, that nearest to the gradients of the factors: ``da + a X^T`` and ``db - b X``."""
    da, db = nearest(f, delta)
    x = gauge(f, da)
    return da + linalg.times(f.a, x.mT), db - linalg.times(f.b, x)


def gauge(f: Factors, da: jax.Array) -> jax.Array:
    """X of ``(b^T b) X + X (a^T a) = -da^T a`` for tall factors, by two symmetric eigenvalue decompositions."""
    (values_b, vectors_b), (values_a, vectors_a) = (
        linalg.of_each(jnp.linalg.eigh, linalg.gram(x, x)) for x in (f.b, f.a)
    )
    inside = linalg.times(linalg.gram(vectors_b, -linalg.gram(da, f.a)), vectors_a)
    sums = jnp.maximum(values_b, 0)[..., :, None] + jnp.maximum(values_a, 0)[..., None, :]
    # Of dependent columns there are pairs of eigenvalues that are zero but for rounding.
    least = jnp.finfo(sums.dtype).eps * sums.shape[-1] * jnp.max(sums, axis=(-2, -1), keepdims=True)
    inside = jnp.where(sums <= least, 0, inside / jnp.where(sums == 0, 1, sums))
    return linalg.times(linalg.times(vectors_b, inside), vectors_a.mT)


def _over(x, delta):
    m = linalg.gram(x, x)
    return _factors.damped_inverse(m, jnp.asarray(delta).astype(m.dtype))
