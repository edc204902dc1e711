"""The linear probe of CoOp: logistic regression with scikit-learn's ``C``, chosen on validation examples."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax.linalg import times, working_dtype
from subspace_jax.represent.few_shot_survey.clip_adapter import Shots
from subspace_jax.represent.few_shot_survey.prototypes import check_labels
from subspace_jax.represent.linear_probe import Examples, fit_linear

C_GRID = (1e6, 1e4, 1e2, 1.0, 1e-2, 1e-4, 1e-6)


class Probe(NamedTuple):
    """A linear classifier.

    Attributes:
      kernel: ``[n, classes]``.
      bias: ``[classes]``.
    """

    kernel: jax.Array
    bias: jax.Array

    def logits(self, features: jax.Array) -> jax.Array:
        """Returns the logits ``[examples, classes]`` of features ``[examples, n]``."""
        return times(features, self.kernel) + self.bias[None]


def linear_probe(
    shots: Shots,
    num_classes: int,
    c: float = 1.0,
    *,
    start: Probe | None = None,
    max_steps: int = 1000,
    tolerance: float = 1e-5,
) -> Probe:
    """Minimizes ``||kernel||^2 / 2 + c sum_i cross_entropy_i``: scikit-learn's ``LogisticRegression(C=c)``.

    Args:
      shots: Labelled features, used as they are.
      num_classes: Number of classes.
      c: Weight of the examples, positive.
      start: Where it starts, such as the zero-shot classifier ``Probe(scale * text.T, zeros)``; zeros by default.  The
        optimum is the same, and few steps stay near the start.
      max_steps: See :func:`subspace_jax.represent.fit_linear`.
      tolerance: See there; the objective is divided by ``c`` times the number of examples.

    Returns:
      The classifier, float32 or wider.

    Raises:
      ValueError: Shapes don't match, a label is out of range, or ``c`` is not positive.
    """
    check_labels(shots.features, shots.labels, num_classes)
    if not c > 0:
        raise ValueError(f"c: expected a positive number, got {c}")
    features = jnp.asarray(shots.features, working_dtype(shots.features))
    if start is None:
        start = Probe(
            jnp.zeros((features.shape[1], num_classes), features.dtype), jnp.zeros(num_classes, features.dtype)
        )
    examples = Examples(features, jnp.asarray(shots.labels), jnp.ones(features.shape[0], features.dtype))
    l2 = jnp.asarray(1.0 / (c * features.shape[0]), features.dtype)
    return Probe(*_fit(examples, l2, tuple(start), max_steps=max_steps, tolerance=tolerance))


def search_probe(shots: Shots, validation: Shots, num_classes: int, *, steps: int = 8) -> tuple[Probe, float]:
    """Chooses ``c`` on validation examples as CoOp does: a coarse grid, then a binary search around its best.

    Each step of the search halves, in the logarithm, an interval that begins at a tenth of the grid's best and ends at
    ten times it, keeping the end that is better, the lower one of equals.

    Args:
      shots: Labelled features to fit to.
      validation: Labelled features to choose on.
      num_classes: Number of classes.
      steps: Steps of the binary search.

    Returns:
      The classifier and its ``c``.

    Raises:
      ValueError: See :func:`linear_probe`.
    """
    check_labels(validation.features, validation.labels, num_classes)
    fitted: dict[float, tuple[float, Probe]] = {}

    def accuracy(c: float) -> float:
        if c not in fitted:
            probe = linear_probe(shots, num_classes, c)
            right = np.argmax(np.asarray(probe.logits(validation.features)), axis=1) == np.asarray(validation.labels)
            fitted[c] = float(np.mean(right)), probe
        return fitted[c][0]

    peak = max(C_GRID, key=accuracy)
    chosen = _binary_search(accuracy, peak, steps) if steps else peak
    return fitted[chosen][1], chosen


def _binary_search(accuracy: Callable[[float], float], peak: float, steps: int) -> float:
    left, right = np.log10(peak) - 1.0, np.log10(peak) + 1.0
    chosen = peak
    for _ in range(steps):
        ends = float(10.0**left), float(10.0**right)
        rises = accuracy(ends[0]) < accuracy(ends[1])
        chosen = ends[rises]
        middle = 0.5 * (left + right)
        left, right = (middle, right) if rises else (left, middle)
    return chosen


_fit = jax.jit(fit_linear, static_argnames=("loss", "max_steps", "tolerance"))
