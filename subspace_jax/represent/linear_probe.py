"""Linear classifiers on fixed features: full-batch L-BFGS, the penalty chosen on a part that is held out.

The protocol is that of Kornblith et al., "Do Better ImageNet Models Transfer Better?" (arXiv 1805.08974, appendix A.6):
penalties on a logarithmic grid, each tried on held-out examples, then one fit to all examples with the best of them.
The Grassmann study (arXiv 2308.01547) takes a linear SVM instead of logistic regression.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from subspace_jax import losses, train
from subspace_jax.represent.labels import count_classes

LOSSES = ("logistic", "hinge")
DEFAULT_GRID = tuple(10.0 ** (k / 2) for k in range(-14, 3))

# Entries of scores and kernel together; the fit keeps some sixty kernels.
_LARGE = 2**24
# Steps in a row that find nothing lower.
_STALLED = 3


class LinearProbe(NamedTuple):
    """A linear classifier.

    Attributes:
      kernel: ``[n, classes]`` float32.
      bias: ``[classes]`` float32.
      l2: The penalty that it was fitted with.
      validation: Penalty to accuracy on the held-out part, of all that were tried; empty where none was held out.
    """

    kernel: np.ndarray
    bias: np.ndarray
    l2: float
    validation: dict[float, float]


class Scores(NamedTuple):
    """How well a classifier does.

    Attributes:
      accuracy: Share of the examples that are right.
      class_accuracy: Mean over the classes that occur of that share, as Pets and Flowers are reported by most.
    """

    accuracy: float
    class_accuracy: float


def fit_linear(
    features: jax.Array,
    labels: jax.Array,
    weights: jax.Array,
    l2: jax.typing.ArrayLike,
    start: tuple[jax.Array, jax.Array],
    *,
    loss: str = "logistic",
    max_steps: int = 500,
    tolerance: float = 1e-5,
) -> tuple[jax.Array, jax.Array]:
    """Minimises a penalised loss over all examples by L-BFGS with a zoom line search.

    With ``w = weights / sum(weights)`` the objective is ``sum_i w_i loss_i + l2 / 2 ||kernel||^2``; the bias is free.
    Of "logistic" the loss is the multinomial cross-entropy, so that scikit-learn's ``C`` is ``1 / (l2 N)``; of "hinge"
    the squared hinge of one class against the rest, summed over the classes: a linear SVM, as ``LinearSVC`` with the
    same ``C`` but for its penalty on the bias.

    Works under ``jit``, where rows may be split over the devices; the compiler adds up what they have.

    Args:
      features: ``[examples, n]`` float32.
      labels: ``[examples]`` integers.
      weights: ``[examples]`` float32, not all 0; an example of weight 0 does not count.
      l2: The penalty, at least 0.
      start: Kernel ``[n, classes]`` and bias ``[classes]``, float32.
      loss: One of :data:`LOSSES`.
      max_steps: Steps after which it ends anyway.
      tolerance: It ends where no component of the gradient is larger; or where the objective no longer falls, for what
        is left is the rounding of its sums.

    Returns:
      Kernel and bias.
    """
    num_classes = start[1].shape[0]
    weights = weights / jnp.sum(weights)

    def objective(params):
        kernel, bias = params
        # What TPUs and GPUs round a product to by default is no gradient for a line search.
        scores = jnp.matmul(features, kernel, precision=jax.lax.Precision.HIGHEST) + bias[None]
        if loss == "logistic":
            each = losses.cross_entropy(scores, labels)
        else:
            signs = 2.0 * jax.nn.one_hot(labels, num_classes, dtype=scores.dtype) - 1.0
            each = jnp.sum(jnp.square(jax.nn.relu(1.0 - signs * scores)), axis=-1)
        return jnp.sum(weights * each) + 0.5 * l2 * jnp.sum(jnp.square(kernel))

    solver = optax.lbfgs(memory_size=20)
    value_and_grad = optax.value_and_grad_from_state(objective)

    def step(carry):
        params, state, _, lowest, stalled, count = carry
        value, grad = value_and_grad(params, state=state)
        updates, state = solver.update(grad, state, params, value=value, grad=grad, value_fn=objective)
        params = optax.apply_updates(params, updates)
        # The line search leaves value and gradient at the new point.
        largest = optax.tree.norm(optax.tree.get(state, "grad"), ord=jnp.inf)
        value = optax.tree.get(state, "value")
        stalled = jnp.where(value < lowest, 0, stalled + 1)
        return params, state, largest, jnp.minimum(lowest, value), stalled, count + 1

    def unfinished(carry):
        _, _, largest, _, stalled, count = carry
        return (largest > tolerance) & (stalled < _STALLED) & (count < max_steps)

    far = jnp.asarray(jnp.inf, start[1].dtype)
    return jax.lax.while_loop(unfinished, step, (start, solver.init(start), far, far, 0, 0))[0]


def linear_probe(
    features: np.ndarray,
    labels: np.ndarray,
    *,
    num_classes: int | None = None,
    loss: str = "logistic",
    grid: Sequence[float] = DEFAULT_GRID,
    held_out: float = 0.2,
    seed: int = 0,
    max_steps: int = 500,
    tolerance: float = 1e-5,
    mesh: Mesh | None = None,
) -> LinearProbe:
    """Fits a linear classifier, with the penalty that serves best on a part that is held out, to all examples.

    Features are centred, and divided by one number such that the mean of their squares is 1: a penalty means the same
    for features of any scale.  Kernel and bias that come back are for the features as they were given.

    Args:
      features: ``[examples, n]``.
      labels: ``[examples]`` integers from 0.
      num_classes: Number of classes; the largest label plus 1 by default.
      loss: "logistic" or "hinge"; see :func:`fit_linear`.
      grid: Penalties to try, in the units of the scaled features; one alone is taken as it is.
      held_out: Share of each class to try them on, in (0, 1).
      seed: Seed of which examples these are.
      max_steps: Steps of one fit.
      tolerance: See :func:`fit_linear`.
      mesh: Rows of the features are split over it; all devices by default.

    Returns:
      The classifier.

    Raises:
      ValueError: Shapes, labels or numbers can't serve.
    """
    features, labels, num_classes = check_examples(features, labels, num_classes)
    if loss not in LOSSES:
        raise ValueError(f"loss: expected one of {LOSSES}, got {loss!r}")
    if not len(grid) or not all(0 <= l2 < math.inf for l2 in grid):
        raise ValueError(f"grid: expected one or more finite penalties of at least 0, got {tuple(grid)}")
    if not 0 < held_out < 1:
        raise ValueError(f"held_out: expected a share in (0, 1), got {held_out}")
    occurring = len(np.unique(labels))
    if sum(features.shape) * num_classes > _LARGE and num_classes > 2 * occurring:
        raise ValueError(
            f"labels: expected examples of most of {num_classes} classes for features {list(features.shape)}, got "
            f"{occurring}; number those that occur from 0"
        )
    mean = features.mean(axis=0, dtype=np.float64).astype(np.float32)
    scale = max(float(np.sqrt(np.mean(np.square(features - mean), dtype=np.float64))), np.finfo(np.float32).tiny)
    mesh = train.make_mesh() if mesh is None else mesh
    x, y, real = rows_on(mesh, (features - mean) / np.float32(scale), labels, np.ones(len(labels), np.float32))
    start = jnp.zeros((features.shape[1], num_classes)), jnp.zeros(num_classes)
    run = _jitted(fit_linear, loss=loss, max_steps=max_steps, tolerance=tolerance)
    validation = {}
    best = float(grid[0])
    if len(grid) > 1:
        aside = held_out_rows(labels, held_out, seed)
        (left,) = rows_on(mesh, aside.astype(np.float32))
        params, kernels = start, {}
        # From strong to weak: each fit begins where the one before ended.
        for l2 in sorted(map(float, grid), reverse=True):
            params = kernels[l2] = run(x, y, real - left, l2, params)
            validation[l2] = float(_hits(x, y, left, params))
        # The middle one among equals: on features that tell all classes apart, most are.
        equal = [l2 for l2, accuracy in validation.items() if accuracy == max(validation.values())]
        best = sorted(equal)[len(equal) // 2]
        start = kernels[best]
    kernel, bias = (np.asarray(part, np.float32) for part in run(x, y, real, best, start))
    kernel = kernel / np.float32(scale)
    return LinearProbe(kernel, bias - mean @ kernel, best, validation)


def probe_logits(probe: LinearProbe, features: np.ndarray) -> np.ndarray:
    """Returns the scores ``[examples, classes]`` of features ``[examples, n]``."""
    return features @ probe.kernel + probe.bias


def scores_of(predicted: np.ndarray, labels: np.ndarray) -> Scores:
    """Counts what is right.

    Args:
      predicted: ``[examples]`` integers.
      labels: ``[examples]`` integers.

    Raises:
      ValueError: There is none, or the shapes differ.
    """
    if predicted.shape != labels.shape or not labels.size:
        raise ValueError(f"predicted: expected the shape of labels, not empty, got {predicted.shape}, {labels.shape}")
    right = (predicted == labels).astype(np.float64)
    _, group, counts = np.unique(labels, return_inverse=True, return_counts=True)
    return Scores(float(right.mean()), float(np.mean(np.bincount(group, right) / counts)))


def held_out_rows(labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Draws a share of every class, at least one and never all of those that have two or more.

    Returns:
      ``[examples]`` booleans.

    Raises:
      ValueError: No class has two examples.
    """
    rng = np.random.default_rng(seed)
    aside = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        own = rng.permutation(np.flatnonzero(labels == label))
        if len(own) > 1:
            aside[own[: min(max(1, round(share * len(own))), len(own) - 1)]] = True
    if not aside.any():
        raise ValueError("labels: expected a class with two examples to hold one out, got none")
    return aside


