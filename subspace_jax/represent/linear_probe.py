"""Linear classifiers on fixed features: full-batch L-BFGS, with the penalty chosen on held-out examples.

The protocol is that of Kornblith et al., "Do Better ImageNet Models Transfer Better?" (arXiv 1805.08974, appendix A.6):
each penalty of a logarithmic grid is tried on held-out examples, then one classifier is fitted to all examples with the
best of them.  The Grassmann study (arXiv 2308.01547) fits a linear SVM instead of logistic regression.
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

# Entries of scores and kernel together; L-BFGS keeps some sixty kernels.
_LARGE = 2**24
# Consecutive steps without a lower objective after which the fit ends.
_STALLED = 3


class LinearProbe(NamedTuple):
    """A linear classifier.

    Attributes:
      kernel: ``[n, classes]`` float32.
      bias: ``[classes]`` float32.
      l2: Penalty of the fit.
      validation: Maps each penalty tried to its accuracy on the held-out examples; empty where the grid has one entry.
    """

    kernel: np.ndarray
    bias: np.ndarray
    l2: float
    validation: dict[float, float]


class Scores(NamedTuple):
    """Accuracy of a classifier.

    Attributes:
      accuracy: Fraction of the examples that are classified correctly.
      class_accuracy: Mean of the accuracies of the classes that occur, the usual figure for Pets and Flowers.
    """

    accuracy: float
    class_accuracy: float


class Examples(NamedTuple):
    """Weighted examples of a fit.

    Attributes:
      features: ``[examples, n]`` float32.
      labels: ``[examples]`` integers.
      weights: ``[examples]`` float32, not all 0.
    """

    features: jax.Array
    labels: jax.Array
    weights: jax.Array


def fit_linear(
    examples: Examples,
    l2: jax.typing.ArrayLike,
    start: tuple[jax.Array, jax.Array],
    *,
    loss: str = "logistic",
    max_steps: int = 500,
    tolerance: float = 1e-5,
) -> tuple[jax.Array, jax.Array]:
    """Minimizes a penalized loss over all examples by L-BFGS with a zoom line search.

    With ``w = weights / sum(weights)`` the objective is ``sum_i w_i loss_i + l2 / 2 ||kernel||^2``; the bias is not
    penalized.  The loss of "logistic" is the multinomial cross-entropy; scikit-learn's ``C`` is ``1 / (l2 N)``.  The
    loss of "hinge" is the squared hinge of each class against the rest, summed over the classes: a linear SVM, equal to
    ``LinearSVC`` with the same ``C`` except that ``LinearSVC`` penalizes the bias.

    Works under ``jit``, also with examples that are sharded over devices.

    Args:
      examples: The examples.
      l2: Penalty, at least 0.
      start: Initial kernel ``[n, classes]`` and bias ``[classes]``, float32.
      loss: One of :data:`LOSSES`.
      max_steps: Maximal number of steps.
      tolerance: The fit ends when no entry of the gradient is larger in absolute value, or when rounding keeps the
        objective from falling.

    Returns:
      Kernel and bias.
    """
    features, labels, weights = examples
    num_classes = start[1].shape[0]
    weights = weights / jnp.sum(weights)

    def objective(params):
        kernel, bias = params
        # A line search needs more precision than the default of TPUs and GPUs.
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
        # The line search stores value and gradient at the new point.
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
    """Fits a linear classifier to all examples, with the penalty that is best on held-out examples.

    The fit sees features that are centered and divided by the root of their mean square, so that a penalty does not
    depend on their scale.  The kernel and bias returned apply to the features as given.

    Args:
      features: ``[examples, n]``.
      labels: ``[examples]`` integers from 0.
      num_classes: Number of classes; the largest label plus 1 by default.
      loss: "logistic" or "hinge"; see :func:`fit_linear`.
      grid: Penalties to try, for the scaled features; with a single entry no example is held out.
      held_out: Fraction of each class to hold out, in (0, 1).
      seed: Seed of the choice of held-out examples.
      max_steps: Maximal number of steps of a fit.
      tolerance: See :func:`fit_linear`.
      mesh: Mesh over which the examples are sharded; all devices by default.

    Returns:
      The classifier.

    Raises:
      ValueError: A shape, a label or an option is invalid.
    """
    features, labels, num_classes = check_examples(features, labels, num_classes)
    if loss not in LOSSES:
        raise ValueError(f"loss: expected one of {LOSSES}, got {loss!r}")
    if not len(grid) or not all(0 <= l2 < math.inf for l2 in grid):
        raise ValueError(f"grid: expected one or more finite penalties of at least 0, got {tuple(grid)}")
    if not 0 < held_out < 1:
        raise ValueError(f"held_out: expected a fraction in (0, 1), got {held_out}")
    occurring = len(np.unique(labels))
    if sum(features.shape) * num_classes > _LARGE and num_classes > 2 * occurring:
        raise ValueError(
            f"labels: expected examples of most of {num_classes} classes for features {list(features.shape)}, got "
            f"{occurring}; number those that occur from 0"
        )
    mean = features.mean(axis=0, dtype=np.float64).astype(np.float32)
    scale = max(float(np.sqrt(np.mean(np.square(features - mean), dtype=np.float64))), np.finfo(np.float32).tiny)
    mesh = train.make_mesh() if mesh is None else mesh
    scaled = (features - mean) / np.float32(scale)
    examples = Examples(*shard_examples(mesh, scaled, labels, np.ones(len(labels), np.float32)))
    start = jnp.zeros((features.shape[1], num_classes)), jnp.zeros(num_classes)
    run = _jitted(fit_linear, loss=loss, max_steps=max_steps, tolerance=tolerance)
    validation = {}
    best = float(grid[0])
    if len(grid) > 1:
        (left_out,) = shard_examples(mesh, hold_out(labels, held_out, seed).astype(np.float32))
        rest = examples._replace(weights=examples.weights - left_out)
        aside = examples._replace(weights=left_out)
        params, kernels = start, {}
        # From the strongest penalty to the weakest, each fit starting from the previous one.
        for l2 in sorted(map(float, grid), reverse=True):
            params = kernels[l2] = run(rest, l2, params)
            validation[l2] = float(_accuracy(aside, params))
        # The median of the best: where features separate all classes, most penalties are equally good.
        equal = [l2 for l2, accuracy in validation.items() if accuracy == max(validation.values())]
        best = sorted(equal)[len(equal) // 2]
        start = kernels[best]
    kernel, bias = (np.asarray(part, np.float32) for part in run(examples, best, start))
    kernel = kernel / np.float32(scale)
    return LinearProbe(kernel, bias - mean @ kernel, best, validation)


def probe_logits(probe: LinearProbe, features: np.ndarray) -> np.ndarray:
    """Returns the logits ``[examples, classes]`` of features ``[examples, n]``."""
    return features @ probe.kernel + probe.bias


def scores_of(predicted: np.ndarray, labels: np.ndarray) -> Scores:
    """Computes accuracies.

    Args:
      predicted: ``[examples]`` integers.
      labels: ``[examples]`` integers.

    Raises:
      ValueError: There are no examples, or the shapes differ.
    """
    if predicted.shape != labels.shape or not labels.size:
        raise ValueError(
            f"predicted: expected the shape of labels, not empty, got {predicted.shape} and {labels.shape}"
        )
    right = (predicted == labels).astype(np.float64)
    _, group, counts = np.unique(labels, return_inverse=True, return_counts=True)
    return Scores(float(right.mean()), float(np.mean(np.bincount(group, right) / counts)))


def hold_out(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Draws a fraction of each class: at least one example and not all of them; none of a class with one example.

    Returns:
      Mask of the examples drawn, ``[examples]`` booleans.

    Raises:
      ValueError: No class has two examples.
    """
    rng = np.random.default_rng(seed)
    aside = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        own = rng.permutation(np.flatnonzero(labels == label))
        if len(own) > 1:
            aside[own[: min(max(1, round(fraction * len(own))), len(own) - 1)]] = True
    if not aside.any():
        raise ValueError("labels: expected a class with two or more examples, of which one is held out, got none")
    return aside


