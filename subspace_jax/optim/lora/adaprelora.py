"""AdaPreLoRA: LoRA factors move so that the weight follows Adafactor's step on all of it (arXiv 2605.08734)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from subspace_jax import linalg
from subspace_jax.optim import _adam, _checks
from subspace_jax.optim.lora import _factors
from subspace_jax.optim.lora._factors import Factors, PairRule, ScaleRule

PyTree = Any

STATISTICS = ("full", "sum", "projected")


class AdaPreLoRAState(NamedTuple):
    """State of :func:`adaprelora`; trees like the parameters, float32 (float64 for float64 factors).

    Attributes:
      count: Steps taken, int32 scalar.
      momentum: Averages of the factors' gradients, like the factors; None without momentum.  Here and below ``[1]`` for
        other leaves.
      energy: Averages of mean squares of the weight's gradient: of its rows ``[..., in]`` in the place of ``a``, of
        its columns ``[..., out]`` in that of ``b``.
      previous: The factors of the last step, if momenta are transported.
      fallback: State for other leaves.
    """

    count: jax.Array
    momentum: PyTree
    energy: PyTree
    previous: PyTree
    fallback: optax.OptState


class AdaPreLoRAOptions(NamedTuple):
    """Decays, damping and limits of :func:`adaprelora`.

    Attributes:
      b1: Decay of the momentum, None for none.
      b2: Decay of the energies.
      damping_rel: Share of the mean diagonal that is added to the r x r matrices.
      damping_abs: The same, as a share of the mean weight.
      eps_rel: Share of the mean energy that is added to each.
      clip_rms: Cap on the root mean square of the first-order change of a weight, None for none.
      transport: Whether momenta follow the partner's change of basis; steps then do not depend on how the update is
        factored.
    """

    b1: ArrayLike | None = 0.9
    b2: ArrayLike = 0.999
    damping_rel: ArrayLike = 1e-2
    damping_abs: ArrayLike = 1e-8
    eps_rel: ArrayLike = 1e-8
    clip_rms: ArrayLike | None = None
    transport: bool = False


def adaprelora(
    learning_rate: optax.ScalarOrSchedule = 2e-4,
    *,
    scale: ArrayLike | tuple[float, ...] | ScaleRule = 1.0,
    stats: str = "full",
    b1: ArrayLike | None = 0.9,
    b2: ArrayLike = 0.999,
    damping_rel: ArrayLike = 1e-2,
    damping_abs: ArrayLike = 1e-8,
    eps_rel: ArrayLike = 1e-8,
    clip_rms: ArrayLike | None = None,
    transport: bool = False,
    weight_decay: ArrayLike = 0.0,
    pairs: PairRule | None = None,
    fallback: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """AdaPreLoRA (Liu, Bian and Cai, arXiv 2605.08734) for ``a [..., in, r]`` and ``b [..., r, out]`` of ``s a b``.

    The default ``stats="full"`` needs gradient probes beside the factors
    (:func:`subspace_jax.adapters.add_gradient_probes`); ``stats="projected"`` needs nothing besides the factors.

    Adafactor divides the weight's gradient G by ``H_ij = p_i q_j``, from energies of rows and columns.  Of all factor
    steps whose first-order change of the weight is nearest to ``G / H`` in the norm weighted by H, this takes the one
    that is balanced between both factors, by two r x r inverses.  Steps have the size of Adam's.

    State of a pair: ``(in + out)(r + 1)`` entries, ``in + out`` without momentum, and ``(in + out) r`` more with
    transport.  Cost of a step: ``O((in + out) r^2 + r^3)``; energies for "full" cost the matmul ``x^T dy`` besides,
    in the backward pass.  No array has the size of the weight.

    The statistic "full" takes the energies of the true gradient.  They arrive as gradients of the probes, so that a
    train step needs no change; exclude them from clipping by the global norm.  Or
    ``update(..., energies={"path/of/pair": (rows, columns)})`` gives them: sums of squares ``[..., in]`` and
    ``[..., out]``, of :func:`subspace_jax.kernels.weight_grad_energy`.

    Args:
      learning_rate: Fixed learning rate or schedule.
      scale: The scale s of the update (that of the :class:`subspace_jax.adapters.LoRA`): a number, a tuple over
        stacked layers, or a rule of the path of the pair.
      stats: "full"; "sum", of ``a grad_b + grad_a b``, whose size is that of the factors and which trains badly; or
        "projected", of the part of G that the factors' gradients determine.
      b1: Decay of the momentum, None for none.
      b2: Decay of the energies.
      damping_rel: This and other arguments: see :class:`AdaPreLoRAOptions`.
      damping_abs: Absolute damping.
      eps_rel: Relative floor of energies.
      clip_rms: Cap on the change of a weight.
      transport: Whether momenta follow the basis.
      weight_decay: Decoupled, for all leaves.
      pairs: Rule of the path of a leaf that gives ``(name of the pair, role)``, roles "a", "b", "row_energy" and
        "column_energy", or None.  By default leaves of these names (or lora_a, lora_b) under one parent.
      fallback: Transform for all other leaves, which gives directions of ascent; Adam by default.

    Returns:
      The transform.  Its ``update`` needs ``params``.  State is float32 for 16-bit parameters, where Optax keeps their
      dtype; complex parameters are refused.

    Raises:
      ValueError: ``stats`` is unknown or a number out of range; ``init`` and ``update`` raise it where factors have no
        partner or don't fit, ``update`` without parameters, and for "full" without energies.
      TypeError: A factor is not of floating point.

    Examples:
      >>> import jax
      >>> from subspace_jax import optim
      >>> factors = {"q": {"a": jax.numpy.ones((8, 2)), "b": jax.numpy.zeros((2, 4))}}
      >>> tx = optim.adaprelora(1e-3, scale=2.0, stats="projected")
      >>> updates, state = tx.update(factors, tx.init(factors), factors)
      >>> state[0].energy["q"]["b"].shape
      (4,)
    """
    options = AdaPreLoRAOptions(b1, b2, damping_rel, damping_abs, eps_rel, clip_rms, transport)
    scaled = scale_by_adaprelora(options, scale=scale, stats=stats, pairs=pairs, fallback=fallback)
    return optax.chain(scaled, _adam.descend(learning_rate, weight_decay, after=False))


def scale_by_adaprelora(
    options: AdaPreLoRAOptions | None = None,
    *,
    scale: ArrayLike | tuple[float, ...] | ScaleRule = 1.0,
    stats: str = "full",
    pairs: PairRule | None = None,
    fallback: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The directions of :func:`adaprelora`, positive ascends, for use in a chain.

    Args:
      options: Decays, damping and limits.
      scale: This and other arguments: see :func:`adaprelora`.  Scale of the update.
      stats: Which energies.
      pairs: Which leaves are factors.
      fallback: Transform for other leaves.

    Returns:
      The transform.

    Raises:
      ValueError: See :func:`adaprelora`.
      TypeError: See :func:`adaprelora`.

    Examples:
      >>> import optax
      >>> from subspace_jax import optim
      >>> tx = optax.chain(optim.scale_by_adaprelora(stats="projected"), optax.scale_by_learning_rate(1e-3))
    """
    _checks.check_choice("stats", stats, STATISTICS)
    options = options or AdaPreLoRAOptions()
    b1, b2, damping_rel, damping_abs, eps_rel, clip_rms, transport = options
    if b1 is not None:
        _checks.check_number("b1", b1, 0, 1)
    _checks.check_number("b2", b2, 0, 1)
    for name in ("damping_rel", "damping_abs", "eps_rel"):
        _checks.check_number(name, getattr(options, name), 0)
    if clip_rms is not None:
        _checks.check_number("clip_rms", clip_rms, 0, closed=False)

    def start(a, b):
        momentum = (None, None) if b1 is None else (_factors.zeros(a), _factors.zeros(b))
        previous = (_factors.zeros(a), _factors.zeros(b)) if transport else (None, None)
        return momentum, (_factors.zeros(a, -1), _factors.zeros(b, -2)), previous

    def step(t, factors, slots):
        both = [pair(t, *args) for args in zip(factors, slots, strict=True)]
        return [directions for directions, _ in both], [new for _, new in both]

    def pair(t, f, slots):
        f = _factors.bounded(f)
        momentum, energy, previous = slots
        dtype = f.a.dtype
        t, beta = t.astype(dtype), jnp.asarray(b2).astype(dtype)
        now = mean_squares(stats, f)
        energy = tuple(beta * old + (1 - beta) * new for old, new in zip(energy, now, strict=True))
        rows, columns = (e / (1 - beta**t) for e in energy)

        used = (f.grad_a, f.grad_b)
        if b1 is not None:
            decay = jnp.asarray(b1).astype(dtype)
            if transport:
                momentum = (
                    _transported(momentum[0], previous[1], f.b),
                    _transported(momentum[1], previous[0], f.a),
                )
            momentum = tuple(decay * m + (1 - decay) * g for m, g in zip(momentum, used, strict=True))
            used = tuple(m / (1 - decay**t) for m in momentum)

        weights, alive = preconditioner(rows, columns, jnp.asarray(eps_rel).astype(dtype))
        da, db = factor_step(f._replace(grad_a=used[0], grad_b=used[1]), *weights, damping_rel, damping_abs)
        da, db = (jnp.where(alive[..., None, None], d, 0) for d in (da, db))
        if clip_rms is not None:
            size = jnp.sqrt(_change_mean_square(f, da, db))
            shrink = jnp.maximum(1, size / jnp.asarray(clip_rms).astype(dtype))
            da, db = da / shrink, db / shrink
        return (da, db), (momentum, energy, (f.a, f.b) if transport else previous)

    return _factors.on_factors(
        AdaPreLoRAState,
        start,
        step,
        pairs=pairs,
        fallback=fallback,
        scale=scale,
        with_energies=stats == "full",
    )


