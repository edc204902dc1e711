"""Detection in folders of images: fit, threshold, scores, maps and metrics of one category."""

import logging
import pathlib
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from subspace_jax import data, metrics
from subspace_jax.anomaly.image_sets import Category, TestImage
from subspace_jax.anomaly.subspacead.core import Moments, merge_moments
from subspace_jax.anomaly.subspacead.model import SubspaceAD

FOLDS = 5
_log = logging.getLogger(__name__)


class Row(NamedTuple):
    """What is found of an image.

    Attributes:
      image: The image.
      score: Its anomaly score.
      flagged: Whether the score is above the threshold; None without one.
    """

    image: TestImage
    score: float
    flagged: bool | None


class Detection(NamedTuple):
    """What is found in a category.

    Attributes:
      name: Its name.
      rows: Images with their scores, in the order of the category.
      skipped: Files that can't be read: path to the reason, normal and test images.
      num_normal: Normal images that were fitted to.
      rank: Dimensions of the subspace.
      threshold: Score above which an image is flagged, or None.
      metrics: Those of which there are labels or masks; image_auroc, image_ap, image_f1, pixel_auroc, pixel_ap,
        pixel_f1, pixel_threshold, aupro; and flagged_normal and flagged_anomalous, shares, with a threshold.
      seconds: Seconds an image, reading and scoring.
    """

    name: str
    rows: list[Row]
    skipped: dict[str, str]
    num_normal: int
    rank: int
    threshold: float | None
    metrics: dict[str, float]
    seconds: float


def detect(
    model: SubspaceAD,
    category: Category,
    maps: pathlib.Path,
    *,
    key: jax.Array,
    quantile: float | None = None,
    progress: bool = False,
) -> Detection:
    """Fits to the normal images of a category and scores the others.

    With a quantile each normal image is scored by a model that was fitted without its fold, and the threshold is that
    quantile of these scores; the model that scores the test images is fitted to all.

    Args:
      model: The model; what it was fitted to is forgotten.
      category: The images.
      maps: File to write the maps to, float32 ``[images, side, side]``, raw, in the order of the rows.
      key: Key of the rotations.
      quantile: In (0, 1]; None for no threshold.
      progress: Whether to show progress bars.

    Returns:
      What is found.

    Raises:
      ValueError: No normal or no test image can be read, or there are fewer than two normal images for a threshold.
    """
    skipped: dict[str, str] = {}
    normal = [path for path, _ in _readable(category.normal, skipped, f"{category.name}: read", progress)]
    if not normal:
        raise ValueError(f"normal: {category.name}: none of {len(category.normal)} images can be read")
    if quantile is not None and len(normal) < 2:
        raise ValueError(f"threshold: {category.name}: expected at least 2 normal images, got {len(normal)}")
    if quantile is not None and 0 < (1 - quantile) * (len(normal) - 1) < 1:
        _log.warning(
            "%s: of %d normal images the quantile %g lies between the two largest scores; "
            "more images make a threshold that means what it says",
            category.name,
            len(normal),
            quantile,
        )
    copies = 1 + model.settings.rotations
    with tqdm(desc=f"{category.name}: fit", total=len(normal), unit="image", disable=None if progress else True) as bar:
        folds = [normal] if quantile is None else [normal[i :: min(FOLDS, len(normal))] for i in range(FOLDS)]
        parts: list[Moments] = []
        for i, fold in enumerate(filter(None, folds)):
            parts.append(model.moments_of(_counted(fold, bar), jax.random.fold_in(key, i)))
    threshold = None
    if quantile is not None:
        name = f"{category.name}: score normal images held out"
        with tqdm(desc=name, total=len(normal), unit="image", disable=None if progress else True) as bar:
            threshold = float(np.quantile(_held_out_scores(model, folds, parts, bar), quantile))
    _log.debug("%s: fitted to %d images, %d copies of each", category.name, len(normal), copies)
    model.set_moments(_merged(parts))
    began = time.monotonic()
    rows, measured = _score_all(model, category, maps, threshold, skipped, progress)
    seconds = (time.monotonic() - began) / len(rows)
    rank = int(model.subspace.rank)
    return Detection(category.name, rows, skipped, len(normal), rank, threshold, measured, seconds)