def check_examples(
    features: np.ndarray, labels: np.ndarray, num_classes: int | None = None
) -> tuple[np.ndarray, np.ndarray, int]:
    """Returns float32 features, int32 labels and the number of classes.

    Raises:
      ValueError: Shapes differ, there are no examples, a feature is not finite, or a label is out of range.
    """
    features, labels = np.asarray(features, np.float32), np.asarray(labels)
    if features.ndim != 2 or labels.shape != features.shape[:1] or not len(labels):
        raise ValueError(
            f"features, labels: expected [examples, n] and [examples], got {features.shape} and {labels.shape}"
        )
    if not np.isfinite(features).all():
        raise ValueError("features: expected finite values, got NaN or infinity")
    num_classes = count_classes(labels, num_classes)
    return features, labels.astype(np.int32), num_classes


def shard_examples(mesh: Mesh, *arrays: np.ndarray) -> tuple[jax.Array, ...]:
    """Shards the leading axis of arrays that each process holds, zero-padded to a multiple of the mesh size."""
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
def _accuracy(examples, params):
    features, labels, weights = examples
    kernel, bias = params
    right = jnp.argmax(features @ kernel + bias[None], axis=-1) == labels
    return jnp.sum(weights * right.astype(weights.dtype)) / jnp.sum(weights)
