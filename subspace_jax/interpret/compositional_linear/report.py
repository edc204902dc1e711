"""Everything about one set of embeddings, and tables and pictures of several."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from subspace_jax import train
from subspace_jax.interpret.compositional_linear.core import Factors
from subspace_jax.interpret.compositional_linear.label_table import LabelTable
from subspace_jax.interpret.compositional_linear.probes import (
    ProbeSettings,
    compositional_accuracy,
    fit_concept_probes,
    split_combinations,
)
from subspace_jax.interpret.compositional_linear.stream import array_blocks, decompose, decomposition_r2
from subspace_jax.interpret.compositional_linear.structure import (
    effective_rank,
    factor_cosines,
    probe_span,
    span_r2,
)


@dataclass(frozen=True)
class ReportSettings:
    """What is measured.

    Attributes:
      fraction: Share of the combinations that probes are fitted to; they are tested on the others.
      splits: Random divisions of the combinations.
      probes: How probes are trained.
      method: Factors, see :func:`concept_factors`.

    Raises:
      ValueError: There is no division.
    """

    fraction: float = 0.1
    splits: int = 3
    probes: ProbeSettings = field(default_factory=ProbeSettings)
    method: str = "means"

    def __post_init__(self):
        if self.splits < 1:
            raise ValueError(f"splits: expected at least 1, got {self.splits}")


class Geometry(NamedTuple):
    """How compositional a set of embeddings is.

    Attributes:
      name: Name of the set.
      examples: Number of examples.
      width: Width of the embeddings.
      r2: ``raw``, ``whitened``, ``projected`` (whitened, in the span of the probes), ``span`` (mean of
        :func:`span_r2`), and ``chance``: about what labels at random would give for the raw and whitened scores.
      probe_rank: Dimension of the span of the probes.
      ranks: :func:`effective_rank` of each concept.
      factor_cosines: ``matrix``, ``within`` and ``across`` of :func:`factor_cosines`.
      difference_cosines: The same of differences.
      accuracy: ``mean`` over concepts and divisions, ``deviation`` over divisions, ``chance``.
      concept_accuracy: Mean over the divisions for each concept.
    """

    name: str
    examples: int
    width: int
    r2: dict[str, float]
    probe_rank: int
    ranks: list[int]
    factor_cosines: dict
    difference_cosines: dict
    accuracy: dict[str, float]
    concept_accuracy: list[float]


def measure_geometry(
    key: jax.Array,
    x: np.ndarray,
    table: LabelTable,
    name: str = "",
    settings: ReportSettings = ReportSettings(),
    progress: Callable[[str], None] = lambda text: None,
) -> Geometry:
    """Measures scores, angles, ranks and compositional accuracy of embeddings.

    Args:
      key: Random key of probes and divisions.
      x: ``[examples, d]``, floating point, in the memory of the host.
      table: Labels of the examples, of two concepts or more.
      name: Name of the set.
      settings: What is measured.
      progress: Called with a text now and then.

    Returns:
      The measurements.

    Raises:
      ValueError: There are fewer than two concepts, the number of examples differs, all embeddings are the same, one
        is not finite, or there are too few combinations to divide.
    """
    labels, n_values = table.labels, table.n_values
    if len(n_values) < 2:
        raise ValueError(f"labels: expected 2 concepts or more, got {len(n_values)}: {', '.join(table.names)}")
    if len(x) != len(labels):
        raise ValueError(f"{name}: expected embeddings of {len(labels)} examples, one for each label, got {len(x)}")
    keys = jax.random.split(key, settings.splits + 1)
    split_combinations(keys[1], labels, settings.fraction)  # refused before anything is computed
    progress("factors")
    found = decompose(array_blocks(x, labels), n_values, settings.method)
    r2 = {"raw": decomposition_r2(found, whiten=False).r2, "whitened": decomposition_r2(found).r2}
    on_device, known = jnp.asarray(x), jnp.asarray(labels)
    probes = fit_concept_probes(
        keys[0],
        on_device,
        known,
        n_values,
        settings.probes,
        progress=lambda done, of: progress(f"probes of all examples, {done}/{of}"),
    )
    basis = probe_span(probes.weights)
    r2["projected"] = decomposition_r2(found, projector=basis).r2
    r2["span"] = jnp.mean(span_r2(on_device, known, n_values, probes.weights))
    r2["chance"] = min(1.0, sum(n - 1 for n in n_values) / (len(x) - 1))
    accuracies = []
    for i, own in enumerate(keys[1:], start=1):
        progress(f"probes of {settings.fraction:.0%} of the combinations, {i}/{settings.splits}")
        accuracies.append(
            compositional_accuracy(own, on_device, labels, n_values, settings.fraction, settings.probes).concepts
        )
    means = np.mean(accuracies, axis=1)
    return Geometry(
        name,
        *x.shape,
        {which: float(value) for which, value in r2.items()},
        int(basis.shape[1]),
        [int(rank) for rank in effective_rank(found.factors)],
        _cosines(found.factors, "factor"),
        _cosines(found.factors, "difference"),
        {
            "mean": float(np.mean(means)),
            "deviation": float(np.std(means)),
            "chance": float(np.mean([np.bincount(own).max() / len(own) for own in labels.T])),
        },
        [float(value) for value in np.mean(accuracies, axis=0)],
    )


def _cosines(factors: Factors, kind: str) -> dict:
    found = factor_cosines(factors, kind)
    return {
        "matrix": np.asarray(found.matrix, float).tolist(),
        "within": float(found.within),
        "across": float(found.across),
    }


def geometry_table(found: Sequence[Geometry], table: LabelTable) -> str:
    """The measurements as text: a line for each set, then one for each set and concept."""
    size = max(8, *(len(own.name) for own in found))
    head = ("raw R2", "whitened", "projected", "span", "within", "across", "accuracy")
    lines = [f"{'features':<{size}}" + "".join(f"{text:>11}" for text in head)]
    for own in found:
        scores = [own.r2[which] for which in ("raw", "whitened", "projected", "span")]
        scores += [own.factor_cosines["within"], own.factor_cosines["across"], own.accuracy["mean"]]
        lines.append(f"{own.name:<{size}}" + "".join(f"{value:>11.3f}" for value in scores))
    first = found[0]
    lines.append(
        f"Labels at random give about {first.r2['chance']:.3f} of raw and whitened R2; the commonest values an "
        f"accuracy of {first.accuracy['chance']:.3f}."
    )
    width = max(8, *map(len, table.names))
    lines += ["", f"{'features':<{size}}  {'concept':<{width}}{'values':>8}{'rank 95%':>10}{'accuracy':>10}"]
    for own in found:
        rows = zip(table.names, table.n_values, own.ranks, own.concept_accuracy, strict=True)
        lines += [f"{own.name:<{size}}  {name:<{width}}{n:>8}{rank:>10}{right:>10.3f}" for name, n, rank, right in rows]
    return "\n".join(lines)


def plot_geometry(found: Sequence[Geometry], table: LabelTable, path: str | os.PathLike) -> None:
    """Draws a row for each set: cosines between concepts, scores, and ranks; writes a PNG, atomically."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4 * len(found)), layout="constrained")
    for row, own in zip(figure.subplots(len(found), 3, squeeze=False), found, strict=True):
        matrix = np.asarray(own.factor_cosines["matrix"])
        picture = row[0].imshow(matrix, vmin=0, vmax=1, cmap="viridis")
        for (i, j), value in np.ndenumerate(matrix):
            row[0].text(j, i, f"{value:.2f}", ha="center", va="center", color="w" if value < 0.6 else "k", fontsize=8)
        row[0].set(title=f"{own.name}: mean |cos| of factors")
        row[0].set_xticks(range(len(table.names)), table.names, rotation=45, ha="right")
        row[0].set_yticks(range(len(table.names)), table.names)
        figure.colorbar(picture, ax=row[0], shrink=0.8)
        scores = ("raw", "whitened", "projected")
        values = [own.r2[which] for which in scores] + [own.accuracy["mean"]]
        bars = row[1].bar([*scores, "accuracy"], values, color=["C0", "C0", "C0", "C1"])
        row[1].bar_label(bars, fmt="%.2f", fontsize=8)
        row[1].set(title="R2, and accuracy on new combinations", ylim=(min(0, *values), 1.1))
        row[1].tick_params(axis="x", labelsize=8)
        row[2].bar(table.names, table.n_values, color="0.85", label="values")
        bars = row[2].bar(table.names, own.ranks, color="C2", label="directions for 95 %")
        row[2].bar_label(bars, fontsize=8)
        row[2].set(title="Effective rank of factors")
        row[2].tick_params(axis="x", labelrotation=45)
        row[2].legend(fontsize=8)
    with train.replacing(path) as partial:
        figure.savefig(partial, dpi=120, format="png")
