"""SubspaceDetector: scikit-learn's manners, and digits of one class."""

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

from subspace_jax import metrics
from subspace_jax.anomaly.subspacead import SubspaceDetector


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((64, 3)) @ rng.standard_normal((3, 8)) + 0.05 * rng.standard_normal((64, 8))
    return x.astype(np.float32), (x + rng.standard_normal((64, 8))).astype(np.float32)


def test_predict_flags_what_lies_off_the_subspace(rows):
    normal, others = rows
    detector = SubspaceDetector(contamination=0.125).fit(normal)
    assert detector.n_components_ == 3
    assert np.mean(detector.predict(normal) == -1) == 0.125
    assert np.mean(detector.predict(others) == -1) > 0.9
    scores = detector.score_samples(others)
    np.testing.assert_allclose(detector.decision_function(others), scores - detector.offset_)
    piped = make_pipeline(StandardScaler(), SubspaceDetector(n_components=3)).fit(normal)
    assert np.mean(piped.predict(others) == -1) > 0.9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"contamination": 0.6}, r"contamination: expected a share in \(0, 0.5\], got 0.6"),
        ({"method": "whiten"}, "method: expected one of"),
        ({"drop_leading": -1}, "drop_leading: expected at least 0, got -1"),
        ({"n_components": 9}, "n_components: expected 0 to 8, the features, got 9"),
        ({"drop_leading": 9}, "drop_leading: expected at most 8, the features, got 9"),
    ],
)
def test_fit_refuses_options_out_of_range(rows, options, message):
    with pytest.raises(ValueError, match=message):
        SubspaceDetector(**options).fit(rows[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_components": 2.5}, "n_components: expected an integer, got 2.5"),
        ({"n_components": "2"}, "n_components: expected an integer, got '2'"),
        ({"drop_leading": 1.5}, "drop_leading: expected an integer, got 1.5"),
        ({"contamination": "auto"}, "contamination: expected a number, got 'auto'"),
        ({"explained_variance": None}, "explained_variance: expected a number, got None"),
    ],
)
def test_fit_names_options_of_another_type(rows, options, message):
    with pytest.raises(TypeError, match=message):
        SubspaceDetector(**options).fit(rows[0])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Skipping check check_array_api_input")
def test_the_detector_passes_the_checks_of_scikit_learn():
    failed = [found for found in check_estimator(SubspaceDetector(), on_fail=None) if found["status"] == "failed"]
    assert not failed


@pytest.mark.slow
def test_digits_of_one_class_are_told_from_the_others(record_property):
    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype(np.float32)
    areas = []
    for digit in range(10):
        fitted = np.flatnonzero(y == digit)[:60]
        others = np.setdiff1d(np.arange(len(y)), fitted)
        detector = SubspaceDetector(explained_variance=0.9).fit(x[fitted])
        areas.append(metrics.auroc(-detector.score_samples(x[others]), y[others] != digit))
    record_property("digits_auroc", np.mean(areas))
    assert np.mean(areas) >= 0.98
