import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from subspace_jax import metrics

from ..variants import rest_slow


def by_pairs(features, labels):
    """Both measures straight from their definitions, in float64."""
    x = features - features.mean(0)
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    cosine = np.clip(x @ x.T, -1, 1)
    classes = np.unique(labels)
    angles = []
    for c in classes:
        rows = np.flatnonzero(labels == c)
        pairs = list(itertools.combinations(rows, 2))
        if pairs:
            angles.append(np.mean([np.degrees(np.arccos(cosine[i, j])) for i, j in pairs]))
    distance = [[np.mean(1 - cosine[np.ix_(labels == a, labels == b)]) for b in classes] for a in classes]
    return np.mean(angles), 1 - np.mean(np.diag(distance)) / np.mean(distance)


VARIABILITY, SEPARATION = jax.jit(metrics.intra_class_variability), jax.jit(metrics.class_separation_r2)


@pytest.mark.parametrize("count", rest_slow([13, 6, 20]))
@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 1000), num_classes=st.integers(2, 4))
def test_both_measures_equal_their_definition_over_pairs(seed, count, num_classes):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_classes, 20)[:count]
    features = (rng.normal(size=(20, 5))[:count] + labels[:, None]).astype(np.float32)
    angle, r2 = by_pairs(features.astype(np.float64), labels)
    chex.assert_trees_all_close(VARIABILITY(features, labels), angle, rtol=1e-3)
    chex.assert_trees_all_close(SEPARATION(features, labels), r2, rtol=1e-7, atol=1e-4)


def test_more_rows_than_one_chunk_give_the_same_angle():
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(600, 3)).astype(np.float32), rng.integers(0, 3, 600)
    angle, _ = by_pairs(features.astype(np.float64), labels)
    chex.assert_trees_all_close(VARIABILITY(features, labels), angle, rtol=1e-3)


def test_tight_classes_are_fully_separated():
    features = np.repeat(np.eye(3, 4, dtype=np.float32), 5, axis=0)
    labels = np.repeat(np.arange(3), 5)
    chex.assert_trees_all_close(SEPARATION(features, labels), 1.0, rtol=1e-7, atol=1e-5)
    assert VARIABILITY(features, labels) < 0.1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_classes_of_one_example_have_no_angle():
    assert np.isnan(metrics.intra_class_variability(np.eye(3, dtype=np.float32), np.arange(3)))


@pytest.mark.slow
def test_float64_features_are_measured_in_float64(x64):
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(40, 5)), rng.integers(0, 3, 40)
    angle, r2 = by_pairs(features, labels)
    chex.assert_trees_all_close(metrics.intra_class_variability(features, labels), angle, rtol=1e-12)
    chex.assert_trees_all_close(metrics.class_separation_r2(features, labels), r2, rtol=1e-11)


@pytest.mark.parametrize("measure", [metrics.intra_class_variability, metrics.class_separation_r2])
@pytest.mark.parametrize(("features", "labels"), [((6, 2), (5,)), ((6,), (6,)), ((6, 2), (6, 1))])
def test_shapes_that_do_not_fit_are_refused(measure, features, labels):
    with pytest.raises(ValueError, match=r"features, labels: expected \[examples, n\]"):
        measure(np.ones(features, np.float32), np.zeros(labels, np.int32))


@pytest.mark.slow
def test_features_far_from_zero_or_of_any_size_have_the_same_structure():
    rng = np.random.default_rng(0)
    labels = jnp.asarray(rng.integers(0, 3, 40), jnp.int32)
    x = (rng.integers(-64, 64, (40, 5)) / 64 + np.eye(5)[np.asarray(labels)]).astype(np.float32)
    for measure in (metrics.intra_class_variability, metrics.class_separation_r2):
        want = measure(jnp.asarray(x), labels)
        # Multiples of 1/64 beside 1e5 are float32 numbers still.
        for moved in (x + np.float32(1e5), x * np.float32(2.0**70), x * np.float32(2.0**-70)):
            chex.assert_trees_all_close(measure(jnp.asarray(moved), labels), want, rtol=1e-5)