def check_examples(
    features: np.ndarray, labels: np.ndarray, num_classes: int | None = None
) -> tuple[np.ndarray, np.ndarray, int]:
    """Returns float32 features, int32 labels and the number of classes.

    Raises:
      ValueError: Shapes don't match, there is no example, a feature is not finite, or a label is out of range.
    """
    features, labels = np.asarray(features, np.float32), np.asarray(labels)
    if features.ndim != 2 or labels.shape != features.shape[:1] or not len(labels):
        raise ValueError(
            f"features, labels: expected [examples, n] and [examples], got {features.shape} and {labels.shape}"
        )
    if not np.isfinite(features).all():
        raise ValueError("features: expected finite numbers, got some that are not")
    num_classes = count_classes(labels, num_classes)
    return features, labels.astype(np.int32), num_classes


def rows_on(mesh: Mesh, *arrays: np.ndarray) -> tuple[jax.Array, ...]:
    """Splits the rows of arrays that every process holds over the devices, filled up with zeros to a multiple."""
    sharding = NamedSharding(mesh, P(mesh.axis_names))
    placed = []
    for array in arrays:
        array = np.pad(array, [(0, -len(array) % mesh.size), *[(0, 0)] * (array.ndim - 1)])
        placed.append(jax.make_array_from_callback(array.shape, sharding, array.__getitem__))
    return tuple(placed)


@functools.cache
def _jitted(function, **static):
    return jax.jit(functools.partial(function, **static))


@jax.jit
def _hits(features, labels, weights, params):
    kernel, bias = params
    right = jnp.argmax(features @ kernel + bias[None], axis=-1) == labels
    return jnp.sum(weights * right.astype(weights.dtype)) / jnp.sum(weights)
