"""Linear probes of all concepts, and their accuracy on combinations of values that they were not fitted to."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from subspace_jax import losses
from subspace_jax.interpret.compositional_linear.checks import check_examples, check_labels, check_varies
from subspace_jax.linalg import times, working_dtype

# How often the accuracy on the validation examples is looked at.
_LOOKS = 10


class ConceptProbes(NamedTuple):
    """A linear softmax classifier of each concept.

    Attributes:
      weights: For each concept ``[values, d]``.
      biases: For each concept ``[values]``.
    """

    weights: tuple[jax.Array, ...]
    biases: tuple[jax.Array, ...]

    def logits(self, x: jax.Array) -> tuple[jax.Array, ...]:
        """Logits of each concept, ``[examples, values]``, for ``x [examples, d]``."""
        pairs = zip(self.weights, self.biases, strict=True)
        return tuple(times(x.astype(w.dtype), w.T) + b[None] for w, b in pairs)

    def predict(self, x: jax.Array) -> jax.Array:
        """The most likely value of each concept, ``[examples, concepts]`` int32."""
        return jnp.stack([jnp.argmax(logits, axis=1).astype(jnp.int32) for logits in self.logits(x)], axis=1)


@dataclass(frozen=True)
class ProbeSettings:
    """How probes are trained; the defaults are those of the experiments of arXiv 2602.24264.

    Attributes:
      epochs: Passes over the examples.
      batch: Examples of a step.
      learning_rate: Of Adam; falls to 0 along half a cosine, epoch by epoch.
      validation: Share of the examples that are held out to choose the weights of each probe among ten stages of the
        training; 0 takes those at its end.

    Raises:
      ValueError: A setting is out of range.
    """

    epochs: int = 500
    batch: int = 256
    learning_rate: float = 1e-2
    validation: float = 0.0

    def __post_init__(self):
        for name in ("epochs", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate: expected a number above 0, got {self.learning_rate}")
        if not 0 <= self.validation < 1:
            raise ValueError(f"validation: expected a share from 0 and below 1, got {self.validation}")


class Split(NamedTuple):
    """Examples to fit to and to test on, of different combinations.

    Attributes:
      train: ``[examples]`` bool.
      test: ``[examples]`` bool.
    """

    train: np.ndarray
    test: np.ndarray


class CompositionalAccuracy(NamedTuple):
    """Accuracy of probes on combinations that they were not fitted to.

    Attributes:
      mean: Mean over the concepts.
      concepts: Accuracy for each concept, ``[concepts]`` float32.
      train_examples: Examples that the probes were fitted to.
      test_examples: Examples that they were tested on.
    """

    mean: float
    concepts: np.ndarray
    train_examples: int
    test_examples: int


def fit_concept_probes(
    key: jax.Array,
    x: jax.Array,
    labels: jax.Array,
    n_values: tuple[int, ...],
    settings: ProbeSettings = ProbeSettings(),
    progress: Callable[[int, int], None] | None = None,
) -> ConceptProbes:
    """Trains a linear probe with a bias for each concept by Adam, on the sum of their cross-entropies.

    Design choices: training starts at 0 on embeddings that are centred and divided by their overall standard deviation,
    so that the learning rate fits any scale; this is folded into weights and biases, which are for ``x`` as it is.  The
    weights of a concept have a mean of 0 over its values, which changes no prediction.

    Args:
      key: Random key of the batches and of the validation examples.
      x: ``[examples, d]``, floating point.
      labels: ``[examples, concepts]`` integers.
      n_values: Number of values of each concept.
      settings: How to train.
      progress: Called with the finished and with all stages of the training, ten at most.

    Returns:
      The probes, float32, or float64 for float64 embeddings.

    Raises:
      ValueError: As :func:`concept_factors`; the embeddings are all the same; or no example is left to train on.
      TypeError: As :func:`concept_factors`.
    """
    check_examples(x, labels, n_values)
    check_varies(x)
    held = round(settings.validation * len(x))
    if held >= len(x):
        raise ValueError(f"validation: expected examples to train on, got {held} of {len(x)} held out")
    x, mean, scale, training = _start(x, tuple(n_values))
    for number in range(_stages(settings)):
        training = _stage(training, key, number, x, labels, settings, held)
        if progress is not None:
            progress(number + 1, _stages(settings))
    return _folded(training.best, mean, scale)


def split_combinations(
    key: jax.Array, labels: np.ndarray, fraction: float = 0.1, test_fraction: float | None = None
) -> Split:
    """Divides examples by their combination of values: some combinations to fit to, others to test on.

    Args:
      key: Random key.
      labels: ``[examples, concepts]`` integers.
      fraction: Share of the combinations to fit to.
      test_fraction: Share of the combinations to test on; all others by default.  The paper takes as many as to fit to.

    Returns:
      The division; each combination is on one side, or on neither.

    Raises:
      ValueError: There are no combinations on one side.
      TypeError: ``labels`` are not integers.
    """
    labels = np.asarray(labels)
    check_labels(labels, tuple(np.max(labels, axis=0, initial=0) + 1) if labels.ndim == 2 else ())
    combinations, own = np.unique(labels, axis=0, return_inverse=True)
    total = len(combinations)
    train = round(fraction * total)
    test = total - train if test_fraction is None else round(test_fraction * total)
    if train < 1 or test < 1 or train + test > total:
        raise ValueError(
            f"fraction, test_fraction: expected one combination or more of {total} to fit to and to test on, got "
            f"{train} and {test}"
        )
    order = np.asarray(jax.random.permutation(key, total))
    sides = np.zeros(total, np.int32)
    sides[order[:train]], sides[order[train : train + test]] = 1, 2
    own = sides[own.reshape(-1)]
    return Split(own == 1, own == 2)


def compositional_accuracy(
    key: jax.Array,
    x: jax.Array,
    labels: np.ndarray,
    n_values: tuple[int, ...],
    fraction: float = 0.1,
    settings: ProbeSettings = ProbeSettings(),
    test_fraction: float | None = None,
) -> CompositionalAccuracy:
    """Fits probes to some combinations of values, and tests them on others (arXiv 2602.24264).

    Args:
      key: Random key of the combinations and of the training.
      x: Other arguments: see :func:`fit_concept_probes` and :func:`split_combinations`.
      labels: See there.
      n_values: See there.
      fraction: See there.
      settings: See there.
      test_fraction: See there.

    Returns:
      The accuracy.  A value that no combination to fit to has is predicted wrongly.

    Raises:
      ValueError: As those functions.
      TypeError: As those functions.
    """
    check_examples(x, labels, n_values)
    of_split, of_fit = jax.random.split(key)
    labels = np.asarray(labels)
    train, test = split_combinations(of_split, labels, fraction, test_fraction)
    probes = fit_concept_probes(of_fit, x[train], jnp.asarray(labels[train]), n_values, settings)
    right = np.mean(np.asarray(probes.predict(x[test])) == labels[test], axis=0, dtype=np.float64)
    return CompositionalAccuracy(float(np.mean(right)), right.astype(np.float32), int(train.sum()), int(test.sum()))


class _Training(NamedTuple):
    """Where a training stands: the probes now, their optimizer, and the best of each concept so far."""

    probes: ConceptProbes
    state: optax.OptState
    best: ConceptProbes
    best_accuracy: jax.Array


# Adam without its learning rate, which falls from epoch to epoch.
_ADAM = optax.scale_by_adam()


@functools.partial(jax.jit, static_argnums=1)
def _start(x, n_values):
    x = x.astype(working_dtype(x))
    mean = jnp.mean(x, axis=0, keepdims=True)
    scale = jnp.sqrt(jnp.mean(jnp.square(x - mean)))
    probes = ConceptProbes(
        tuple(jnp.zeros((n, x.shape[1]), x.dtype) for n in n_values), tuple(jnp.zeros(n, x.dtype) for n in n_values)
    )
    nothing = jnp.full(len(n_values), -1, x.dtype)
    return (x - mean) / scale, mean[0], scale, _Training(probes, _ADAM.init(probes), probes, nothing)


@functools.partial(jax.jit, static_argnums=(5, 6))
def _stage(training, key, number, x, labels, settings, held):
    """Trains for a part of the epochs, and keeps each concept's probe where it is the best so far."""
    of_split, of_batches = jax.random.split(key)
    order = jax.random.permutation(of_split, len(x)) if held else jnp.arange(len(x))
    validation, train = order[:held], order[held:]
    batch = min(settings.batch, len(train))
    per_stage = -(-settings.epochs // _stages(settings))

    def loss(probes, rows):
        logits = probes.logits(x[rows])
        return sum(jnp.mean(losses.cross_entropy(z, labels[rows, i])) for i, z in enumerate(logits))

    def epoch(carry, number):
        rows = jax.random.permutation(jax.random.fold_in(of_batches, number), train)
        rows = jnp.resize(rows, (-(-len(train) // batch), batch))  # the last batch is filled up from the first
        share = jnp.minimum(number.astype(x.dtype) / settings.epochs, 1)
        rate = 0.5 * settings.learning_rate * (1 + jnp.cos(jnp.pi * share))

        def step(carry, own):
            probes, state = carry
            updates, state = _ADAM.update(jax.grad(loss)(probes, own), state)
            return (jax.tree.map(lambda p, u: p - rate * u, probes, updates), state), None

        return jax.lax.scan(step, carry, rows)[0], None

    numbers = number * per_stage + jnp.arange(per_stage)
    (probes, state), _ = jax.lax.scan(epoch, (training.probes, training.state), numbers)
    if not held:
        return _Training(probes, state, probes, training.best_accuracy)
    right = probes.predict(x[validation]) == labels[validation]
    accuracy = jnp.mean(right.astype(x.dtype), axis=0)
    best = _chosen(accuracy > training.best_accuracy, probes, training.best)
    return _Training(probes, state, best, jnp.maximum(accuracy, training.best_accuracy))


def _stages(settings: ProbeSettings) -> int:
    return min(_LOOKS, settings.epochs)


def _chosen(better: jax.Array, one: ConceptProbes, two: ConceptProbes) -> ConceptProbes:
    """Takes each concept's probe from ``one`` where it is better, else from ``two``."""
    pairs = [
        tuple(jnp.where(better[i], a, b) for i, (a, b) in enumerate(zip(*fields, strict=True)))
        for fields in zip(one, two, strict=True)
    ]
    return ConceptProbes(*pairs)


@jax.jit
def _folded(probes: ConceptProbes, mean: jax.Array, scale: jax.Array) -> ConceptProbes:
    """Probes of embeddings as they are, from those of ``(x - mean) / scale``."""
    weights = tuple((w - jnp.mean(w, axis=0, keepdims=True)) / scale for w in probes.weights)
    biases = tuple(b - jnp.mean(b) for b in probes.biases)
    moved = (b - times(w, mean[:, None])[:, 0] for w, b in zip(weights, biases, strict=True))
    return ConceptProbes(weights, tuple(moved))
