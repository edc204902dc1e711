"""Metrics of anomaly detection: of scores and labels, and of maps and masks; NumPy, in float64."""

import numpy as np

THRESHOLDS = 300


def auroc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Area under the ROC curve; a tie counts half.

    Args:
      scores: Any shape; higher is more anomalous.
      labels: The same shape, bool or integers; not 0 is anomalous.

    Returns:
      The area, NaN where one of the classes is empty.

    Raises:
      ValueError: Shapes do not match, or a score is NaN.
    """
    scores, labels = _flat(scores, labels)
    order = np.argsort(scores, kind="stable")
    ordered, positive = scores[order], labels[order]
    first = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    sizes = np.diff(np.r_[first, len(ordered)])
    above = np.add.reduceat(positive, first).astype(np.float64)
    below = sizes - above
    num_below = below.sum()
    wins = np.sum(above * (np.cumsum(below) - below / 2))
    pairs = above.sum() * num_below
    return float(wins / pairs) if pairs else float("nan")


def average_precision(scores: np.ndarray, labels: np.ndarray) -> float:
    """Average precision: the sum of precisions weighted by the steps of recall, without interpolation.

    Arguments, result and errors: see :func:`auroc`.
    """
    precision, recall, _ = _precision_recall(*_flat(scores, labels))
    return float(np.sum(np.diff(np.r_[0, recall]) * precision)) if np.isfinite(recall).all() else float("nan")


def best_f1_threshold(scores: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """The threshold with the best F1 over the precision-recall curve: scores of at least so much are anomalous.

    Args:
      scores: See :func:`auroc`.
      labels: Likewise.

    Returns:
      The threshold, the lowest of equally good ones, and F1; NaN where nothing is anomalous.

    Raises:
      ValueError: As :func:`auroc`.
    """
    precision, recall, thresholds = _precision_recall(*_flat(scores, labels))
    return _best_f1(precision, recall, thresholds)


def aupro(
    maps: np.ndarray,
    masks: np.ndarray,
    *,
    limit: float = 0.3,
    connectivity: int = 8,
    thresholds: int = THRESHOLDS,
) -> float:
    """Area under the curve of per-region overlap over the false positive rate, up to a limit, over the limit.

    Thresholds are quantiles of the normal pixels, as in arXiv 2602.23013's code; each connected region of a mask counts
    the same, whatever its area.

    Args:
      maps: Scores of pixels, ``[images, height, width]``, or a list of ``[height, width]`` of any sizes.
      masks: The same shapes; above 0 is anomalous.
      limit: Largest false positive rate, in (0, 1].
      connectivity: Neighbours of a pixel in a region: 4 or 8.
      thresholds: Number of thresholds.

    Returns:
      The area, NaN where there are no regions, no normal pixels, or scores that are not finite.

    Raises:
      ValueError: Shapes do not match, or an option is out of range.
    """
    _check_limit(limit, connectivity)
    regions, normal = [], []
    for scores, mask in _pairs(maps, masks):
        if not np.all(np.isfinite(scores)):
            return float("nan")
        labels, count = connected_regions(mask, connectivity)
        order = np.argsort(labels, axis=None, kind="stable")
        parts = np.split(scores.ravel()[order], np.cumsum(np.bincount(labels.ravel(), minlength=count + 1))[:-1])
        normal.append(parts[0])
        regions += [np.sort(part) for part in parts[1:]]
    normal = np.sort(np.concatenate(normal)) if normal else np.zeros(0)
    if not regions or not len(normal):
        return float("nan")
    m = len(normal)
    rates = limit * np.arange(1, thresholds + 1) / thresholds
    at = normal[np.floor((1 - rates) * (m - 1)).astype(np.int64)]
    false = (m - np.searchsorted(normal, at, side="left")) / m
    overlap = np.mean([1 - np.searchsorted(own, at, side="left") / len(own) for own in regions], axis=0)
    return limited_area(false, overlap, limit)


def connected_regions(mask: np.ndarray, connectivity: int = 8) -> tuple[np.ndarray, int]:
    """Numbers the connected regions of a mask from 1, 0 for the rest; returns the numbers and how many there are."""
    from scipy import ndimage

    structure = np.ones((3, 3), int) if connectivity == 8 else None
    return ndimage.label(np.asarray(mask) > 0, structure=structure)


def limited_area(false: np.ndarray, overlap: np.ndarray, limit: float) -> float:
    """Area under a curve from (0, 0), cut or continued flat at ``limit``, over ``limit``."""
    order = np.argsort(false, kind="stable")
    x, y = np.r_[0.0, false[order]], np.r_[0.0, overlap[order]]
    if x[-1] > limit:
        end = np.interp(limit, x, y)
        kept = x <= limit
        x, y = np.r_[x[kept], limit], np.r_[y[kept], end]
    elif x[-1] < limit:
        x, y = np.r_[x, limit], np.r_[y, y[-1]]
    return float(np.trapezoid(y, x) / limit)


def _precision_recall(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Precision and recall at each distinct score, from the highest."""
    order = np.argsort(-scores, kind="stable")
    ordered = scores[order]
    last = np.r_[np.flatnonzero(ordered[1:] != ordered[:-1]), len(ordered) - 1]
    true = np.cumsum(labels[order])[last].astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        return true / (last + 1), true / np.float64(labels.sum()), ordered[last]


def _best_f1(precision: np.ndarray, recall: np.ndarray, thresholds: np.ndarray) -> tuple[float, float]:
    if not len(recall) or not np.isfinite(recall[-1]):
        return float("nan"), float("nan")
    total = precision + recall
    f1 = np.where(total > 0, 2 * precision * recall / np.where(total > 0, total, 1), 0)
    best = len(f1) - 1 - int(np.argmax(f1[::-1]))
    return float(thresholds[best]), float(f1[best])


def _flat(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scores, labels = np.asarray(scores), np.asarray(labels)
    if scores.shape != labels.shape or not scores.size:
        raise ValueError(f"scores, labels: expected arrays of one shape, got {scores.shape} and {labels.shape}")
    if np.isnan(scores).any():
        raise ValueError("scores: expected numbers, got NaN")
    return scores.ravel(), labels.ravel() != 0


def _pairs(maps, masks):
    if len(maps) != len(masks):
        raise ValueError(f"maps, masks: expected as many maps as masks, got {len(maps)} and {len(masks)}")
    for scores, mask in zip(maps, masks, strict=True):
        scores, mask = np.asarray(scores), np.asarray(mask)
        if scores.ndim != 2 or scores.shape != mask.shape:
            raise ValueError(f"maps, masks: expected the same [height, width], got {scores.shape} and {mask.shape}")
        yield scores, mask


def _check_limit(limit: float, connectivity: int) -> None:
    if not 0 < limit <= 1:
        raise ValueError(f"limit: expected a rate in (0, 1], got {limit}")
    if connectivity not in (4, 8):
        raise ValueError(f"connectivity: expected 4 or 8, got {connectivity}")
