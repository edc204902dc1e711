"""The optimizer loop of all adapters on fixed features."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

PyTree = Any


@functools.partial(jax.jit, static_argnames=("loss", "tx"))
def fit_steps(
    loss: Callable[..., jax.Array],
    tx: optax.GradientTransformation,
    params: PyTree,
    order: jax.Array,
    examples: PyTree,
    rest: PyTree = (),
) -> tuple[PyTree, jax.Array]:
    """Minimizes a loss over batches of examples that fit in memory, in one compiled loop.

    It compiles once for each loss, transform and set of shapes: pass the same objects for the fits of many draws.

    Args:
      loss: ``loss(params, batch, *rest) -> scalar``, with ``batch`` the chosen rows of ``examples``.
      tx: Optimizer.
      params: Where it starts.
      order: Indices of the examples of each step, ``[steps, batch]`` integers, see :func:`batch_order`.
      examples: Pytree of arrays with a leading axis of examples.
      rest: Further arguments of the loss.

    Returns:
      The parameters after all steps, and the loss before each, ``[steps]``.
    """

    def step(carry, index):
        params, state = carry
        batch = jax.tree.map(lambda x: x[index], examples)
        value, grads = jax.value_and_grad(loss)(params, batch, *rest)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), value

    (params, _), losses = jax.lax.scan(step, (params, tx.init(params)), order)
    return params, losses


def batch_order(key: jax.Array, num_examples: int, *, epochs: int, batch_size: int) -> np.ndarray:
    """Draws the batches of a fit: each epoch shuffles the examples, and drops the last batch if it is not full.

    Args:
      key: Random key.
      num_examples: Number of examples; where it is below ``batch_size``, a batch holds all of them.
      epochs: Number of epochs.
      batch_size: Examples of a batch.

    Returns:
      Indices ``[steps, batch]``.

    Raises:
      ValueError: A number is below 1.
    """
    for name, value in (("num_examples", num_examples), ("epochs", epochs), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    batch_size = min(batch_size, num_examples)
    draws = np.asarray(jax.random.bits(key, (epochs, num_examples)))
    kept = num_examples // batch_size * batch_size
    return np.argsort(draws, axis=1, kind="stable")[:, :kept].reshape(-1, batch_size)


@functools.cache
def adamw_to_zero(learning_rate: float, steps: int) -> optax.GradientTransformation:
    """AdamW as in Tip-Adapter-F's code: a cosine schedule to 0, epsilon 1e-4, weight decay 0.01.

    Args:
      learning_rate: Rate of the first step.
      steps: Number of steps.

    Returns:
      The transform, the same object for the same arguments.
    """
    return optax.adamw(_cosine(learning_rate, steps), eps=1e-4, weight_decay=0.01)


@functools.cache
def sgd_of_coop(learning_rate: float, steps: int, warmup: int = 0) -> optax.GradientTransformation:
    """SGD as in CoOp's code: momentum 0.9, weight decay 5e-4, a cosine schedule to 0 after a warm-up at 1e-5.

    Args:
      learning_rate: Rate of the cosine at step 0; 0.002 in the code.
      steps: Number of steps, those of the warm-up included.
      warmup: Steps of the warm-up; those of an epoch in the code.

    Returns:
      The transform, the same object for the same arguments.
    """
    decay = optax.add_decayed_weights(5e-4)
    return optax.chain(decay, optax.sgd(_cosine(learning_rate, steps, warmup), momentum=0.9))


def _cosine(learning_rate: float, steps: int, warmup: int = 0) -> optax.Schedule:
    def schedule(count):
        phase = count.astype(jnp.result_type(float)) * (math.pi / steps)
        return jnp.where(count < warmup, 1e-5, 0.5 * learning_rate * (1.0 + jnp.cos(phase)))

    return schedule
