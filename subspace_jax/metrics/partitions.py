"""Scores of a clustering against true labels, from their table of counts: NumPy in float64, on the host."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import linear_sum_assignment
from scipy.special import gammaln


class PairFScore(NamedTuple):
    """Agreement about the pairs of examples that are in one cluster.

    Attributes:
      precision: Share of the pairs in one predicted cluster that are in one true class.
      recall: Share of the pairs in one true class that are in one predicted cluster.
      f: Their harmonic mean, the "F-score" of much of the literature on subspace clustering.
    """

    precision: float
    recall: float
    f: float


class ClusterScores(NamedTuple):
    """Scores of a clustering.

    Attributes:
      accuracy: See :func:`clustering_accuracy`.
      nmi: Mutual information over the arithmetic mean of the entropies.
      ari: See :func:`adjusted_rand_index`.
      pair_f: ``f`` of :func:`pair_f_score`.
      macro_f1: See :func:`matched_macro_f1`.
      purity: See :func:`purity`.
      ami: See :func:`adjusted_mutual_info`.
    """

    accuracy: float
    nmi: float
    ari: float
    pair_f: float
    macro_f1: float
    purity: float
    ami: float


def contingency(y: ArrayLike, p: ArrayLike) -> np.ndarray:
    """Counts of examples by true label and predicted cluster.

    Args:
      y: ``[examples]`` integers, any.
      p: The same.

    Returns:
      ``[true labels, clusters]`` int64, both in ascending order.

    Raises:
      ValueError: The lengths differ, there is no example, or these are no vectors.
      TypeError: They are not integers.
    """
    y, p = np.asarray(y), np.asarray(p)
    if y.ndim != 1 or y.shape != p.shape or not y.size:
        raise ValueError(f"y, p: expected labels [examples] of one length, got {list(y.shape)} and {list(p.shape)}")
    if not all(np.issubdtype(x.dtype, np.integer) for x in (y, p)):
        raise TypeError(f"y, p: expected integers, got {y.dtype} and {p.dtype}")
    (labels, rows), (clusters, columns) = (np.unique(x, return_inverse=True) for x in (y, p))
    counts = np.bincount(rows * len(clusters) + columns, minlength=len(labels) * len(clusters))
    return counts.reshape(len(labels), len(clusters))


def clustering_accuracy(y: ArrayLike, p: ArrayLike) -> float:
    """Share of examples that agree under the best one-to-one matching of clusters and labels (Hungarian algorithm).

    Clusters without a label score 0.  Arguments: see :func:`contingency`.
    """
    table = contingency(y, p)
    return float(table[linear_sum_assignment(table, maximize=True)].sum() / table.sum())


def best_label_map(y: ArrayLike, p: ArrayLike) -> dict[int, int]:
    """The matching of :func:`clustering_accuracy`: from clusters to labels, without clusters that have none."""
    table = contingency(y, p)
    rows, columns = linear_sum_assignment(table, maximize=True)
    labels, clusters = np.unique(y), np.unique(p)
    return {int(clusters[column]): int(labels[row]) for row, column in zip(rows, columns, strict=True)}


def adjusted_rand_index(y: ArrayLike, p: ArrayLike) -> float:
    """Agreement about pairs, 0 for random partitions on average and 1 for equal ones (Hubert and Arabie 1985).

    Arguments: see :func:`contingency`.
    """
    both, of_labels, of_clusters, pairs = _pairs(contingency(y, p))
    expected = of_labels * of_clusters / pairs if pairs else 0.0
    largest = (of_labels + of_clusters) / 2
    return 1.0 if largest == expected else (both - expected) / (largest - expected)


def pair_f_score(y: ArrayLike, p: ArrayLike) -> PairFScore:
    """Precision and recall of the pairs of examples in one cluster.

    Arguments: see :func:`contingency`.
    """
    both, of_labels, of_clusters, _ = _pairs(contingency(y, p))
    precision = both / of_clusters if of_clusters else 1.0
    recall = both / of_labels if of_labels else 1.0
    whole = precision + recall
    return PairFScore(precision, recall, 2 * precision * recall / whole if whole else 0.0)


def matched_macro_f1(y: ArrayLike, p: ArrayLike) -> float:
    """F1 of each true label under the matching of :func:`clustering_accuracy`, averaged over labels.

    The "F1" of most papers on attributed graphs.  A label without a cluster has F1 0.  Of several
    best matchings SciPy's for ascending names counts.  Arguments: see :func:`contingency`.
    """
    table = contingency(y, p)
    rows, columns = linear_sum_assignment(table, maximize=True)
    scores = 2 * table[rows, columns] / (table[rows].sum(1) + table[:, columns].sum(0))
    return float(scores.sum() / len(table))


def purity(y: ArrayLike, p: ArrayLike) -> float:
    """Share of examples that have the most frequent label of their cluster; grows with the number of clusters.

    Arguments: see :func:`contingency`.
    """
    table = contingency(y, p)
    return float(table.max(0).sum() / table.sum())


def adjusted_mutual_info(y: ArrayLike, p: ArrayLike) -> float:
    """Mutual information over the mean entropy, both less what random partitions share (Vinh, Epps and Bailey 2010).

    Arguments: see :func:`contingency`.
    """
    table = contingency(y, p)
    shared, of_labels, of_clusters = _information(table)
    if 1 == table.shape[0] == table.shape[1]:
        return 1.0
    expected = _expected_information(table)
    whole = (of_labels + of_clusters) / 2 - expected
    # As scikit-learn: rounding must not turn a small denominator over.
    whole = min(whole, -np.finfo(float).eps) if whole < 0 else max(whole, np.finfo(float).eps)
    return float((shared - expected) / whole)


def cluster_scores(y: ArrayLike, p: ArrayLike) -> ClusterScores:
    """All scores of a clustering.

    Args:
      y: True labels, ``[examples]`` integers.
      p: Predicted clusters, ``[examples]`` integers; which ones does not matter.

    Returns:
      Floats.

    Raises:
      ValueError: See :func:`contingency`.
      TypeError: See :func:`contingency`.
    """
    shared, *entropies = _information(contingency(y, p))
    whole = sum(entropies) / 2
    return ClusterScores(
        accuracy=clustering_accuracy(y, p),
        nmi=float(np.clip(shared / whole, 0, 1)) if whole else 1.0,
        ari=adjusted_rand_index(y, p),
        pair_f=pair_f_score(y, p).f,
        macro_f1=matched_macro_f1(y, p),
        purity=purity(y, p),
        ami=adjusted_mutual_info(y, p),
    )


def _pairs(table: np.ndarray) -> tuple[float, float, float, float]:
    """Pairs in one cell, in one row, in one column, and all pairs; floats, as int32 ends at 65,536 examples."""

    def pairs(counts):
        counts = np.asarray(counts, np.float64)
        return float((counts * (counts - 1)).sum() / 2)

    return pairs(table), pairs(table.sum(1)), pairs(table.sum(0)), pairs(table.sum())


def _information(table: np.ndarray) -> tuple[float, float, float]:
    """Mutual information, and the entropies of rows and columns, in nats."""

    def entropy(counts):
        share = counts[counts > 0] / table.sum()
        return float(-(share * np.log(share)).sum())

    of_rows, of_columns = entropy(table.sum(1)), entropy(table.sum(0))
    return of_rows + of_columns - entropy(table), of_rows, of_columns


def _expected_information(table: np.ndarray) -> float:
    """Mutual information of random partitions of the same sizes, by the hypergeometric distribution of a cell."""
    rows, columns, n = table.sum(1), table.sum(0), table.sum()
    total = 0.0
    for a in rows:
        for b in columns:
            cell = np.arange(max(1, a + b - n), min(a, b) + 1)
            log_chance = (
                gammaln(a + 1) + gammaln(b + 1) + gammaln(n - a + 1) + gammaln(n - b + 1) - gammaln(n + 1)
                - gammaln(cell + 1) - gammaln(a - cell + 1) - gammaln(b - cell + 1) - gammaln(n - a - b + cell + 1)
            )  # fmt: skip
            total += float((cell / n * np.log(n * cell / (a * b)) * np.exp(log_chance)).sum())
    return total
