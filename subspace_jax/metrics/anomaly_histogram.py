"""Metrics of pixels from counts, for test sets whose maps don't fit in memory."""

from typing import NamedTuple

import numpy as np

from subspace_jax.metrics.anomaly import THRESHOLDS, connected_regions, limited_area

_DROPPED_BITS = 11
_BINS = 1 << (31 - _DROPPED_BITS)


class PixelHistogram(NamedTuple):
    """Counts of scores in bins whose edges are 2^-12 apart, relative to the score, over all of float32 from 0.

    The bins are the same for all scores, so that histograms of parts of a set are added.

    Attributes:
      normal: Pixels outside the masks in each bin, int64.
      anomalous: Pixels inside.
      overlap: Sum over the regions of the share of a region in each bin, float64.
      regions: Number of regions.
    """

    normal: np.ndarray
    anomalous: np.ndarray
    overlap: np.ndarray
    regions: int


class PixelScores(NamedTuple):
    """What :func:`pixel_scores` finds: AUROC, average precision, best F1 and its threshold, AU-PRO."""

    auroc: float
    average_precision: float
    best_f1: float
    best_f1_threshold: float
    aupro: float


def init_pixel_histogram() -> PixelHistogram:
    """Returns the counts of no maps."""
    return PixelHistogram(np.zeros(_BINS, np.int64), np.zeros(_BINS, np.int64), np.zeros(_BINS), 0)


def update_pixel_histogram(
    histogram: PixelHistogram, scores: np.ndarray, mask: np.ndarray, *, connectivity: int = 8
) -> PixelHistogram:
    """Counts the pixels of a map.

    Args:
      histogram: Counts so far; changed in place.
      scores: ``[height, width]``, at least 0, finite.
      mask: ``[height, width]``, above 0 is anomalous.
      connectivity: See :func:`subspace_jax.metrics.aupro`.

    Returns:
      The counts.

    Raises:
      ValueError: Shapes do not match, or a score is negative or not finite.
    """
    scores, mask = np.asarray(scores, np.float32), np.asarray(mask) > 0
    if scores.shape != mask.shape or scores.ndim != 2:
        raise ValueError(f"scores, mask: expected the same [height, width], got {scores.shape} and {mask.shape}")
    if not np.all(np.isfinite(scores)) or np.any(scores < 0):
        raise ValueError("scores: expected finite numbers of at least 0")
    # The bits of float32 numbers from 0 are ordered as the numbers are; -0 would have another sign.
    bins = np.abs(scores).view(np.uint32) >> _DROPPED_BITS
    np.add.at(histogram.normal, bins[~mask], 1)
    np.add.at(histogram.anomalous, bins[mask], 1)
    labels, count = connected_regions(mask, connectivity)
    areas = np.bincount(labels.ravel(), minlength=count + 1)
    np.add.at(histogram.overlap, bins[mask], 1 / areas[labels[mask]])
    return histogram._replace(regions=histogram.regions + count)


def merge_pixel_histograms(a: PixelHistogram, b: PixelHistogram) -> PixelHistogram:
    """Counts of two sets of maps together."""
    return PixelHistogram(*(x + y for x, y in zip(a, b, strict=True)))


def pixel_scores(histogram: PixelHistogram, *, limit: float = 0.3, thresholds: int = THRESHOLDS) -> PixelScores:
    """Metrics of all counted pixels; scores of one bin are ties.

    Args:
      histogram: The counts.
      limit: See :func:`subspace_jax.metrics.aupro`.
      thresholds: Likewise.

    Returns:
      The metrics; NaN where one of the classes is empty.

    Raises:
      ValueError: The limit is out of range.
    """
    if not 0 < limit <= 1:
        raise ValueError(f"limit: expected a rate in (0, 1], got {limit}")
    used = np.flatnonzero((histogram.normal > 0) | (histogram.anomalous > 0))
    normal, anomalous = (np.asarray(x[used], np.float64) for x in (histogram.normal, histogram.anomalous))
    negatives, positives = normal.sum(), anomalous.sum()
    if not negatives or not positives:
        return PixelScores(*[float("nan")] * 5)
    area = np.sum(anomalous * (np.cumsum(normal) - normal / 2)) / (negatives * positives)
    # From the highest bin down.
    true, false = np.cumsum(anomalous[::-1]), np.cumsum(normal[::-1])
    precision, recall = true / (true + false), true / positives
    ap = np.sum(np.diff(np.r_[0, recall]) * precision)
    f1 = 2 * precision * recall / np.maximum(precision + recall, np.finfo(float).tiny)
    best = len(f1) - 1 - int(np.argmax(f1[::-1]))
    edges = (used.astype(np.uint32) << _DROPPED_BITS).view(np.float32)
    rates = limit * np.arange(1, thresholds + 1) / thresholds
    rank = np.floor((1 - rates) * (negatives - 1))
    at = np.searchsorted(np.cumsum(normal), rank, side="right")
    above = np.cumsum(histogram.overlap[used][::-1])[::-1] / histogram.regions
    pro = limited_area(np.cumsum(normal[::-1])[::-1][at] / negatives, above[at], limit)
    return PixelScores(float(area), float(ap), float(f1[best]), float(edges[::-1][best]), pro)