def mean_squares(stats: str, f: Factors) -> tuple[jax.Array, jax.Array]:
    """Mean squares of the gradient of a weight or of what stands for it: of rows ``[..., in]``, of columns."""
    size_in, size_out = f.a.shape[-2], f.b.shape[-2]
    if stats == "full":
        return f.energies[0] / size_out, f.energies[1] / size_in
    left, right = _sum_factors(f) if stats == "sum" else _projected_factors(f)
    # Of left right^T, never formed.
    rows = jnp.sum(linalg.times(left, linalg.gram(right, right)) * left, axis=-1)
    columns = jnp.sum(linalg.times(right, linalg.gram(left, left)) * right, axis=-1)
    # Rounding may leave a tiny negative number where all but nothing is left.
    return jnp.maximum(rows, 0) / size_out, jnp.maximum(columns, 0) / size_in


def _sum_factors(f):
    return jnp.concatenate([f.a, f.grad_a], axis=-1), jnp.concatenate([f.grad_b, f.b], axis=-1)


def _projected_factors(f):
    """The tangent part of G, ``P_b G + G P_a - P_b G P_a``, as a product of 2 r columns."""
    gram_a, gram_b = linalg.gram(f.a, f.a), linalg.gram(f.b, f.b)
    # Where a factor is all zeros there is nothing to project on.
    over_b, over_a = (
        jnp.where(size == 0, 0, _factors.damped_inverse(m, 1e-6 * size))
        for m, size in ((m, _factors.trace_mean(m)) for m in (gram_b, gram_a))
    )
    along = linalg.times(f.grad_a, over_b) / f.scale
    along = along - linalg.times(f.a, linalg.times(over_a, linalg.gram(f.a, along)))
    across = linalg.times(f.grad_b, over_a) / f.scale
    return jnp.concatenate([along, f.a], axis=-1), jnp.concatenate([f.b, across], axis=-1)


