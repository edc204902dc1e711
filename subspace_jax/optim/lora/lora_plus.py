"""LoRA+: factors that begin at zero learn faster (arXiv 2402.12354)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from subspace_jax import linalg
from subspace_jax.optim import _adam, _checks
from subspace_jax.optim.lora import _factors
from subspace_jax.optim.lora._factors import PairRule


class LoRAPlusState(NamedTuple):
    """State of :func:`lora_plus`: the number of steps taken, int32 scalar, and that of the transform inside."""

    count: jax.Array
    inner: optax.OptState


def lora_plus(
    learning_rate: optax.ScalarOrSchedule,
    *,
    ratio: ArrayLike = 16.0,
    embedding_rate: optax.ScalarOrSchedule | None = 1e-6,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    weight_decay: ArrayLike = 0.0,
    inner: optax.GradientTransformation | None = None,
    pairs: PairRule | None = None,
) -> optax.GradientTransformationExtraArgs:
    """LoRA+ (Hayou, Ghosh and Yu, arXiv 2402.12354): AdamW, or any other transform, with ``lr_b = ratio lr_a``.

    Decay is decoupled and takes the rate of its leaf.  State: that of Adam, and a counter.

    Args:
      learning_rate: Fixed learning rate or schedule; of ``a`` and of leaves that are no factors.
      ratio: Learning rate of ``b`` over that of ``a``; the paper finds about 16, the authors' example has 20.
      embedding_rate: Learning rate of both factors of embedding tables (pairs called ``embedding``), 1e-6 in the
        authors' code; None treats them like others.
      b1: Decay of Adam's first moment.
      b2: Decay of Adam's second moment.
      eps: Added to the root of the raw second moment.
      weight_decay: Decoupled, for all leaves.
      inner: A transform that gives directions of ascent, instead of Adam.
      pairs: See :func:`adaprelora`.

    Returns:
      The transform.  Its ``update`` needs ``params`` if there is weight decay.  State is float32 for 16-bit parameters,
      where Optax keeps their dtype; complex parameters are refused.

    Raises:
      ValueError: ``ratio`` is not positive; factors have no partner or don't fit; weight decay lacks parameters.
      TypeError: A factor is not of floating point.

    Examples:
      >>> import jax
      >>> from subspace_jax import optim
      >>> factors = {"q": {"a": jax.numpy.ones((8, 2)), "b": jax.numpy.ones((2, 4))}}
      >>> tx = optim.lora_plus(1e-4)
      >>> updates, state = tx.update(factors, tx.init(factors))
      >>> round(float(updates["q"]["b"][0, 0] / updates["q"]["a"][0, 0]))
      16
    """
    _checks.check_number("ratio", ratio, 0, closed=False)
    _checks.check_rule("pairs", pairs)
    rule = _factors.adapter_pairs if pairs is None else pairs
    _checks.check_rate("learning_rate", learning_rate)
    if embedding_rate is not None:
        _checks.check_rate("embedding_rate", embedding_rate, 0)
    _checks.check_moments(b1, b2, eps)
    _checks.check_number("weight_decay", weight_decay, 0)
    if inner is not None:
        _checks.check_transform("inner", inner)
    # A number that is an array is not looked at: that would wait for the device.
    decays = not isinstance(weight_decay, int | float) or weight_decay != 0
    inner = optax.with_extra_args_support(_adam.scale_by_plain_adam(b1, b2, eps) if inner is None else inner)

    def init(params):
        _factors.find_pairs(params, rule)
        return LoRAPlusState(jnp.zeros((), jnp.int32), inner.init(params))

    def update(updates, state, params=None, **extra_args):
        if decays:
            _checks.require_params(params, "the current parameters, which weight decay needs")
        found, structure = _factors.find_pairs(updates, rule)
        leaves = jax.tree.leaves(updates)
        ascents, after = inner.update(updates, state.inner, params, **extra_args)
        weights = structure.flatten_up_to(params) if decays else [None] * len(leaves)
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        table_rate = embedding_rate(state.count) if callable(embedding_rate) else embedding_rate
        rates = [rate] * len(leaves)
        for pair in found:
            is_table = table_rate is not None and pair.name.split("/")[-1] == "embedding"
            rates[pair.a], rates[pair.b] = (table_rate, table_rate) if is_table else (rate, rate * ratio)
            for i in pair.probes or ():
                rates[i] = 0.0

        def leaf(g, ascent, w, rate):
            dtype = linalg.working_dtype(g)
            ascent = ascent.astype(dtype)
            if w is not None:
                ascent = ascent + jnp.asarray(weight_decay).astype(dtype) * w.astype(dtype)
            return (-jnp.asarray(rate).astype(dtype) * ascent).astype(g.dtype)

        rows = zip(leaves, structure.flatten_up_to(ascents), weights, rates, strict=True)
        updates = structure.unflatten([leaf(*row) for row in rows])
        return updates, LoRAPlusState(optax.safe_increment(state.count), after)

    return optax.GradientTransformationExtraArgs(init, update)


def scale_by_lora_plus(
    ratio: ArrayLike = 16.0, *, pairs: PairRule | None = None
) -> optax.GradientTransformationExtraArgs:
    """Multiplies updates of ``b`` by a ratio: what makes LoRA+ of the transforms before it in a chain.

    Args:
      ratio: See :func:`lora_plus`.
      pairs: See :func:`adaprelora`.

    Returns:
      The transform, without a state.

    Raises:
      ValueError: See :func:`lora_plus`.
      TypeError: See :func:`lora_plus`.

    Examples:
      >>> import optax
      >>> from subspace_jax import optim
      >>> tx = optax.chain(optax.scale_by_adam(), optim.scale_by_lora_plus(20.0), optax.scale_by_learning_rate(1e-4))
    """
    _checks.check_number("ratio", ratio, 0, closed=False)
    _checks.check_rule("pairs", pairs)
    rule = _factors.adapter_pairs if pairs is None else pairs

    def init(params):
        _factors.find_pairs(params, rule)
        return optax.EmptyState()

    def update(updates, state, params=None, **extra_args):
        del extra_args
        found, structure = _factors.find_pairs(updates, rule)
        if params is not None:
            structure.flatten_up_to(params)
        leaves = jax.tree.leaves(updates)
        for pair in found:
            b = leaves[pair.b]
            dtype = linalg.working_dtype(b)
            leaves[pair.b] = (jnp.asarray(ratio).astype(dtype) * b.astype(dtype)).astype(b.dtype)
        return structure.unflatten(leaves), state

    return optax.GradientTransformationExtraArgs(init, update)