def resized_mask(path: pathlib.Path, side: int) -> np.ndarray:
    """Reads a mask: ``[side, side]`` bool, True where any channel is above 0."""
    mask = Image.fromarray(np.max(data.decode_image(path), axis=-1))
    return np.asarray(mask.resize((side, side), Image.Resampling.NEAREST)) > 0


def _score_all(model, category, maps, threshold, skipped, progress) -> tuple[list[Row], dict[str, float]]:
    waiting: deque[TestImage] = deque()
    by_path = {image.path: image for image in category.test}
    side, rows = model.side, []
    with_masks = any(image.mask is not None for image in category.test)
    without = [image.name for image in category.test if with_masks and image.label and image.mask is None]
    if without:
        _log.warning(
            "%s: %d anomalous images have no mask, and are left out of pixel metrics", category.name, len(without)
        )
    histogram = metrics.init_pixel_histogram()

    def images() -> Iterator[np.ndarray]:
        for path, pixels in _readable(list(by_path), skipped, f"{category.name}: score", progress):
            waiting.append(by_path[path])
            yield pixels

    with maps.open("wb") as file:
        for score, found in model.score_stream(images()):
            image = waiting.popleft()
            file.write(np.ascontiguousarray(found, np.float32).data)
            rows.append(Row(image, score, None if threshold is None else score > threshold))
            if with_masks and (image.mask is not None or image.label == 0):
                mask = np.zeros((side, side), bool) if image.mask is None else resized_mask(image.mask, side)
                histogram = metrics.update_pixel_histogram(histogram, found, mask)
    if not rows:
        raise ValueError(f"test: {category.name}: none of {len(category.test)} images can be read")
    return rows, _measured(rows, histogram if with_masks else None)


def _measured(rows: Sequence[Row], histogram: metrics.PixelHistogram | None) -> dict[str, float]:
    found: dict[str, float] = {}
    known = [row for row in rows if row.image.label is not None]
    labels = np.array([row.image.label for row in known])
    if len(set(labels.tolist())) == 2:
        scores = np.array([row.score for row in known])
        found["image_auroc"] = metrics.auroc(scores, labels)
        found["image_ap"] = metrics.average_precision(scores, labels)
        found["image_f1"] = metrics.best_f1_threshold(scores, labels)[1]
    for name, label in (("normal", 0), ("anomalous", 1)):
        own = [row.flagged for row in known if row.image.label == label]
        if own and own[0] is not None:
            found[f"flagged_{name}"] = float(np.mean(own))
    if histogram is not None and histogram.regions:
        pixels = metrics.pixel_scores(histogram)
        found |= {"pixel_auroc": pixels.auroc, "pixel_ap": pixels.average_precision, "aupro": pixels.aupro}
        found |= {"pixel_f1": pixels.best_f1, "pixel_threshold": pixels.best_f1_threshold}
    return found


def _held_out_scores(model: SubspaceAD, folds: list[list[pathlib.Path]], parts: list[Moments], bar: tqdm) -> np.ndarray:
    scores: list[float] = []
    for i, fold in enumerate(filter(None, folds)):
        model.set_moments(_merged(parts[:i] + parts[i + 1 :]))
        scores += [score for score, _ in model.score_stream(_counted(fold, bar))]
    return np.array(scores)


def _merged(parts: list[Moments]) -> Moments:
    total = parts[0]
    for part in parts[1:]:
        total = merge_moments(total, part)
    return total


def _counted(paths: Iterable[pathlib.Path], bar: tqdm) -> Iterator[np.ndarray]:
    for path in paths:
        yield data.decode_image(path)
        bar.update()


def _readable(
    paths: Sequence[pathlib.Path], skipped: dict[str, str], what: str, progress: bool
) -> Iterator[tuple[pathlib.Path, np.ndarray]]:
    """Yields the images that can be read; names the others in a warning, and notes them."""
    for path in tqdm(paths, desc=what, unit="image", disable=None if progress else True):
        try:
            pixels = data.decode_image(path)
        except (OSError, ValueError) as error:
            why = " ".join(str(error).split()).removeprefix(f"{path}: ")
            skipped[str(path)] = why
            _log.warning("skipped %s: %s", path, why)
            continue
        yield path, pixels