def preconditioner(
    rows: jax.Array, columns: jax.Array, eps_rel: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """Weights of rows and columns whose product is the root of Adafactor's second moment.

    Also returns whether there was any gradient yet: where there was none, weights are ones.  What is not a number is
    taken for a gradient, so that it is seen in the step.
    """
    mean_rows, mean_columns = (jnp.mean(e, axis=-1, keepdims=True) for e in (rows, columns))
    alive = (mean_rows != 0) & (mean_columns != 0)
    rows, columns = (
        jnp.where(alive, e + eps_rel * mean, 1) for e, mean in ((rows, mean_rows), (columns, mean_columns))
    )
    # The mean that both have in common, floored like them.
    mean = jnp.where(alive, mean_columns * (1 + eps_rel), 1)
    return (jnp.sqrt(rows / mean), jnp.sqrt(columns)), alive[..., 0]


def factor_step(
    f: Factors, rows: jax.Array, columns: jax.Array, damping_rel: ArrayLike, damping_abs: ArrayLike
) -> tuple[jax.Array, jax.Array]:
    """The balanced factor step whose weight change is nearest to ``G / H`` in the norm weighted by H.

    Source: arXiv 2605.08734, Theorem 3.2.

    Args:
      f: The pair, with the gradients to be followed.
      rows: Weights of rows ``[..., in]``.
      columns: Weights of columns ``[..., out]``.
      damping_rel: See :func:`adaprelora`.
      damping_abs: See :func:`adaprelora`.

    Returns:
      ``da [..., in, r]`` and ``db [..., out, r]``, tall.
    """
    relative, absolute = (jnp.asarray(x).astype(f.a.dtype) for x in (damping_rel, damping_abs))

    def over(x, weights):
        m = linalg.gram(x, weights[..., None] * x)
        floor = absolute * jnp.mean(weights, axis=-1)[..., None, None]
        return _factors.damped_inverse(m, relative * _factors.trace_mean(m) + floor)

    def side(g, x, weights, own, other):
        inside = linalg.times(x, linalg.times(own, linalg.gram(x, g)))
        return linalg.times(g / weights[..., None] - inside / 2, other) / jnp.square(f.scale)

    over_a, over_b = over(f.a, rows), over(f.b, columns)
    return side(f.grad_a, f.a, rows, over_a, over_b), side(f.grad_b, f.b, columns, over_b, over_a)


def _transported(momentum, old, new):
    """Moves the average of gradients ``s G b`` from an old partner b to a new one."""
    m = linalg.gram(old, old)
    # As small as rounding lets it be: a larger ridge would shorten the momentum a little at every step.
    turn = linalg.times(_factors.damped_inverse(m, jnp.zeros_like(_factors.trace_mean(m))), linalg.gram(old, new))
    return linalg.times(momentum, turn)


def _change_mean_square(f, da, db):
    left, right = jnp.concatenate([da, f.a], axis=-1), jnp.concatenate([f.b, db], axis=-1)
    total = jnp.sum(linalg.gram(left, left) * linalg.gram(right, right), axis=(-2, -1))[..., None, None]
    return jnp.square(f.scale) * jnp.maximum(total, 0) / (f.a.shape[-2] * f.b.shape[-2])
