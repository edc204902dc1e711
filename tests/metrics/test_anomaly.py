"""Metrics of anomaly detection: golden values, definitions, counts, bad input."""

import numpy as np
import pytest

from subspace_jax import metrics


def test_metrics_give_the_golden_values(golden):
    data = golden("subspacead/metrics")
    maps, masks = data["maps"], data["masks"]
    for name, found in {
        "roc_auroc": metrics.auroc(data["roc_scores"], data["roc_labels"]),
        "roc_ap": metrics.average_precision(data["roc_scores"], data["roc_labels"]),
        "image_auroc": metrics.auroc(data["image_scores"], data["image_labels"]),
        "image_ap": metrics.average_precision(data["image_scores"], data["image_labels"]),
        "pixel_auroc": metrics.auroc(maps, masks),
        "pixel_ap": metrics.average_precision(maps, masks),
        "pixel_best_f1_threshold": metrics.best_f1_threshold(maps, masks)[0],
        "pixel_best_f1": metrics.best_f1_threshold(maps, masks)[1],
        **{
            f"aupro_conn{connectivity}_lim{limit}": metrics.aupro(maps, masks, limit=limit, connectivity=connectivity)
            for connectivity in (4, 8)
            for limit in (0.05, 0.3, 1.0)
        },
    }.items():
        assert found == pytest.approx(float(data[name]), abs=1e-9), name


def test_aupro_of_a_perfect_map_is_one_and_of_single_pixels_the_roc_area():
    rng = np.random.default_rng(0)
    masks = np.zeros((8, 40, 40), bool)
    masks[0, 4:9, 6:12] = masks[0, 20:22, 30:39] = True
    assert metrics.aupro(masks + rng.random(masks.shape) * 0.5, masks) == pytest.approx(1, abs=2.5e-3)
    points = np.zeros((2, 40, 40), bool)
    points[:, ::4, ::4] = True
    scores = rng.random(points.shape) + 0.5 * points
    assert metrics.aupro(scores, points, limit=1.0) == pytest.approx(metrics.auroc(scores, points), abs=3e-3)


def test_histograms_of_parts_give_the_metrics_of_all_pixels(golden):
    data = golden("subspacead/metrics")
    maps, masks = data["maps"] - data["maps"].min(), data["masks"]
    parts = []
    for some in (slice(0, 4), slice(4, None)):
        histogram = metrics.init_pixel_histogram()
        for scores, mask in zip(maps[some], masks[some], strict=True):
            histogram = metrics.update_pixel_histogram(histogram, scores, mask)
        parts.append(histogram)
    found = metrics.pixel_scores(metrics.merge_pixel_histograms(*parts))
    threshold, f1 = metrics.best_f1_threshold(maps, masks)
    assert found.auroc == pytest.approx(metrics.auroc(maps, masks), abs=1e-4)
    assert found.average_precision == pytest.approx(metrics.average_precision(maps, masks), abs=2e-3)
    assert found.best_f1 == pytest.approx(f1, abs=2e-3)
    assert found.best_f1_threshold == pytest.approx(threshold, rel=2e-3)
    assert found.aupro == pytest.approx(metrics.aupro(maps, masks), abs=1e-3)


def test_metrics_without_one_of_the_classes_are_nan():
    x = np.arange(4.0)
    for labels in (np.zeros(4), np.ones(4)):
        assert np.isnan(metrics.auroc(x, labels))
    assert np.isnan(metrics.average_precision(x, np.zeros(4)))
    assert np.isnan(metrics.best_f1_threshold(x, np.zeros(4))).all()
    square = np.ones((1, 3, 3))
    assert np.isnan(metrics.aupro(square, np.zeros((1, 3, 3))))  # no regions
    assert np.isnan(metrics.aupro(square, square))  # no normal pixels
    assert np.isnan(metrics.aupro(square * np.nan, np.eye(3)[None]))
    assert np.isnan(metrics.pixel_scores(metrics.init_pixel_histogram())).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.auroc(np.ones(3), np.ones(4)), "scores, labels: expected arrays of one shape"),
        (lambda: metrics.average_precision([np.nan, 1], [0, 1]), "scores: expected numbers, got NaN"),
        (lambda: metrics.best_f1_threshold([], []), "scores, labels: expected arrays of one shape"),
        (lambda: metrics.aupro(np.ones((1, 2, 2)), np.ones((2, 2, 2))), "expected as many maps as masks, got 1 and 2"),
        (lambda: metrics.aupro(np.ones((1, 2, 2)), np.ones((1, 2, 3))), r"expected the same \[height, width\]"),
        (lambda: metrics.aupro(np.ones((1, 2, 2)), np.ones((1, 2, 2)), limit=0), r"limit: expected a rate in \(0, 1\]"),
        (
            lambda: metrics.aupro(np.ones((1, 2, 2)), np.ones((1, 2, 2)), connectivity=6),
            "connectivity: expected 4 or 8, got 6",
        ),
        (lambda: update(-np.ones((2, 2)), np.ones((2, 2))), "scores: expected finite numbers of at least 0"),
        (lambda: update(np.ones((2, 2)), np.ones((2, 3))), r"scores, mask: expected the same \[height, width\]"),
        (lambda: metrics.pixel_scores(metrics.init_pixel_histogram(), limit=2), r"limit: expected a rate in \(0, 1\]"),
    ],
)
def test_metrics_refuse_what_does_not_match(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def update(scores, mask):
    return metrics.update_pixel_histogram(metrics.init_pixel_histogram(), scores, mask)
