"""A table of few-shot methods over numbers of shots and random draws, and what limits them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax import metrics, train
from subspace_jax.represent.features_file import Features
from subspace_jax.represent.few_shot_survey.bounds import vc_width
from subspace_jax.represent.few_shot_survey.clip_adapter import Shots
from subspace_jax.represent.few_shot_survey.methods import METHODS, Draw
from subspace_jax.represent.few_shot_survey.prototypes import check_lengths, class_prototypes
from subspace_jax.represent.few_shot_survey.sampling import sample_shots
from subspace_jax.represent.few_shot_survey.subspaces import cca_subspace, text_subspace

VALIDATION_SHOTS = 4
DELTA = 0.05
_GAP_EXAMPLES = 2000


class FewShotRow(NamedTuple):
    """Accuracy of a method at a number of shots.

    Attributes:
      method: Its name.
      shots: Training examples of each class.
      accuracies: Accuracy on the query set after each draw, in [0, 1].
      mean: Their mean.
      deviation: Their standard deviation; 0 for a single draw.
      capacity: ``v`` of :func:`vc_width`; 0 where nothing is fitted.
      width: The sample-size term of the bound at confidence 0.95; 0 where nothing is fitted.
    """

    method: str
    shots: int
    accuracies: tuple[float, ...]
    mean: float
    deviation: float
    capacity: int
    width: float


class DomainGap(NamedTuple):
    """Distances between two sets of features, each scaled to unit length.

    Attributes:
      proxy_a: Proxy A-distance, in [0, 2]; 0 where a linear classifier can't tell the sets apart.
      mmd2: Unbiased squared maximum mean discrepancy, with the median distance as width of the kernel.
      coral: CORAL distance.
      frechet: Squared Frechet distance.
      mean: Distance of the means.
    """

    proxy_a: float
    mmd2: float
    coral: float
    frechet: float
    mean: float


@dataclass(frozen=True)
class Comparison:
    """How methods are compared.

    Attributes:
      shots: Numbers of training examples of each class.
      seeds: Number of draws.
      methods: Names of :data:`METHODS`.
      scale: Factor on cosines, ``exp(logit_scale)`` of the dual encoder.
      subspace: "" for all features, "text:K" or "cca:K" for K dimensions of :func:`text_subspace` or
        :func:`cca_subspace`.
      cache: Weight and sharpness of Tip-Adapter's cache, ``alpha`` and ``beta``; None to search them on the validation
        examples.
    """

    shots: tuple[int, ...] = (1, 2, 4, 8, 16)
    seeds: int = 3
    methods: tuple[str, ...] = tuple(METHODS)
    scale: float = 100.0
    subspace: str = ""
    cache: tuple[float, float] | None = None


def compare_few_shot(
    support: Features,
    query: Features,
    text: Features | None = None,
    how: Comparison = Comparison(),
    *,
    progress: Callable[[FewShotRow], None] = lambda row: None,
) -> list[FewShotRow]:
    """Measures few-shot methods on the same draws.

    A draw takes from each class of the support set the training shots, and up to four further examples on which
    methods choose their settings, where one does; nothing is ever chosen on the query set.  Draws of a seed are nested:
    the shots of a smaller number are the first of those of a larger one, and the validation examples are the same.

    Args:
      support: Labelled features to draw from; of each class at least ``max(shots) + min(4, max(shots))``, or
        ``max(shots)`` where no method chooses settings.
      query: Labelled features to classify.
      text: Embeddings of texts about the classes, one or more of each, which give the prototypes.  Where None, the
        prototypes are the mean directions of the classes' training shots, and "zero-shot" is the nearest class mean.
      how: What is compared.
      progress: Called with each row.

    Returns:
      A row for each method and number of shots, methods in the order given.

    Raises:
      ValueError: Sets differ in width or classes, a class has too few examples, a feature is zero, those of the
        support are all alike, or a setting can't serve.
    """
    num_classes = len(support.class_names)
    _check(support, query, text, how)
    drawn, aside = _examples_of_class(support, text, how)
    keys = [jax.random.key(seed) for seed in range(how.seeds)]
    draws = [sample_shots(key, support.labels, drawn, num_classes) for key in keys]
    prototypes = None if text is None else class_prototypes(text.features, text.labels, num_classes)
    rows = []
    for name in how.methods:
        method = METHODS[name]
        for shots in how.shots:
            accuracies = []
            for key, indices in zip(keys, draws, strict=True):
                draw = _draw(support, indices, (shots, min(aside, shots)), prototypes, key)
                draw = draw._replace(scale=how.scale, cache=how.cache)
                draw, queries = _projected(draw, jnp.asarray(query.features), how.subspace)
                predicted = np.argmax(np.asarray(method.fit(draw)(queries)), axis=1)
                accuracies.append(float(np.mean(predicted == query.labels)))
            capacity = method.capacity(shots * num_classes, num_classes, queries.shape[1])
            width = float(vc_width(shots * num_classes, capacity, DELTA)) if capacity else 0.0
            spread = float(np.std(accuracies, ddof=1)) if how.seeds > 1 else 0.0
            rows.append(FewShotRow(name, shots, tuple(accuracies), float(np.mean(accuracies)), spread, capacity, width))
            progress(rows[-1])
    return rows


def domain_gap(source: np.ndarray, target: np.ndarray, seed: int = 0) -> DomainGap:
    """Measures how far two sets of features are apart; of each at most 2000 random examples are used.

    Half of them fit the domain classifier of the proxy A-distance, and the other half measures its error.

    Args:
      source: ``[examples, n]``.
      target: ``[others, n]``.
      seed: Seed of the choice of examples.

    Returns:
      The distances.

    Raises:
      ValueError: The widths differ, a set has fewer than four examples, or a feature is zero.
    """
    if source.ndim != 2 or target.ndim != 2 or source.shape[1] != target.shape[1] or min(len(source), len(target)) < 4:
        raise ValueError(
            "source, target: expected [examples, n] and [others, n], four or more of each, "
            f"got {source.shape} and {target.shape}"
        )
    rng = np.random.default_rng(seed)
    count = min(len(source), len(target), _GAP_EXAMPLES) // 2 * 2
    sets = []
    for name, features in (("source", source), ("target", target)):
        check_lengths(name, features)
        chosen = features[rng.permutation(len(features))[:count]].astype(np.float32)
        sets.append(chosen / np.linalg.norm(chosen, axis=1, keepdims=True))
    fit, held_out = (np.concatenate([part[half::2] for part in sets]) for half in (0, 1))
    domains = np.repeat([0, 1], count // 2)
    error = float(np.mean((_domain_scores(fit, 2.0 * domains - 1.0, held_out) > 0) != domains))
    # The median over pairs of one example of each set.
    sigma = float(np.median(np.linalg.norm(sets[0] - sets[1], axis=1)))
    proxy = metrics.proxy_a_distance(error)
    return DomainGap(*map(float, (proxy, *_distances(*sets, sigma))))


def plot_few_shot(rows: Sequence[FewShotRow], output: str | Path) -> None:
    """Draws accuracy over shots, a line for each method with the deviation over draws.

    Args:
      rows: Of :func:`compare_few_shot`.
      output: The PNG to write.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axis = figure.subplots()
    for name in dict.fromkeys(row.method for row in rows):
        own = sorted((row for row in rows if row.method == name), key=lambda row: row.shots)
        means, spread = [row.mean for row in own], [row.deviation for row in own]
        axis.errorbar([row.shots for row in own], means, yerr=spread, marker="o", capsize=3, label=name)
    shots = sorted({row.shots for row in rows})
    axis.set_xscale("log", base=2)
    axis.set_xticks(shots, map(str, shots))
    axis.minorticks_off()
    axis.set(xlabel="training examples of each class", ylabel="accuracy on the query set")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    with train.replacing(output) as partial:
        figure.savefig(partial, dpi=120)


def _domain_scores(fit: np.ndarray, signs: np.ndarray, held_out: np.ndarray) -> np.ndarray:
    """Scores of a linear classifier by least squares, with a ridge of a thousandth of the examples' mean square."""
    center = fit.mean(axis=0)
    x = (fit - center).astype(np.float64)
    gram = x.T @ x
    gram[np.diag_indices_from(gram)] += 1e-3 * np.trace(gram) / len(gram)
    return (held_out - center) @ np.linalg.solve(gram, x.T @ signs)


@jax.jit
def _distances(x: jax.Array, y: jax.Array, sigma: jax.Array) -> tuple[jax.Array, ...]:
    return metrics.mmd2(x, y, sigma), metrics.coral(x, y), metrics.frechet_distance(x, y), metrics.mean_gap(x, y)


def _examples_of_class(support: Features, text: Features | None, how: Comparison) -> tuple[int, int]:
    """Returns how many examples of each class a draw takes, and how many of these validate."""
    counts = np.bincount(support.labels, minlength=len(support.class_names))
    least = int(np.argmin(counts))
    most = max(how.shots)
    if text is not None and not how.subspace.startswith("cca") and set(how.methods) == {"zero-shot"}:
        return max(1, min(most, int(counts[least]))), 0  # the shots have no say
    aside = min(VALIDATION_SHOTS, most) if any(METHODS[name].validates for name in how.methods) else 0
    if counts[least] < most + aside:
        more = f" and {aside} others to validate on" if aside else ""
        raise ValueError(
            f"shots: {most} of each class{more} take {most + aside} examples, but class "
            f"{support.class_names[least]!r} has {counts[least]} in the support"
        )
    return most + aside, aside


def _draw(support: Features, indices: np.ndarray, sizes: tuple[int, int], prototypes: Any, key: jax.Array) -> Draw:
    shots, aside = sizes
    parts = []
    for chosen in (indices[:, :shots], indices[:, indices.shape[1] - aside :]):
        rows = chosen.ravel()
        parts.append(Shots(jnp.asarray(support.features[rows]), support.labels[rows]))
    if prototypes is None:
        prototypes = class_prototypes(*parts[0], len(support.class_names))
    return Draw(*parts, prototypes, key)


def _projected(draw: Draw, queries: jax.Array, subspace: str) -> tuple[Draw, jax.Array]:
    if not subspace:
        return draw, queries
    kind, k = _subspace(subspace)
    maps = text_subspace(draw.text, k) if kind == "text" else cca_subspace(draw.train, draw.text, k)
    train_set, validation = (
        part._replace(features=maps.of_images(part.features)) for part in (draw.train, draw.validation)
    )
    draw = draw._replace(train=train_set, validation=validation, text=maps.of_texts(draw.text))
    return draw, maps.of_images(queries)


def _subspace(text: str) -> tuple[str, int]:
    kind, _, k = text.partition(":")
    if kind not in ("text", "cca") or not k.isdecimal():
        raise ValueError(f"subspace: expected text:K or cca:K with a number K of dimensions, got {text!r}")
    return kind, int(k)


def _check(support: Features, query: Features, text: Features | None, how: Comparison) -> None:
    for name, other in (("query", query), ("text", text)):
        if other is None:
            continue
        widths = support.features.shape[1], other.features.shape[1]
        if widths[0] != widths[1]:
            raise ValueError(f"{name}: expected features of width {widths[0]}, that of the support, got {widths[1]}")
        if support.class_names != other.class_names:
            first = next(
                (pair for pair in zip(support.class_names, other.class_names, strict=False) if len(set(pair)) > 1),
                (f"{len(support.class_names)} classes", f"{len(other.class_names)} classes"),
            )
            unnamed = other.class_names == tuple(map(str, range(len(other.class_names))))
            hint = "; a file without class_names has numbers for names" if unnamed else ""
            raise ValueError(
                f"{name}: expected the support's classes in its order, {first[0]!r}; got {first[1]!r}{hint}"
            )
        check_lengths(f"{name} features", other.features)
    check_lengths("support features", support.features)
    if np.all(support.features == support.features[:1]):
        raise ValueError(f"support features: expected vectors that differ, got {len(support.features)} times the first")
    if not how.shots or min(how.shots) < 1:
        raise ValueError(f"shots: expected numbers of at least 1, got {how.shots}")
    if how.seeds < 1:
        raise ValueError(f"seeds: expected at least 1, got {how.seeds}")
    if not how.scale > 0:
        raise ValueError(f"scale: expected a positive number, got {how.scale}")
    if how.cache is not None and not (len(how.cache) == 2 and how.cache[1] >= 0):
        raise ValueError(f"cache: expected alpha and beta, beta at least 0, got {how.cache}")
    if unknown := [name for name in how.methods if name not in METHODS]:
        raise ValueError(f"methods: expected some of {', '.join(METHODS)}, got {unknown[0]!r}")
    if how.subspace:
        _subspace(how.subspace)
